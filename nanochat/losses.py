"""Softcapped cross-entropy from the last hidden state, without ever holding the logits of all tokens.

N tokens, C model width, V vocabulary (rows of the head, padding included).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -1
# Logits that are held at once: on a CPU what its caches hold, on a GPU enough to keep it busy (512 MB in float32).
CPU_CHUNK, GPU_CHUNK = 1 << 21, 1 << 27


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor, vocab_size: int, softcap: float) -> torch.Tensor:
    """x: (..., C), weight: (V, C) -> (..., vocab_size) float32. The product runs in the dtype of x."""
    y = F.linear(x, weight.to(x.dtype))[..., :vocab_size].float()
    return softcap * torch.tanh(y / softcap)


def cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float, reduction: str
) -> torch.Tensor:
    """Cross-entropy in float32 of softcapped logits; targets of -1 are left out.

    x: (N, C), weight: (V, C), targets: (N,). reduction: "mean" over the targets kept, "sum", or "none", which gives
    (N,) with 0 at ignored targets.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction is {reduction!r}; expected mean, sum or none")
    if reduction == "none":
        step = _tokens_per_chunk(weight)
        chunks = zip(x.split(step), targets.split(step), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([_losses(*chunk, weight, vocab_size, softcap) for chunk in chunks])
        # recomputed in the backward pass: autograd would keep every chunk's logits for it
        return torch.cat(
            [checkpoint(_losses, *chunk, weight, vocab_size, softcap, use_reentrant=False) for chunk in chunks]
        )
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    total = _SoftcappedCrossEntropy.apply(x, weight, targets, vocab_size, softcap)
    return total / (targets != IGNORE).sum() if reduction == "mean" else total


def _losses(x, targets, weight, vocab_size, softcap):
    logits = softcapped_logits(x, weight, vocab_size, softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def _tokens_per_chunk(weight: torch.Tensor) -> int:
    elements = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    return max(1, elements // weight.size(0))


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """The sum of the losses. The gradients of x and of the head are made in the forward pass, chunk by chunk, while
    the chunk's logits are at hand; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap):
        needs_grad = any(ctx.needs_input_grad[:2])
        w = weight.to(x.dtype)
        grad_x = torch.zeros_like(x) if needs_grad else None
        grad_w = torch.zeros_like(weight) if needs_grad else None
        total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        step = _tokens_per_chunk(weight)
        for start in range(0, x.size(0), step):
            part = slice(start, start + step)
            keep = (targets[part] != IGNORE).unsqueeze(1)
            target = torch.where(keep, targets[part].unsqueeze(1), 0)
            # tanh keeps every logit within the softcap, so its exponential needs no maximum taken off first
            squashed = F.linear(x[part], w)[:, :vocab_size].to(total.dtype).div_(softcap).tanh_()
            exponential = (squashed * softcap).exp_()
            sums = exponential.sum(dim=1, keepdim=True)
            total += torch.where(keep, sums.log() - softcap * squashed.gather(1, target), 0).sum()
            if needs_grad:
                # d loss / d logits = softmax - onehot; d logits / d product = 1 - tanh^2
                grad = exponential.mul_(keep / sums)
                grad.scatter_add_(1, target, -keep.to(grad.dtype))
                grad.addcmul_(grad, squashed.square_(), value=-1)
                grad = grad.to(x.dtype)
                torch.mm(grad, w[:vocab_size], out=grad_x[part])
                if grad_w.dtype == x.dtype:
                    grad_w[:vocab_size].addmm_(grad.T, x[part])
                else:
                    grad_w[:vocab_size] += grad.T @ x[part]
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_total.to(grad_x.dtype), grad_w * grad_total.to(grad_w.dtype), None, None, None
