"""Every attention backend is the same function: masked softmax attention, as written here in float64."""

import math

import pytest
import torch

from nanochat.attention import BACKENDS, attend, attend_cached, choose_backend, flash_function

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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_sdpa_is_masked_softmax_attention(shape):
    check_backend("sdpa", shape, torch.float64, CPU, 1e-12)


@pytest.mark.parametrize("name", ["window 3, one over", "grouped queries", "window over T", "large"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_sdpa_in_lower_precision(name, dtype, tolerance):
    check_backend("sdpa", SHAPES[name], dtype, CPU, tolerance)


@pytest.mark.parametrize("T", range(1, 24))
def test_sdpa_at_every_length_around_its_blocks(T):
    for window in (1, 2, 4, 5, 8, T - 1, T, T + 1):
        if window > 0:
            (q, k, v), _ = random_inputs((1, T, 1, 1, 4, window))
            assert difference(attend(q, k, v, window), naive_attention(q, k, v, window)) < 1e-12, window


def test_sdpa_takes_inputs_that_are_not_contiguous():
    (q, k, v), window = random_inputs(SHAPES["grouped queries"])
    scattered = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert difference(attend(*scattered, window), naive_attention(q, k, v, window)) < 1e-12


def test_memory_of_a_windowed_layer_grows_with_the_window_and_not_with_the_square_of_the_length():
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
        attend(q, k, v, window).sum().backward()
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


# -- the choice


def test_a_cpu_takes_sdpa():
    assert choose_backend(CPU, torch.float32) == "sdpa" and choose_backend(CPU, torch.bfloat16, "sdpa") == "sdpa"


@pytest.mark.parametrize("name", ["flash", "flex", "nonsense"])
def test_a_backend_that_is_forced_but_missing_is_an_error(name):
    with pytest.raises(SystemExit, match=f"(?s){name}.*sdpa"):
        choose_backend(CPU, torch.float32, name)


def test_backends_go_by_their_names():
    assert set(BACKENDS) == {"flash", "flex", "sdpa"}


# -- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["window 3, one over", "prime T", "grouped queries", "window over T", "large"])
def test_flex_is_masked_softmax_attention(name):
    B, T, H, K, _, window = SHAPES[name]
    shape = (B, T, H, K, 64, window)
    check_backend("flex", shape, torch.float32, torch.device("cuda"), 2e-3)
    check_backend("flex", shape, torch.bfloat16, torch.device("cuda"), 3e-2)


@pytest.mark.gpu
@cuda
@pytest.mark.skipif(flash_function() is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("name", ["window 3, one over", "prime T", "grouped queries", "window over T", "large"])
def test_flash_is_masked_softmax_attention(name):
    B, T, H, K, _, window = SHAPES[name]
    check_backend("flash", (B, T, H, K, 64, window), torch.bfloat16, torch.device("cuda"), 3e-2)
