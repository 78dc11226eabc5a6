"""Softcapped cross-entropy from the last hidden state, without ever holding the logits of all tokens.

N tokens, n tokens of a chunk, C model width, V vocabulary (rows of the head, padding included).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.fp8 import Fp8Head

IGNORE = -1
# Logits that are held at once, 128 and 512 MB in float32; on a CPU for no more tokens than make its products fast.
CPU_CHUNK, GPU_CHUNK = 1 << 25, 1 << 27
CPU_TOKENS = 1024
MULTIPLE = 128  # of tokens: what kernels like, and those of fp8 need


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor, vocab_size: int, softcap: float) -> torch.Tensor:
    """x: (..., C), weight: (V, C) -> (..., vocab_size) float32. The product runs in the dtype of x."""
    y = F.linear(x, weight.to(x.dtype))[..., :vocab_size].float()
    return softcap * torch.tanh(y / softcap)


def as_it_is(function: Callable) -> Callable:
    return function


def cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    softcap: float,
    reduction: str,
    in_fp8: bool = False,
    compile_function: Callable = as_it_is,
) -> torch.Tensor:
    """Cross-entropy in float32 of softcapped logits; targets of -1 are left out.

    x: (N, C), weight: (V, C), targets: (N,). reduction: "mean" over the targets kept, "sum", or "none", which gives
    (N,) with 0 at ignored targets, and has a gradient, too. in_fp8: the products of a "mean" or "sum" that is learned
    from. compile_function: what is done to the function of a chunk.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction is {reduction!r}; expected mean, sum or none")
    if reduction == "none":
        losses_of = compile_function(losses_of_chunk)
        step = _tokens_per_chunk(weight)
        chunks = zip(x.split(step), targets.split(step), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([losses_of(*chunk, weight, vocab_size, softcap) for chunk in chunks])
        # recomputed in the backward pass: autograd would keep every chunk's logits for it
        return torch.cat(
            [checkpoint(losses_of, *chunk, weight, vocab_size, softcap, use_reentrant=False) for chunk in chunks]
        )
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    head = Fp8Head if in_fp8 and torch.is_grad_enabled() else Head
    total = _SoftcappedCrossEntropy.apply(x, weight, targets, vocab_size, softcap, head, compile_function)
    return total / (targets != IGNORE).sum() if reduction == "mean" else total


def losses_of_chunk(x, targets, weight, vocab_size, softcap):
    logits = softcapped_logits(x, weight, vocab_size, softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def _tokens_per_chunk(weight: torch.Tensor) -> int:
    if weight.device.type == "cpu":
        return max(1, min(CPU_TOKENS, CPU_CHUNK // weight.size(0)))
    return max(MULTIPLE, GPU_CHUNK // weight.size(0) // MULTIPLE * MULTIPLE)


class Head:
    """The three products with the head's weight (V, C), which is cast to dtype once for all chunks."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.weight = weight.to(dtype)

    def product(self, x):
        return F.linear(x, self.weight)

    def grad_x(self, grad):
        return grad @ self.weight

    def add_grad_weight(self, total, grad, x):
        """total: (V, C), in place."""
        if total.dtype == x.dtype:
            total.addmm_(grad.T, x)
        else:
            total += grad.T @ x


def loss_and_gradients_of_chunk(x, targets, head, vocab_size: int, softcap: float, grad_weight):
    """The sum of the losses, and the gradient of x where grad_weight, (V, C), is given, to which the head's is added.

    With r = 1 / (1 + exp(2 y / softcap)), tanh(y / softcap) is 1 - 2 r: on a CPU a third of the time of tanh itself.
    A logit is then softcap - 2 softcap r, at most softcap, so its exponential needs no maximum taken off first.
    """
    keep = (targets != IGNORE).unsqueeze(1)
    target = torch.where(keep, targets.unsqueeze(1), 0)
    y = head.product(x)
    r = y.to(torch.promote_types(y.dtype, torch.float32))
    r = r.mul_(2 / softcap).exp_().add_(1).reciprocal_()
    exponential = (r * (-2 * softcap)).exp_()
    exponential[:, vocab_size:] = 0  # rows of padding are no tokens
    sums = exponential.sum(dim=1, keepdim=True)
    total = torch.where(keep, sums.log() + 2 * softcap * r.gather(1, target), 0).sum()
    if grad_weight is None:
        return total, None
    # d loss / d logits = softmax - onehot; d logits / d y = 1 - tanh^2 = 4 (r - r^2)
    grad = exponential.mul_(keep * 4 / sums)
    grad.scatter_add_(1, target, -4 * keep.to(grad.dtype))
    grad = grad.mul_(r.addcmul_(r, r, value=-1)).to(x.dtype)
    head.add_grad_weight(grad_weight, grad, x)
    return total, head.grad_x(grad)


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """The sum of the losses. The gradients of x and of the head are made in the forward pass, chunk by chunk, while
    the chunk's logits are at hand; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, make_head, compile_function):
        needs_grad = any(ctx.needs_input_grad[:2])
        of_chunk = compile_function(loss_and_gradients_of_chunk)
        head = make_head(weight, x.dtype)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        step = _tokens_per_chunk(weight)
        for start in range(0, x.size(0), step):
            part = slice(start, start + step)
            loss, grad = of_chunk(x[part], targets[part], head, vocab_size, softcap, grad_weight)
            total += loss
            if needs_grad:
                grad_x[part] = grad
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_x, grad_weight = ctx.saved_tensors
        nothing = (None,) * 5
        return grad_x * grad_total.to(grad_x.dtype), grad_weight * grad_total.to(grad_weight.dtype), *nothing
