"""The flash-attn kernels behind one function that compiles without breaking the graph.

Version 4 (windows, forward and backward, on compute capability 9.0 and later; its backward pass refuses 8.x) is a plain
autograd function: here its two halves are operators of torch.library. Versions 3 and 2 are taken where they bring
operators of their own. B batch, T time, H query heads, K key/value heads, D head width.
"""

import importlib.util
from functools import lru_cache

import torch


@lru_cache
def flash_function(capability: tuple[int, int]):
    """flash(q, k, v, window) of the newest flash-attn that is installed and runs at this compute capability, or None.

    q: (B, T, H, D), k and v: (B, T, K, D), bfloat16 or float16 -> (B, T, H, D).
    """
    if capability >= (9, 0) and (interface := _module("flash_attn.cute.interface")):
        return _version_4(interface)
    if capability[0] == 9 and (interface := _module("flash_attn_interface")):
        return _with_own_operators(interface)
    if capability >= (8, 0) and (interface := _module("flash_attn.flash_attn_interface")):
        return _with_own_operators(interface)
    return None


def _module(name):
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):  # not installed
            return None
        reason = error
    except Exception as error:  # a library that does not suit the others may fail in any way
        reason = error
    print(f"{name} is installed and cannot be used: {type(reason).__name__}: {reason}", flush=True)
    return None


@lru_cache
def _version_4(interface):
    """Its forward pass gives more than two values, of which the first are the output and the log of the sums, (B, H, T)
    float32; the operators promise contiguous tensors that share no memory with their inputs."""

    @torch.library.custom_op("nanochat::flash_forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = interface._flash_attn_fwd(q, k, v, return_lse=True, **_left(window, q.size(1)))[:2]
        return out, sums

    @forward.register_fake
    def _(q, k, v, window):
        batch, length, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)

    @torch.library.custom_op("nanochat::flash_backward", mutates_args=())
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        sums: torch.Tensor,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
        grads = interface._flash_attn_bwd(q, k, v, out, grad, sums, **_left(window, q.size(1)))
        return tuple(grads[:3])

    @backward.register_fake
    def _(grad, q, k, v, out, sums, window):
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def keep(ctx, inputs, output):
        *qkv, ctx.window = inputs
        ctx.save_for_backward(*qkv, *output)

    def gradients(ctx, grad, grad_sums):
        return *backward(grad, *ctx.saved_tensors, ctx.window), None

    forward.register_autograd(gradients, setup_context=keep)
    return lambda q, k, v, window: forward(q, k, v, window)[0]


def _left(window, length):
    """All three versions count as we do: a window of w is a position itself and the w before it."""
    left = {} if window >= length - 1 else {"window_size_left": window, "window_size_right": 0}
    return {"causal": True, **left}


def _with_own_operators(interface):
    def flash(q, k, v, window):
        left = {} if window >= q.size(1) - 1 else {"window_size": (window, 0)}
        out = interface.flash_attn_func(q, k, v, causal=True, **left)
        return out[0] if isinstance(out, tuple) else out

    return flash if hasattr(getattr(interface, "_flash_attn_forward", None), "register_fake") else None
