"""fp8 products: the arithmetic runs on the CPU too; speed and the kernels themselves need a GPU."""

import torch

from nanochat import fp8
from nanochat.gpt import GPT, GPTConfig


def test_quantize_uses_the_whole_range_and_undoes_its_scale():
    torch.manual_seed(0)
    for dtype, error in ((fp8.E4M3, 2**-4), (fp8.E5M2, 2**-3)):
        x = torch.randn(64, 64) * 1000
        q, factor = fp8.quantize(x, dtype)
        assert q.dtype == dtype and q.float().abs().max() == torch.finfo(dtype).max
        large = x.abs() > 1
        assert ((q.float() * factor - x).abs() <= error * x.abs() + 1e-3)[large].all()
    q, factor = fp8.quantize(torch.zeros(16, 16), fp8.E4M3)
    assert (q.float() * factor == 0).all()


def test_a_layer_in_fp8_is_near_the_layer_without_forward_and_backward():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(256, 128) / 11).to(torch.bfloat16).requires_grad_()
    y = fp8.fp8_linear(x, weight)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact_x, exact_w = x.detach().float(), weight.detach().float()
    flat = grad.float().flatten(0, 1)
    for found, exact in (
        (y, exact_x @ exact_w.T),
        (x.grad, grad.float() @ exact_w),
        (weight.grad, flat.T @ exact_x.flatten(0, 1)),
    ):
        assert ((found.float() - exact).norm() / exact.norm()) < 0.1


def test_only_wide_layers_are_swapped_and_evaluation_runs_without():
    model = GPT(GPTConfig(64, 300, 2, 2, 2, 128, "L"), torch.bfloat16)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    idx = torch.randint(0, 300, (2, 64))
    with torch.no_grad():
        before = model(idx)
        assert fp8.enable(model) == 2 * 6  # q, k, v, proj, fc, proj; not the gates, not the head
        with fp8.disabled(model):
            assert torch.equal(model(idx), before)
        inside = model(idx)
    assert not torch.equal(inside, before)
    assert (inside - before).norm() / before.norm() < 0.3
