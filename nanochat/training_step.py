"""One optimizer step over the rows of a rank: forward, backward, update. Pretraining, fine-tuning, RL and
the benchmarks share it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime


@dataclass
class Outcome:
    loss: float  # mean over the targets of all ranks
    finite: bool  # loss and gradients, on all ranks: the update was made
    finite_here: bool
    news: list[float]  # summed over the ranks


def optimizer_step(
    model,
    optimizer: MuonAdamW,
    batch: tuple[torch.Tensor, ...],
    device_batch: DeviceBatch,
    runtime: Runtime,
    loss_scale: float = 1.0,
    news: Callable[[], list] = list,
) -> Outcome:
    """One step over this rank's rows: the gradient of the mean loss over all targets of all ranks, then the update,
    which is left out when anything is not finite. batch: inputs and targets, (n, T) each, and what else the model takes
    of each row. news() gives numbers of this rank to send with the loss."""
    num_targets = runtime.sum((batch[1] >= 0).sum()).clamp(min=1)
    # the optimizer averages over ranks: times their number makes it the sum over all targets
    factor = loss_scale * runtime.world_size
    total = accumulate(model, optimizer, batch, device_batch, factor, num_targets)
    grads = [parameter.grad for group in optimizer.groups for _, parameter in group["named"]]
    finite_here = (torch.nn.utils.get_total_norm(grads).float() + total).isfinite()
    told = torch.tensor([0, 0, *news()], dtype=torch.float32).to(runtime.device)
    told[0], told[1] = total, ~finite_here
    runtime.sum(told)
    told[0] /= num_targets
    loss, bad_ranks, *heard = told.tolist()
    finite = bad_ranks == 0 and math.isfinite(loss)
    if finite:
        if loss_scale != 1:
            torch._foreach_div_(grads, loss_scale)
        optimizer.step()
    optimizer.zero_grad()
    return Outcome(loss, finite, bool(finite_here), heard)


def forward_backward(model, rows: tuple, factor: float, num_targets: torch.Tensor) -> torch.Tensor:
    """A function of its own, so that nothing of the graph outlives an out-of-memory error."""
    loss = model(*rows, loss_reduction="sum")
    (loss * factor / num_targets).backward()
    return loss.detach()


def accumulate(
    model, optimizer: MuonAdamW, batch: tuple, device_batch: DeviceBatch, factor: float, num_targets: torch.Tensor
) -> torch.Tensor:
    """The gradients of factor / num_targets times the summed loss of this rank's rows, device_batch.rows at a time;
    returns the sum. Out of memory, the device batch is halved and the same rows are begun again: other ranks wait, and
    need not know."""
    while True:
        total = torch.zeros((), device=batch[0].device)
        try:
            for rows in zip(*(tensor.split(device_batch.rows) for tensor in batch), strict=True):
                total += forward_backward(model, rows, factor, num_targets)
            return total
        except RuntimeError as error:
            device_batch.halve(error)
        optimizer.zero_grad()
