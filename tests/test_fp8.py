"""fp8 products: the arithmetic runs on the CPU too; speed and the kernels themselves need a GPU."""

import pytest
import torch

from nanochat import fp8
from nanochat.compilation import compiled
from nanochat.gpt import GPT, GPTConfig
from nanochat.losses import cross_entropy


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
        assert fp8.enable(model, head=False) == 2 * 6  # q, k, v, proj, fc, proj; not the gates
        assert fp8.enable(model) == 2 * 6 + 1
        with fp8.disabled(model):
            assert torch.equal(model(idx), before)
        inside = model(idx)
    assert not torch.equal(inside, before)
    assert (inside - before).norm() / before.norm() < 0.3


def test_a_loss_in_fp8_is_near_the_loss_without_and_evaluation_does_not_take_it():
    torch.manual_seed(0)
    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(320, 128) / 5).requires_grad_()
    targets = torch.randint(0, 300, (64,))

    def run(in_fp8):
        loss = cross_entropy(x, weight, targets, 300, 15.0, "sum", in_fp8)
        return loss, *torch.autograd.grad(loss, (x, weight))

    for name, found, exact in zip(("loss", "x", "weight"), run(True), run(False), strict=True):
        assert not torch.equal(found, exact)
        assert ((found - exact).norm() / exact.norm()) < (0.01 if name == "loss" else 0.1), name
    assert (run(True)[2][300:] == 0).all()  # rows of padding
    with torch.no_grad():
        losses = [cross_entropy(x, weight, targets, 300, 15.0, "sum", in_fp8) for in_fp8 in (True, False)]
    assert torch.equal(*losses)


def test_rows_that_do_not_suit_the_kernels_are_an_error():
    with pytest.raises(ValueError, match="multiple of 16, not 60"):
        fp8.enable(GPT(GPTConfig(60, 300, 2, 2, 2, 128, "L")))


def test_fp8_compiles_without_a_break_and_not_again_after_an_evaluation(monkeypatch):
    counts = []

    def backend(graph, inputs):
        counts.append(1)
        return graph.forward

    monkeypatch.setattr("nanochat.compilation.compile_function", lambda function: functions[function.__name__])
    model = GPT(GPTConfig(64, 300, 2, 2, 2, 128, "L"), torch.bfloat16)
    model.init_weights()
    from nanochat.gpt import run_block
    from nanochat.losses import loss_and_gradients_of_chunk, losses_of_chunk

    functions = {
        function.__name__: torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        for function in (run_block, loss_and_gradients_of_chunk, losses_of_chunk)
    }
    fp8.enable(model)
    run = compiled(model, True)
    idx = torch.randint(0, 300, (2, 65))

    def step():
        run(idx[:, :-1], idx[:, 1:], loss_reduction="sum").backward()

    step()
    once = len(counts)
    assert once >= 3  # two kinds of layers, the loss
    with fp8.disabled(model), torch.no_grad():
        run(idx[:, :-1], idx[:, 1:], loss_reduction="none")
    step()
    assert len(counts) == once
