"""Matrix products of linear layers in fp8, with one dynamic scale per tensor: e4m3 for activations and weights, e5m2
for gradients. For training on Hopper and later; evaluation, SFT and RL run without.

A layer keeps its float32 weight; only its product is swapped, so swapping out is free and exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanochat.runtime import Runtime

MULTIPLE, SMALLEST = 16, 128  # what the kernels take, and what is worth it
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def available(runtime: Runtime) -> bool:
    """Whether the device multiplies fp8 (compute capability 8.9 and later) and scripts.doctor did not object."""
    return not why_not(runtime)


def why_not(runtime: Runtime) -> str:
    if runtime.device.type != "cuda" or torch.cuda.get_device_capability(runtime.device) < (8, 9):
        return "this device does not multiply fp8"
    return "scripts.doctor found it wrong on this machine" if "fp8" in runtime.disabled else ""


def enable_where_possible(model: torch.nn.Module, runtime: Runtime) -> int:
    """Says what it does; the number of layers that multiply in fp8."""
    reason = why_not(runtime)
    count = 0 if reason else enable(model, head="fp8_head" not in runtime.disabled)
    runtime.print(f"--fp8: {reason}; training in {runtime.dtype}" if reason else f"fp8 in {count} linear layers")
    return count


def enable(model: torch.nn.Module, head: bool = True) -> int:
    """Let every linear layer whose two sides are multiples of 16 and at least 128 multiply in fp8; how many do. The
    head's product is part of the loss (losses.py) and may be left out.

    ValueError where rows of this model's length do not suit the kernels.
    """
    if model.config.sequence_len % MULTIPLE:
        raise ValueError(f"fp8 needs rows whose length is a multiple of {MULTIPLE}, not {model.config.sequence_len}")
    layers = [module for module in model.transformer.h.modules() if _fits(module)]
    for layer in layers:
        layer.product = fp8_linear
    model.loss_in_fp8 = head and _fits(model.lm_head)
    return len(layers) + model.loss_in_fp8


@contextmanager
def disabled(model: torch.nn.Module) -> Iterator[None]:
    """The model as it is without fp8, for evaluation. Does nothing when fp8 is off."""
    layers = [module for module in model.modules() if "product" in module.__dict__]
    for layer in layers:
        del layer.product
    try:
        yield
    finally:
        for layer in layers:
            layer.product = fp8_linear


def _fits(module: torch.nn.Module) -> bool:
    if not isinstance(module, torch.nn.Linear):
        return False
    sides = module.weight.shape
    return all(side % MULTIPLE == 0 and side >= SMALLEST for side in sides)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: (..., C), weight: (out, C) in the dtype of x -> (..., out)."""
    return _Fp8Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp8, saturating, and the float32 factor that undoes its scale."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().double().clamp(min=1e-12)
    scale = (largest / amax).float()
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def column_major(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


class Fp8Head:
    """As losses.Head. weight: (V, C) -> the products with it in fp8, and in dtype what comes out of them."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.weight, self.factor = quantize(weight.to(dtype), E4M3)
        self.columns = column_major(self.weight)
        self.dtype = dtype

    def product(self, x):
        x8, factor = quantize(x, E4M3)
        return torch._scaled_mm(x8, self.weight.t(), factor, self.factor, out_dtype=self.dtype, use_fast_accum=True)

    def grad_x(self, grad):
        g8, factor = quantize(grad, E5M2)
        return torch._scaled_mm(g8, self.columns, factor, self.factor, out_dtype=self.dtype)

    def add_grad_weight(self, total, grad, x):
        (g8, g_factor), (x8, x_factor) = quantize(grad, E5M2), quantize(x, E4M3)
        total += torch._scaled_mm(g8.t().contiguous(), column_major(x8), g_factor, x_factor, out_dtype=self.dtype)


class _Fp8Linear(torch.autograd.Function):
    """The three products of a linear layer; the backward pass uses the fp8 copies of the forward pass again."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_factor = quantize(x, E4M3)
        w8, w_factor = quantize(weight, E4M3)
        ctx.save_for_backward(x8, x_factor, w8, w_factor)
        # the kernel takes a row-major left and a column-major right side
        return torch._scaled_mm(x8, w8.t(), x_factor, w_factor, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        x8, x_factor, w8, w_factor = ctx.saved_tensors
        g8, g_factor = quantize(grad, E5M2)
        options = dict(out_dtype=grad.dtype, use_fast_accum=False)
        grad_x = torch._scaled_mm(g8, column_major(w8), g_factor, w_factor, **options)
        grad_w = torch._scaled_mm(g8.t().contiguous(), column_major(x8), g_factor, x_factor, **options)
        return grad_x, grad_w
