"""What is compiled computes the same, breaks no graph, and is not compiled again."""

from unittest.mock import MagicMock

import pytest
import torch
from helpers import CPU, optimizer_of, random_model, small_config

from nanochat import compilation, optim, runtime, train
from nanochat.compilation import compiled, will_compile
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW, param_groups
from nanochat.progress import Progress
from nanochat.runtime import Runtime, missing_compiler


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled, by a compiler that makes no machine code of them."""
    seen, functions = [], {}

    def backend(graph, inputs):
        seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_function(function):
        if function not in functions:
            functions[function] = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
        return functions[function]

    torch._dynamo.reset()
    for module in (compilation, optim):
        monkeypatch.setattr(module, "compile_function", compile_function)
    return seen


def rows(vocab=96, length=24):
    idx = torch.randint(vocab, (3, length + 1), generator=torch.Generator().manual_seed(1))
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_a_compiled_model_is_the_model_and_layers_of_a_kind_share_their_code(graphs, backend):
    model = random_model(small_config(96, 24, n_layer=9, window_pattern="SSSL"))
    model.attention_backend = backend
    run = compiled(model, True)
    assert compiled(model, False) is model
    losses, grads = [], []
    for forward in (model, run):
        loss = forward(*rows(), loss_reduction="sum")
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.allclose(*losses)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*grads, strict=True))
    assert len(graphs) <= 4 + 1  # with and without value embedding, short and long window; the loss
    count = len(graphs)
    run(*rows(), loss_reduction="sum").backward()
    with torch.no_grad():
        assert torch.allclose(run(*rows(), loss_reduction="none"), model(*rows(), loss_reduction="none"))
    assert len(graphs) == count


def test_a_compiled_update_is_the_update_and_new_rates_do_not_compile_it_again(graphs):
    models = [random_model(small_config(96, 24, n_layer=2)) for _ in range(2)]
    optimizers = [
        MuonAdamW(param_groups(model.roles(), model.config.n_embd), compiles=compiles)
        for model, compiles in zip(models, (False, True), strict=True)
    ]
    counts = []
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.set_rates(1 / (step + 1), 0.85 + 0.01 * step, 1 - 0.1 * step)
            model(*rows(), loss_reduction="mean").backward()
            optimizer.step()
            optimizer.zero_grad()
        counts.append(len(graphs))
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-4)
    assert counts[0] > 5 and len(set(counts)) == 1


def test_where_nothing_can_compile_a_line_says_so(monkeypatch, capsys):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    assert not will_compile(0, CPU) and not will_compile(-1, CPU)

    def none():
        raise InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "apt install g++" in missing_compiler(torch.device("cpu"))
    assert not will_compile(1, CPU)
    assert capsys.readouterr().out.count("uncompiled") == 1
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not will_compile(-1, Runtime(torch.device("cuda"), torch.bfloat16))
    assert "Triton" in capsys.readouterr().out


def test_what_is_compiled_after_the_first_steps_is_told(monkeypatch, capsys):
    model = random_model(small_config(96, 24))
    compiled_so_far = iter(range(1000))  # something at every step
    monkeypatch.setattr(train, "times_compiled", lambda: next(compiled_so_far))
    saver = MagicMock(due=lambda step, last: False, news=lambda: [], heard=lambda news: None)
    train.train(
        model, optimizer_of(model), iter([rows()] * 12), Progress(), CPU, MagicMock(), saver, num_iterations=12,
        device_batch=DeviceBatch(3, CPU), on_nan="stop", describe=lambda step, seconds: {"train/tok_per_sec": 1.0},
        set_rates=lambda step: 1.0, measure=lambda *args: None, save=lambda *args: None, examine=lambda *args: None,
    )  # fmt: skip
    told = [line for line in capsys.readouterr().out.splitlines() if "compiled again" in line]
    assert [line.split(":")[0] for line in told] == ["step 10", "step 11"]  # those before are warm-up
