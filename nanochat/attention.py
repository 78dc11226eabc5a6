"""Causal attention with a left window, behind one function and backends chosen by name.

B batch, T time, H query heads, K key/value heads (H a multiple of K), D head width, S cached positions.
A window of w lets a position see itself and the w positions before it.

flash     flash-attn, where it is installed (attention_flash.py)
flex      torch's FlexAttention: compiled for the device, and only there; blocks outside the window cost nothing
blocked   blocks of matrix products, for CPUs (attention_blocked.py)
sdpa      torch's scaled_dot_product_attention in blocks of a window: runs everywhere
"""

import torch
import torch.nn.functional as F

from nanochat.attention_blocked import BlockedAttention
from nanochat.attention_flash import flash_function
from nanochat.runtime import Runtime, missing_compiler


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str = "sdpa") -> torch.Tensor:
    """q: (B, T, H, D), k and v: (B, T, K, D) -> (B, T, H, D). Softmax scale 1/sqrt(D)."""
    return BACKENDS[backend](q, k, v, window)


def available_backends(device: torch.device, dtype: torch.dtype, head_dim: int, disabled: tuple = ()) -> list[str]:
    """The backends that run on this machine, the preferred one first. disabled: what scripts.doctor found wrong."""
    if device.type == "cuda":
        fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 128
        flash = fits and flash_function(torch.cuda.get_device_capability(device)) is not None
        flex = "compile" not in disabled and not missing_compiler(device)  # uncompiled, it makes T x T scores
        return ["flash"] * flash + ["flex"] * flex + ["sdpa"]
    return ["blocked", "sdpa"] if device.type == "cpu" else ["sdpa"]


def choose_backend(runtime: Runtime, head_dim: int) -> str:
    """The preferred backend of those that scripts.doctor did not disable, or the one that NANOCHAT_ATTENTION forces:
    an error where there is no such."""
    available = available_backends(runtime.device, runtime.dtype, head_dim, runtime.disabled)
    if runtime.attention and runtime.attention not in available:
        raise SystemExit(
            f"NANOCHAT_ATTENTION is {runtime.attention!r}; on this machine there are: {', '.join(available)}"
        )
    return runtime.attention or next((name for name in available if name not in runtime.disabled), "sdpa")


# What a compiled pass must find ready, since making it is no part of a graph: see prepare().
FLASH = {}  # device -> function
FLEX_MASKS = {}  # (T, window, device) -> block mask


def attend_flash(q, k, v, window):
    if q.device not in FLASH:
        FLASH[q.device] = flash_function(torch.cuda.get_device_capability(q.device))
    return FLASH[q.device](q, k, v, window)


def prepare(backend: str, length: int, windows: list[int], device: torch.device) -> None:
    """To be called before a compiled pass over rows of this length. device: as the tensors' own, with its index."""
    if backend == "flash" and device not in FLASH:
        FLASH[device] = flash_function(torch.cuda.get_device_capability(device))
    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        for window in set(windows):
            if (length, window, device) not in FLEX_MASKS:

                def visible(b, h, q_position, k_position, window=window):
                    return (q_position >= k_position) & (q_position <= k_position + window)

                FLEX_MASKS[length, window, device] = create_block_mask(visible, None, None, length, length, device)


def attend_flex(q, k, v, window):
    if not torch.compiler.is_compiling():  # evaluation comes in ever new shapes, each of which it would compile
        return attend_sdpa(q, k, v, window)
    from torch.nn.attention.flex_attention import flex_attention

    mask = FLEX_MASKS[q.size(1), window, q.device]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def attend_blocked(q, k, v, window):
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return BlockedAttention.apply(*rows, window).unflatten(0, (q.size(0), q.size(2))).transpose(1, 2)


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


BACKENDS = {"flash": attend_flash, "flex": attend_flex, "blocked": attend_blocked, "sdpa": attend_sdpa}


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention over cached keys. q: (B, T, H, D), k and v: (B, K, S, D), mask: (B, 1, T, S), true where a key is
    seen, or 0 and -inf elsewhere; None where all are -> (B, T, H, D)."""
    return _sdpa(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)
