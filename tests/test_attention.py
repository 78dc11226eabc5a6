"""Every attention backend is the same function: masked softmax attention, as written here in float64."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch

from nanochat import attention, attention_blocked, attention_flash
from nanochat.attention import BACKENDS, attend, attend_cached, available_backends, choose_backend, prepare
from nanochat.attention_flash import flash_function
from nanochat.compilation import compile_function
from nanochat.runtime import Runtime

CPU = torch.device("cpu")

# B, T, H, K, D, window
SHAPES = {
    "one position": (2, 1, 2, 2, 8, 4),
    "two positions, window 1": (1, 2, 1, 1, 8, 1),
    "window 1": (2, 7, 2, 2, 8, 1),
    "window 1, even T": (1, 8, 2, 2, 8, 1),
    "window 3, blocks that do not fit": (2, 17, 2, 2, 8, 3),
    "window 3, blocks that fit": (1, 18, 2, 2, 8, 3),
    "window 3, one over": (1, 19, 2, 2, 8, 3),
    "T is the window": (2, 9, 2, 2, 8, 9),
    "T is the window and one": (2, 10, 2, 2, 8, 9),
    "T is the window and two": (2, 11, 2, 2, 8, 9),
    "T is twice the window": (1, 18, 2, 2, 8, 9),
    "window over T": (2, 9, 2, 2, 8, 100),
    "window just under T": (1, 9, 2, 2, 8, 7),
    "prime T": (1, 53, 3, 3, 10, 6),
    "grouped queries": (2, 23, 4, 2, 8, 5),
    "grouped queries, all seen": (2, 23, 4, 2, 8, 40),
    "one key/value head": (2, 23, 3, 1, 6, 4),
    "large": (1, 200, 2, 1, 16, 64),
}


def naive_attention(q, k, v, window):
    """q: (B, T, H, D), k and v: (B, T, K, D) -> (B, T, H, D), a query at a time, in the dtype of its inputs."""
    group = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    outputs = []
    for t in range(q.size(1)):
        first = max(0, t - window)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first : t + 1]) / math.sqrt(q.size(-1))
        outputs.append(torch.einsum("bhs,bshd->bhd", scores.softmax(dim=-1), v[:, first : t + 1]))
    return torch.stack(outputs, dim=1)


def random_inputs(shape, dtype=torch.float64, device=CPU):
    B, T, H, K, D, window = shape
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64) for heads in (H, K, K)]
    return [x.to(device, dtype).requires_grad_() for x in inputs], window


def difference(found, expected):
    """The largest difference, relative to the largest value expected; found may lie on another device."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def check_backend(backend, shape, dtype, device, tolerance):
    inputs, window = random_inputs(shape, dtype, device)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = naive_attention(*exact, window)
    found = attend(*inputs, window, backend)
    assert found.shape == expected.shape and found.dtype == dtype
    assert difference(found, expected) < tolerance
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(upstream)
    found.backward(upstream.to(device, dtype))
    for name, x, y in zip("qkv", inputs, exact, strict=True):
        if y.grad.abs().max() < 1e-12:  # a single position: its weight is 1, whatever q and k are
            assert x.grad.abs().max() < tolerance, name
        else:
            assert difference(x.grad, y.grad) < 2 * tolerance, name


on_cpu = pytest.mark.parametrize("backend", ["sdpa", "blocked"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small shapes have several."""
    monkeypatch.setattr(attention_blocked, "BLOCK", 5)


@on_cpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_backend_is_masked_softmax_attention(backend, shape):
    check_backend(backend, shape, torch.float64, CPU, 1e-12)


@on_cpu
@pytest.mark.parametrize("name", ["window 3, one over", "grouped queries", "window over T", "large"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(backend, name, dtype, tolerance):
    check_backend(backend, SHAPES[name], dtype, CPU, tolerance)


@on_cpu
@pytest.mark.parametrize("T", range(1, 24))
def test_every_length_around_the_blocks(backend, T):
    for window in (1, 2, 4, 5, 8, T - 1, T, T + 1):
        if window > 0:
            (q, k, v), _ = random_inputs((1, T, 1, 1, 4, window))
            assert difference(attend(q, k, v, window, backend), naive_attention(q, k, v, window)) < 1e-12, window


@on_cpu
def test_inputs_that_are_not_contiguous(backend):
    (q, k, v), window = random_inputs(SHAPES["grouped queries"])
    scattered = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert difference(attend(*scattered, window, backend), naive_attention(q, k, v, window)) < 1e-12


def test_large_logits_keep_their_precision_in_bfloat16():
    """Rounded to bfloat16, logits near 100 would be wrong by a half, and their shares by a half again."""
    (q, k, v), window = random_inputs((1, 40, 1, 1, 16, 40), torch.bfloat16)
    q, k = q.detach() * 5, k.detach() * 5
    expected = naive_attention(q.double(), k.double(), v.double(), window)
    assert difference(attend(q, k, v, window, "blocked"), expected) < 2e-2


def test_gradients_of_sharp_attention_in_bfloat16():
    """Each query all but takes the value of one key; what it says of the others is the difference of near equals. With
    that difference in bfloat16 the error was 0.7 (torch's own kernel: 0.25), and looking up was learned by luck."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 32, 1, 64, generator=generator, dtype=torch.float64)
    q, v = 1.2 * k, torch.randn(1, 32, 1, 64, generator=generator, dtype=torch.float64) + 3
    upstream = torch.randn(1, 32, 1, 64, generator=generator, dtype=torch.float64).bfloat16()
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = torch.autograd.grad(attend(*inputs, 32, "blocked"), inputs, upstream)
    expected = torch.autograd.grad(naive_attention(*exact, 32), exact, upstream.double())
    for name, x, y in zip("qkv", found, expected, strict=True):
        assert ((x.double() - y).norm() / y.norm()) < 0.05, name


@on_cpu
def test_memory_of_a_windowed_layer_grows_with_the_window_and_not_with_the_square_of_the_length(backend):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    T, window = 2048, 16
    (q, k, v), _ = random_inputs((1, T, 1, 1, 8, window))
    with Largest() as watch:
        attend(q, k, v, window, backend).sum().backward()
    assert watch.numel <= 4 * T * window


def test_cached_attention_sees_what_its_mask_says():
    (q, _, _), _ = random_inputs((2, 3, 4, 2, 8, 1))
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(2, 2, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, 3, 7, generator=generator) < 0.5
    mask[..., 0] = True
    found = attend_cached(q, k, v, mask)
    assert found.shape == q.shape
    for b in range(2):
        for t in range(3):
            seen = mask[b, 0, t]
            for h in range(4):
                share = (k[b, h // 2, seen] @ q[b, t, h] / math.sqrt(8)).softmax(dim=0)
                assert difference(found[b, t, h], share @ v[b, h // 2, seen]) < 1e-12


# -- compiled


def compiles_whole(function, *inputs):
    """function under a compiler that takes no break of the graph: its value and its gradients."""
    out = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)(*inputs)
    return out, torch.autograd.grad(out.sum(), inputs[:3])


@on_cpu
def test_a_backend_compiles_without_a_break(backend):
    (q, k, v), window = random_inputs(SHAPES["grouped queries"])
    out, grads = compiles_whole(lambda q, k, v: attend(q, k, v, window, backend), q, k, v)
    assert torch.allclose(out, attend(q, k, v, window, backend))
    for found, expected in zip(
        grads, torch.autograd.grad(naive_attention(q, k, v, window).sum(), (q, k, v)), strict=True
    ):
        assert torch.allclose(found, expected)


def test_flex_compiles_with_masks_made_beforehand(monkeypatch):
    """On a CPU torch has its forward pass only."""
    monkeypatch.setattr(attention, "FLEX_MASKS", {})
    for name in ("window 3, one over", "grouped queries", "window over T", "large"):
        (q, k, v), window = random_inputs(SHAPES[name], torch.float32)
        prepare("flex", q.size(1), [window, q.size(1)], CPU)
        assert len(attention.FLEX_MASKS) >= 2
        with torch.no_grad():
            q, k, v = q.detach(), k.detach(), v.detach()
            run = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
            found = run(q, k, v, window, "flex")
            assert difference(found, naive_attention(q.double(), k.double(), v.double(), window)) < 1e-5, name
            assert difference(attend(q, k, v, window, "flex"), found) < 1e-5  # uncompiled, it is sdpa


class StandIn:
    """flash-attn 4 as far as we call it, written out: the same names, arguments and kinds of tensors."""

    calls = 0

    def _flash_attn_fwd(self, q, k, v, causal, return_lse, window_size_left=None, window_size_right=None):
        self.calls += 1
        assert causal and return_lse and (window_size_right == 0 or window_size_left is None)
        window = q.size(1) if window_size_left is None else window_size_left
        return self.attention(q, k, v, window), torch.zeros(q.size(0), q.size(2), q.size(1)), None, None, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, causal, window_size_left=None, window_size_right=None):
        assert causal and all(x.is_contiguous() for x in (q, k, v, out, dout)) and lse.dtype == torch.float32
        window = q.size(1) if window_size_left is None else window_size_left
        group, scale = q.size(2) // k.size(2), q.size(-1) ** -0.5  # below autograd, so by hand
        keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
        distance = torch.arange(q.size(1)).unsqueeze(1) - torch.arange(q.size(1))
        scores = torch.einsum("bthd,bshd->bhts", q, keys) * scale
        shares = scores.masked_fill((distance < 0) | (distance > window), float("-inf")).softmax(dim=-1)
        of_shares = torch.einsum("bthd,bshd->bhts", dout, values)
        of_scores = shares * (of_shares - (shares * of_shares).sum(dim=-1, keepdim=True)) * scale
        of_keys = torch.einsum("bhts,bthd->bshd", of_scores, q)
        of_values = torch.einsum("bhts,bthd->bshd", shares, dout)
        return (
            torch.einsum("bhts,bshd->bthd", of_scores, keys),
            *(x.unflatten(2, (-1, group)).sum(dim=3) for x in (of_keys, of_values)),
            None,
        )

    @staticmethod
    def attention(q, k, v, window):
        return naive_attention(q, k, v, window)


@pytest.mark.parametrize("name", ["window 3, one over", "grouped queries", "window over T"])
def test_flash_attn_4_is_an_operator_with_a_gradient(name, monkeypatch):
    interface = StandIn()
    flash = attention_flash._version_4(interface)
    (q, k, v), window = random_inputs(SHAPES[name])
    expected = naive_attention(q, k, v, window)
    expected_grads = torch.autograd.grad(expected.sum(), (q, k, v))
    for out, grads in (
        (eager := flash(q, k, v, window), torch.autograd.grad(eager.sum(), (q, k, v))),
        compiles_whole(lambda q, k, v: flash(q, k, v, window), q, k, v),
    ):
        assert torch.allclose(out, expected)
        assert all(torch.allclose(*pair) for pair in zip(grads, expected_grads, strict=True))
    assert interface.calls == 2
    # as it is chosen by name: the function must be found before the graph is made
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "flash_function", lambda capability: flash)
    monkeypatch.setattr(attention, "FLASH", {})
    prepare("flash", q.size(1), [window], q.device)
    out, _ = compiles_whole(lambda q, k, v: attend(q, k, v, window, "flash"), q, k, v)
    assert torch.allclose(out, expected)
    torch.library.opcheck(torch.ops.nanochat.flash_forward.default, (q.detach(), k.detach(), v.detach(), window))


# -- the choice


def machine(attention="", disabled=(), device=CPU, dtype=torch.float32):
    return Runtime(device, dtype, attention=attention, disabled=disabled)


def test_a_cpu_takes_blocks():
    assert choose_backend(machine(), 64) == "blocked"
    assert choose_backend(machine("sdpa"), 64) == "sdpa"


def test_what_the_doctor_disabled_is_not_chosen_unless_forced():
    assert choose_backend(machine(disabled=("blocked",)), 64) == "sdpa"
    assert choose_backend(machine("blocked", ("blocked",)), 64) == "blocked"


@pytest.mark.parametrize("name", ["flash", "flex", "nonsense"])
def test_a_backend_that_is_forced_but_missing_is_an_error(name):
    with pytest.raises(SystemExit, match=f"(?s){name}.*sdpa"):
        choose_backend(machine(name), 64)


@pytest.mark.parametrize(
    "capability, dtype, head_dim, has_flash, first",
    [
        ((9, 0), torch.bfloat16, 128, True, "flash"),
        ((9, 0), torch.bfloat16, 128, False, "flex"),
        ((9, 0), torch.float32, 128, True, "flex"),
        ((9, 0), torch.bfloat16, 12, True, "flex"),
        ((9, 0), torch.bfloat16, 256, True, "flex"),
        ((7, 5), torch.float32, 64, False, "flex"),
    ],
)
def test_a_gpu_takes_flash_where_it_can(capability, dtype, head_dim, has_flash, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "missing_compiler", lambda device: "")
    monkeypatch.setattr(attention, "flash_function", lambda capability: (lambda: None) if has_flash else None)
    assert available_backends(torch.device("cuda"), dtype, head_dim)[0] == first
    assert "flex" not in available_backends(torch.device("cuda"), dtype, head_dim, disabled=("compile",))


def test_flash_attn_4_is_not_taken_where_its_backward_pass_refuses(monkeypatch):
    package, cute, interface = (types.ModuleType(name) for name in ("flash_attn", "cute", "interface"))
    package.cute, cute.interface, package.__path__, cute.__path__ = cute, interface, [], []
    interface._flash_attn_fwd = interface._flash_attn_bwd = None
    for name, module in (("flash_attn", package), ("flash_attn.cute", cute), ("flash_attn.cute.interface", interface)):
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    flash_function.cache_clear()
    assert flash_function((8, 0)) is None and flash_function((9, 0)) is not None
    flash_function.cache_clear()


def test_a_flash_attn_that_does_not_suit_its_libraries_costs_a_line_and_not_the_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("raise AttributeError('no such kernel')")
    monkeypatch.syspath_prepend(tmp_path)
    flash_function.cache_clear()
    assert flash_function((10, 0)) is None
    assert "no such kernel" in capsys.readouterr().out
    flash_function.cache_clear()


def test_backends_go_by_their_names():
    assert set(BACKENDS) == {"flash", "flex", "blocked", "sdpa"}


# -- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
GPU_SHAPES = ["window 3, one over", "prime T", "grouped queries", "window over T", "large"]


def check_on_gpu(backend, name, dtype, tolerance):
    B, T, H, K, _, window = SHAPES[name]
    device = torch.device("cuda")
    inputs, _ = random_inputs((B, T, H, K, 64, window), dtype, device)
    prepare(backend, T, [window], inputs[0].device)
    found = compile_function(attend)(*inputs, window, backend)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = naive_attention(*exact, window)
    assert difference(found, expected) < tolerance
    found.sum().backward()
    expected.sum().backward()
    for x, y in zip(inputs, exact, strict=True):
        assert difference(x.grad, y.grad) < 2 * tolerance


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_flex_is_masked_softmax_attention(name):
    check_on_gpu("flex", name, torch.float32, 2e-3)
    check_on_gpu("flex", name, torch.bfloat16, 3e-2)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_flash_is_masked_softmax_attention(name):
    if flash_function(torch.cuda.get_device_capability()) is None:
        pytest.skip("flash-attn is not installed, or does not run on this GPU")
    check_on_gpu("flash", name, torch.bfloat16, 3e-2)
