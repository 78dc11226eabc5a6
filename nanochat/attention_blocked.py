"""Windowed causal attention for CPUs: blocks of queries against the keys that they see, as plain matrix products.

N rows times heads, T time, D head width, w the window. On two cores of an AMD EPYC it takes two thirds of the time of
torch's SDPA in float32, a third in bfloat16, and less where there is a window (dev/LOG.md).
"""

import torch

BLOCK = 128  # queries


class BlockedAttention(torch.autograd.Function):
    """q, k, v: (N, T, D) -> (N, T, D). Logits and softmax are float32 (float64 for float64). The probabilities are
    kept for the backward pass, w + BLOCK for each query: with a full window, half of T x T."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, scale = q.to(wide), k.to(wide), q.size(-1) ** -0.5
        out, kept = torch.empty_like(q), []
        before = min(window, q.size(1))
        unseen = _unseen(before, wide, q.device)
        for first, begin, end in _blocks(q.size(1), window):
            skipped = before - (begin - first)
            bias = unseen[: end - begin, skipped : skipped + end - first]
            scores = torch.baddbmm(bias, queries[:, begin:end], keys[:, first:end].mT, alpha=scale)
            shares = scores.softmax(dim=-1)
            out[:, begin:end] = shares.to(q.dtype) @ v[:, first:end]
            if any(ctx.needs_input_grad):
                kept.append(shares)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        scale = q.size(-1) ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # Where attention is sharp, the gradient of a probability is nearly the weighted mean of all: in bfloat16 their
        # difference would be rounding, and a model that is to look things up would learn from noise.
        wide = torch.promote_types(q.dtype, torch.float32)
        wide_grad, wide_v = grad.to(wide), v.to(wide)
        for shares, (first, begin, end) in zip(kept, _blocks(q.size(1), ctx.window), strict=True):
            grad_v[:, first:end].baddbmm_(shares.to(q.dtype).mT, grad[:, begin:end])
            of_shares = wide_grad[:, begin:end] @ wide_v[:, first:end].mT
            means = (of_shares * shares).sum(dim=-1, keepdim=True)
            grad_scores = of_shares.sub_(means).mul_(shares).to(q.dtype)
            grad_q[:, begin:end] = (grad_scores @ k[:, first:end]).mul_(scale)
            grad_k[:, first:end].baddbmm_(grad_scores.mT, q[:, begin:end], alpha=scale)
        return grad_q, grad_k, grad_v, None


def _blocks(length, window):
    """First key, first query and end of both, for each block."""
    return [(max(0, begin - window), begin, min(length, begin + BLOCK)) for begin in range(0, length, BLOCK)]


def _unseen(before, dtype, device):
    """For a block of queries and the keys from `before` before it on: 0 where a key is seen, else minus infinity."""
    distance = before + torch.arange(BLOCK, device=device).unsqueeze(1) - torch.arange(before + BLOCK, device=device)
    bias = torch.zeros(distance.shape, dtype=dtype, device=device)
    return bias.masked_fill_((distance < 0) | (distance > before), float("-inf"))
