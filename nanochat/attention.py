"""Causal attention with a left window, behind one function and three backends chosen by name.

B batch, T time, H query heads, K key/value heads (H a multiple of K), D head width, S cached positions.
A window of w lets a position see itself and the w positions before it.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str = "sdpa") -> torch.Tensor:
    """q: (B, T, H, D), k and v: (B, T, K, D) -> (B, T, H, D). Softmax scale 1/sqrt(D)."""
    return BACKENDS[backend](q, k, v, window)


def choose_backend(device: torch.device, dtype: torch.dtype, forced: str = "") -> str:
    """The backend for this machine and dtype: flex on CUDA, sdpa elsewhere; flash when it is forced, since its kernels
    still break the graph of a compiled model at every layer. A forced one that is missing is an error."""
    available = ["sdpa"]
    if device.type == "cuda":
        half = dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0)
        available = ["flex", *available, *["flash"] * (half and flash_function() is not None)]
    if forced and forced not in available:
        raise SystemExit(f"NANOCHAT_ATTENTION is {forced!r}; on this machine there are: {', '.join(available)}")
    return forced or available[0]


@lru_cache
def flash_function():
    """flash_attn_func of whichever flash-attn is installed: 4, then 3 (Hopper), then 2; None without one."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError:
            try:
                from flash_attn import flash_attn_func
            except ImportError:
                return None
    return flash_attn_func


def attend_flash(q, k, v, window):
    return _uncompiled_flash()(q, k, v, window)


@lru_cache
def _uncompiled_flash():
    """The kernels are no torch operators: a compiled model calls them as they are. Made on first use, since this alone
    loads the compiler (a second and more)."""

    def flash(q, k, v, window):
        left = {} if window >= q.size(1) - 1 else {"window_size": (window, 0)}
        out = flash_function()(q, k, v, causal=True, **left)
        return out[0] if isinstance(out, tuple) else out

    return torch.compiler.disable(flash)


def attend_flex(q, k, v, window):
    if not torch.compiler.is_compiling():  # evaluation comes in ever new shapes, each of which it would compile
        return attend_sdpa(q, k, v, window)
    out = _flex_function()(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=_flex_mask(q.size(1), window, q.device),
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


@lru_cache
def _flex_function():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache(maxsize=64)
def _flex_mask(length, window, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, q_position, k_position):
        return (q_position >= k_position) & (q_position - k_position <= window)

    return create_block_mask(visible, None, None, length, length, device=device)


def attend_sdpa(q, k, v, window):
    """Time and memory grow with T x window: queries in blocks of one window see their own block and the one before."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    length = q.size(2)
    if window >= length - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    blocks = (length - 1) // window  # blocks of `window` queries after the first one, the last maybe partial
    first = _sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True)
    pad = (blocks + 1) * window - length
    tail = F.pad(q[:, :, window:], (0, 0, 0, pad)).unflatten(2, (blocks, window))
    keys, values = (F.pad(x, (0, 0, 0, pad)).unfold(2, 2 * window, window).transpose(-1, -2) for x in (k, v))
    # (B, heads, blocks, 2 * window, D): the key at j of a block's pair lies j - window - i after its query i
    i = torch.arange(window, device=q.device).unsqueeze(1)
    j = torch.arange(2 * window, device=q.device)
    mask = (j >= i) & (j <= i + window)
    tail, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (tail, keys, values))
    rest = _sdpa(tail, keys, values, attn_mask=mask)
    rest = rest.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, : length - window]
    return torch.cat([first, rest], dim=2).transpose(1, 2)


def _sdpa(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **kwargs)


BACKENDS = {"flash": attend_flash, "flex": attend_flex, "sdpa": attend_sdpa}


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention over cached keys. q: (B, T, H, D), k and v: (B, K, S, D), mask: (B, 1, T, S), true where a key is
    seen -> (B, T, H, D)."""
    return _sdpa(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)
