"""Every part that computes, compared with float64 on the CPU: what scripts.doctor runs. Each check gives its error, the
error that is tolerated, and its time where there is something to choose."""

import math
import statistics
import time

import torch
import torch.nn.functional as F

from nanochat import attention, fp8, runtime
from nanochat.compilation import compile_function, compiled
from nanochat.decoding import Decoder, inference_copy
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache, Pass
from nanochat.losses import cross_entropy
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.runtime import Runtime, missing_compiler
from nanochat.training_step import optimizer_step


def check_names(machine: Runtime) -> list[str]:
    backends = attention.available_backends(machine.device, machine.dtype, head_dim=128)
    names = ["rates", *backends, "loss", "optimizer", "decoding"]
    if machine.device.type == "cuda":
        names.append("graphs")
    if not missing_compiler(machine.device):
        names.append("compile")
    if fp8.available(Runtime(machine.device, machine.dtype)):
        names += ["fp8", "fp8_head"]
    return names


def tolerance(machine: Runtime) -> float:
    """The largest error, relative to the largest value that is right. float32 products are TF32 on GPUs."""
    of_float32 = 1e-2 if machine.device.type == "cuda" else 1e-3
    return {torch.float32: of_float32, torch.bfloat16: 4e-2, torch.float16: 1e-2}[machine.dtype]


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, relative to the largest value that is right; of NaN, infinite."""
    right = right.detach()
    largest = (found.detach().cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float(largest) if math.isfinite(largest) else 1e30


def milliseconds(work, machine: Runtime, repeats: int = 5) -> float:
    """The median of several rounds; on a GPU of ten calls each, so that it and not Python is measured."""
    calls = 10 if machine.device.type == "cuda" else 1
    work()  # warm
    seconds = []
    for _ in range(repeats):
        machine.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        machine.synchronize()
        seconds.append((time.perf_counter() - begin) / calls)
    return 1000 * statistics.median(seconds)


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(machine: Runtime, *tensors) -> tuple[list, list]:
    """The tensors on the device in its dtype, and the same numbers in float64: the rounding of what a part is given is
    not its fault."""
    rounded = [tensor.to(machine.dtype) for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    return [tensor.to(machine.device).requires_grad_() for tensor in rounded], exact


def check_rates(machine):
    """Matrix products and copies: what all the rest is measured by."""
    gpu = machine.device.type == "cuda"
    side, megabytes = (8192, 1024) if gpu else (1024, 64)
    a, b = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    source = torch.empty(megabytes << 18, device=machine.device)
    target = torch.empty_like(source)
    found = {
        "tflops": round(2 * side**3 / milliseconds(lambda: a @ b, machine) / 1e9, 3),
        "gb_per_s": round(2 * source.nbytes / milliseconds(lambda: target.copy_(source), machine) / 1e6, 1),
    }
    peak = runtime.peak_flops(machine.device)
    return found | ({"peak_tflops": peak / 1e12} if peak else {})


def check_attention(backend, machine):
    """Against masked softmax attention: odd lengths, grouped queries, windows; then its time, full and windowed."""
    largest = 0.0
    gpu = machine.device.type == "cuda"
    compiles = gpu and not missing_compiler(machine.device)
    run = compile_function(attention.attend) if compiles else attention.attend
    for T, heads, kv_heads, D, window in ((701, 2, 2, 128, 200), (300, 4, 2, 64, 300)):
        shapes = ((2, T, heads, D), (2, T, kv_heads, D), (2, T, kv_heads, D))
        inputs, exact = given(machine, *(random(*shape, seed=n) for n, shape in enumerate(shapes)))
        upstream = random(2, T, heads, D, seed=9).to(machine.dtype)
        right = masked_attention(*exact, window)
        right.backward(upstream.double())
        attention.prepare(backend, T, [window], machine.device)
        out = run(*inputs, window, backend)
        out.backward(upstream.to(machine.device))
        pairs = [(out, right), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
        largest = max(largest, *(error(*pair) for pair in pairs))
    found = {"error": largest, "tolerance": tolerance(machine)}
    for T, rows in ((2048, 16), (8192, 4)) if gpu else ((512, 4),):
        inputs, _ = given(machine, *(random(rows, T, 6, 128 if gpu else 64, seed=n) for n in range(3)))
        upstream = torch.ones_like(inputs[0])
        attention.prepare(backend, T, [T // 4, T], machine.device)
        for window, key in ((T, f"ms_full_{T}"), (T // 4, f"ms_window_{T}")):

            def both(window=window, inputs=inputs, upstream=upstream):
                torch.autograd.grad(run(*inputs, window, backend), inputs, upstream)

            found[key] = round(milliseconds(both, machine), 3)
    T = 2048 if gpu else 512
    found["ms"] = round(found[f"ms_full_{T}"] + 3 * found[f"ms_window_{T}"], 3)  # as in SSSL
    return found


def masked_attention(q, k, v, window):
    """As it is defined. q: (B, T, H, D), k and v: (B, T, K, D)."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    distance = torch.arange(q.size(1)).unsqueeze(1) - torch.arange(q.size(1))
    mask = (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def loss_inputs(N=256, C=256, V=512):
    targets = torch.randint(0, V - 7, (N,), generator=torch.Generator().manual_seed(3))
    targets[::5] = -1
    return random(N, C), random(V, C, seed=1) / 4, targets


def plain_loss(x, weight, targets, vocab_size):
    logits = 15 * torch.tanh((x @ weight.T)[:, :vocab_size] / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def compiling(machine) -> dict:
    """The loss as it trains on this machine: compiled on GPUs."""
    gpu = machine.device.type == "cuda" and not missing_compiler(machine.device)
    return {"compile_function": compile_function} if gpu else {}


def check_loss(machine, in_fp8=False):
    x, weight, targets = loss_inputs()
    vocab_size = weight.size(0) - 7
    (x, weight), exact = given(machine, x, weight)
    inputs = [x, weight.detach().float().requires_grad_()]
    right = plain_loss(*exact, targets, vocab_size)
    right.backward()
    found = cross_entropy(*inputs, targets.to(machine.device), vocab_size, 15.0, "sum", in_fp8, **compiling(machine))
    found.backward()
    errors = [error(found, right), *(error(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    return {"error": max(errors), "tolerance": 0.2 if in_fp8 else tolerance(machine)}


def small_model(dtype, device, seed=0, heads=(4, 2)) -> GPT:
    """Nothing in it is zero, as it would be after initialization."""
    model = GPT(GPTConfig(256, 512, 3, *heads, 256, "L"), dtype, "sdpa").to(device)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model


def twins(machine, heads=(4, 2)):
    """The same model in float64 on the CPU and as it trains here."""
    model = small_model(machine.dtype, machine.device, heads=heads)
    exact = GPT(model.config, torch.float64, "sdpa").double()
    exact.load_state_dict({name: value.cpu().double() for name, value in model.state_dict().items()})
    idx = torch.randint(0, 512, (2, 257), generator=torch.Generator().manual_seed(1))
    return exact, model, idx


def check_optimizer(machine):
    """A step from equal gradients: what every parameter moved by."""
    exact, model, _ = twins(machine)
    moved = []
    for twin in (exact, model):
        groups = param_groups(twin.roles(), 256)
        device = next(twin.parameters()).device
        precision = torch.float64 if twin is exact else orthogonalization_dtype(device, machine.dtype)
        optimizer = MuonAdamW(groups, dtype=precision)
        before = [parameter.detach().cpu().double().clone() for parameter in twin.parameters()]
        for n, parameter in enumerate(twin.parameters()):
            parameter.grad = random(*parameter.shape, seed=n).to(parameter)
        optimizer.step()
        moved.append([p.detach().cpu().double() - old for p, old in zip(twin.parameters(), before, strict=True)])
    errors = [(x - y).norm() / y.norm() for y, x in zip(*moved, strict=True)]
    # bfloat16 tables move by whole roundings of themselves; so does what is orthogonalized in bfloat16
    rounded = torch.bfloat16 in (machine.dtype, precision)
    return {"error": float(max(errors)), "tolerance": 0.2 if rounded else 1e-2}


def check_decoding(machine):
    """Logits by chunks through the cache, and by one pass."""
    exact, model, idx = twins(machine)
    with torch.no_grad():
        right = exact(idx[:, :64])
        cache = KVCache(model.config, 2, 64, machine.dtype, machine.device)
        found = []
        for begin, end in ((0, 40), (40, 41), (41, 42), (42, 64)):
            reading = Pass(cache, [(row, idx[row, begin:end].tolist()) for row in range(2)])
            found.append(model(reading.idx, cache=reading).view(2, end - begin, -1))
            reading.end()
    return {"error": error(torch.cat(found, dim=1), right), "tolerance": 2 * tolerance(machine)}


def check_graphs(machine):
    """Logits of single tokens from the decoder of fixed shapes, recorded on GPUs and there compiled, too, in rows of
    different lengths; then the time of a step."""
    exact, model, idx = twins(machine, heads=(2, 2))
    begun, steps, found = (40, 50, 1), 14, {}
    idx = idx[[0, 1, 0]]
    compiles = machine.device.type == "cuda" and not missing_compiler(machine.device)
    with torch.no_grad():
        right = exact(idx[:, :64])
        right = torch.stack([right[row, end : end + steps] for row, end in enumerate(begun)], dim=1)
        errors = []
        for name in ("ms", "ms_compiled") if compiles else ("ms",):
            cache = KVCache(model.config, 9, 64, machine.dtype, machine.device)
            decoder, logits = Decoder(inference_copy(model), cache, name == "ms_compiled"), []
            reading = Pass(cache, [(row, idx[row, :end].tolist()) for row, end in enumerate(begun)])
            model.hidden(reading.idx, reading)
            reading.end()
            for t in range(steps):
                ids = [int(idx[row, end + t]) for row, end in enumerate(begun)]
                logits.append(decoder([0, 1, 2], ids).cpu())
            errors.append(error(torch.stack(logits), right))
            decoder([3], [1])

            def step(decoder=decoder, cache=cache):
                cache.lengths[3] = 9
                return decoder([3], [1]).argmax(dim=-1).tolist()

            found[f"{name}_step"] = round(milliseconds(step, machine), 3)
    return {"error": max(errors), "tolerance": 2 * tolerance(machine), **found}


def check_compile(machine):
    """The losses of three training steps, compiled and not."""
    losses, times = [], []
    idx = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(1)).to(machine.device)
    for compiles in (False, True):
        model = small_model(machine.dtype, machine.device)
        optimizer = MuonAdamW(param_groups(model.roles(), 256), compiles=compiles)
        run = compiled(model, compiles)

        def step(run=run, optimizer=optimizer):
            return optimizer_step(run, optimizer, (idx[:, :-1], idx[:, 1:]), DeviceBatch(4, machine), machine).loss

        begin = time.perf_counter()
        losses.append(torch.tensor([step() for _ in range(3)], dtype=torch.float64))
        times.append(time.perf_counter() - begin)
    return {
        "error": error(*losses[::-1]),
        "tolerance": tolerance(machine),
        "seconds_to_compile": round(times[1], 1),
    }


def check_fp8(machine):
    """A linear layer, forward and backward; its time, and without."""
    x, weight, upstream = random(512, 256), random(384, 256, seed=1) / 16, random(512, 384, seed=2)
    inputs, exact = given(machine, x, weight)
    upstream = upstream.to(machine.dtype)
    right = F.linear(*exact)
    right.backward(upstream.double())
    linear = fp8.fp8_linear if missing_compiler(machine.device) else compile_function(fp8.fp8_linear)
    out = linear(*inputs)
    out.backward(upstream.to(machine.device))
    errors = [error(out, right), *(error(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    (x, weight), _ = given(machine, random(8192, 1536), random(6144, 1536, seed=1))

    def both(product):
        return lambda: product(x, weight).sum().backward()

    times = {"ms_fp8": milliseconds(both(linear), machine), "ms_bf16": milliseconds(both(F.linear), machine)}
    return {"error": max(errors), "tolerance": 0.2, **{key: round(value, 3) for key, value in times.items()}}


def check_fp8_head(machine):
    found = check_loss(machine, in_fp8=True)
    x, weight = random(8192, 1536), random(32768, 1536, seed=1) / 40
    x, weight = x.to(machine.device, machine.dtype).requires_grad_(), weight.float().to(machine.device).requires_grad_()
    targets = torch.randint(0, 32768, (8192,), device=machine.device)

    def both(in_fp8):
        return lambda: cross_entropy(x, weight, targets, 32768, 15.0, "sum", in_fp8, **compiling(machine)).backward()

    times = {"ms": milliseconds(both(True), machine), "ms_without": milliseconds(both(False), machine)}
    return found | {key: round(value, 3) for key, value in times.items()}


CHECKS = {
    "rates": check_rates,
    **{name: (lambda machine, name=name: check_attention(name, machine)) for name in attention.BACKENDS},
    "loss": check_loss,
    "optimizer": check_optimizer,
    "decoding": check_decoding,
    "graphs": check_graphs,
    "compile": check_compile,
    "fp8": check_fp8,
    "fp8_head": check_fp8_head,
}
