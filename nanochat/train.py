"""The training loop, as plain functions over callables; pretraining and SFT share it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from nanochat.optim import MuonAdamW
from nanochat.results import LiveLine, Results, clock
from nanochat.runtime import Runtime, peak_flops

WARM_STEPS = 10  # steps that are not timed: compilation, cold caches
LOSS_EMA = 0.9


@dataclass
class Progress:
    """What a run knows of itself between two steps; saved with its checkpoints."""

    step: int = 0
    ema_loss: float = 0.0
    ema_steps: int = 0
    training_time: float = 0.0  # seconds in steps after the tenth
    timed_steps: int = 0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    chatcore: float | None = None
    core: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)

    def saw_loss(self, loss: float) -> float:
        """Count a step's loss in; the debiased moving average."""
        self.ema_loss = LOSS_EMA * self.ema_loss + (1 - LOSS_EMA) * loss
        self.ema_steps += 1
        return self.smooth_loss

    def saw_bpb(self, bpb: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)

    @property
    def smooth_loss(self) -> float:
        return self.ema_loss / (1 - LOSS_EMA**self.ema_steps) if self.ema_steps else float("nan")


class LossScale:
    """Gradient scaling for float16. A step whose gradients overflow is skipped on all ranks and the scale halved; it
    doubles after a thousand good ones. Other dtypes keep a scale of 1."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.on = runtime.dtype == torch.float16
        self.scale = 2.0**15 if self.on else 1.0
        self.good_steps = 0

    def unscale(self, optimizer: MuonAdamW) -> bool:
        """Divide the gradients by the scale; False when any rank has one that is not finite."""
        if not self.on:
            return True
        grads = [parameter.grad for group in optimizer.groups for _, parameter in group["named"]]
        bad = torch.stack([(~grad.isfinite()).any() for grad in grads]).any().float()
        if self.runtime.sum(bad) > 0:
            self.scale, self.good_steps = self.scale / 2, 0
            return False
        for grad in grads:
            grad.div_(self.scale)
        self.good_steps += 1
        if self.good_steps % 1000 == 0:
            self.scale *= 2
        return True


def optimizer_step(
    model, optimizer: MuonAdamW, inputs, targets, device_batch_size: int, runtime: Runtime, scale: LossScale
) -> torch.Tensor:
    """One step over this rank's rows (n, T): the gradient of the mean loss over all targets of all ranks, then the
    update. Returns that mean loss, the same on every rank."""
    num_targets = runtime.sum((targets >= 0).sum().float()).clamp(min=1)
    total = torch.zeros((), device=runtime.device)
    # the optimizer averages over ranks: times their number makes it the sum over all targets
    factor = scale.scale * runtime.world_size / num_targets
    for x, y in zip(inputs.split(device_batch_size), targets.split(device_batch_size), strict=True):
        loss = model(x, y, loss_reduction="sum")
        (loss * factor).backward()
        total += loss.detach()
    if scale.unscale(optimizer):
        optimizer.step()
    optimizer.zero_grad()
    return runtime.sum(total) / num_targets


def train(
    model,
    optimizer: MuonAdamW,
    batches: Iterator[tuple],
    progress: Progress,
    runtime: Runtime,
    results: Results,
    *,
    num_iterations: int,
    device_batch_size: int,
    tokens_per_step: int,
    flops_per_token: int,
    set_rates: Callable[[int], float],
    between_steps: Callable[[int], None],
    describe: Callable[[int], dict] = lambda step: {},
) -> None:
    """Steps progress.step .. num_iterations - 1.

    batches yields this rank's (inputs, targets) of each step. set_rates(step) sets the optimizer's rates and returns
    the learning-rate multiplier. between_steps(step) evaluates, samples and saves: before every step, and once more
    after the last. describe(step) adds to what is logged.
    """
    scale, live = LossScale(runtime), LiveLine(runtime)
    peak = peak_flops(runtime.device)
    while True:
        between_steps(progress.step)
        if progress.step >= num_iterations:
            return
        step = progress.step
        inputs, targets = next(batches)
        runtime.synchronize()
        begin = time.perf_counter()
        multiplier = set_rates(step)
        loss = optimizer_step(model, optimizer, inputs, targets, device_batch_size, runtime, scale).item()
        runtime.synchronize()
        seconds = time.perf_counter() - begin
        if loss != loss:
            raise SystemExit(
                f"the loss of step {step} is not a number; resume from the last checkpoint with a lower rate"
            )
        smooth = progress.saw_loss(loss)
        progress.step += 1
        if step >= WARM_STEPS:
            progress.training_time += seconds
            progress.timed_steps += 1
        rate = tokens_per_step / seconds
        achieved = rate * flops_per_token
        mfu = achieved / (peak * runtime.world_size) if peak else None
        results.log(
            step,
            {
                "train/loss": smooth,
                "train/step_loss": loss,
                "train/lrm": multiplier,
                "train/dt": seconds,
                "train/tok_per_sec": rate,
                "train/mfu": mfu,
                "total_training_flops": flops_per_token * tokens_per_step * (step + 1),
                "total_training_time": progress.training_time,
                **describe(step),
            },
        )
        average = progress.training_time / progress.timed_steps if progress.timed_steps else seconds
        live.show(
            f"step {step + 1}/{num_iterations} | loss {smooth:.4f} | bpb {format_bpb(progress.val_bpb)} "
            f"| lr x{multiplier:.2f} | {seconds * 1000:.0f} ms | {rate:,.0f} tok/s "
            f"| {f'MFU {mfu:.1%} | ' if mfu else ''}{runtime.peak_memory() / 1e9:.1f} GB "
            f"| ETA {clock(average * (num_iterations - step - 1))}",
            last=step + 1 == num_iterations,
        )


def format_bpb(bpb: float | None) -> str:
    return "-" if bpb is None else f"{bpb:.4f}"


def compiled(model, choice: int):
    """torch.compile by choice: 1 yes, 0 no, -1 on GPUs (on two CPU cores it costs more than a small run gains)."""
    wanted = choice == 1 or (choice == -1 and model.lm_head.weight.device.type == "cuda")
    return torch.compile(model, dynamic=False) if wanted else model


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and after the last, happens at this one. -1: never."""
    return every > 0 and (last or (step > 0 and step % every == 0))


def summary(progress: Progress, tokens_per_step: int, flops_per_token: int, runtime: Runtime) -> dict:
    """The `final` part of a training stage's JSON."""
    tokens = progress.step * tokens_per_step
    timed = progress.training_time > 0
    rate = progress.timed_steps * tokens_per_step / progress.training_time if timed else None
    peak = peak_flops(runtime.device)
    return {
        "step": progress.step,
        "train_loss": progress.smooth_loss,
        "val_bpb": progress.val_bpb,
        "min_val_bpb": progress.min_val_bpb,
        "tok_per_sec": rate,
        "mfu": rate * flops_per_token / (peak * runtime.world_size) if timed and peak else None,
        "peak_memory_bytes": runtime.peak_memory(),
        "tokens": tokens,
        "total_training_flops": float(tokens * flops_per_token),
        "total_training_time": progress.training_time,
    }
