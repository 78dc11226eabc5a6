"""Does everything that nanochat needs compute the right numbers on this machine, and how fast? Every part is compared
with float64 on the CPU, in about a minute. What is wrong, or slower than its replacement, is disabled by name for this
machine; later runs say so and take the next best. The last line is JSON.

python -m scripts.doctor
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone

import torch
import torch.nn.functional as F

from nanochat import attention, fp8, paths, runtime
from nanochat.compilation import compile_function, compiled, missing_compiler
from nanochat.gpt import GPT, GPTConfig, KVCache
from nanochat.losses import cross_entropy
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.runtime import Runtime
from nanochat.training_step import optimizer_step

# What is done without where it fails. Anything else has no replacement.
REPLACED_BY = {
    "flash": "the next attention backend",
    "flex": "the next attention backend",
    "blocked": "the next attention backend",
    "compile": "uncompiled code",
    "fp8": "the usual dtype",
    "fp8_head": "the usual dtype in the loss",
}
PATIENCE = 240  # seconds that one check may take
MARGIN = 1.1  # slower by less than this is not slower
# Largest error, relative to the largest value that is right.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--checks", help="only these, by name, separated by commas; nothing is disabled then")
    add("--in-this-process", action="store_true", help=argparse.SUPPRESS)  # what the doctor starts for itself
    return parser.parse_args(argv)


def main(args):
    with runtime.stage(args.device_type, training=True) as machine:
        names = args.checks.split(",") if args.checks else check_names(machine)
        if unknown := set(names) - set(check_names(machine)):
            raise ValueError(f"--checks {','.join(unknown)}: here there are {', '.join(check_names(machine))}")
        if args.in_this_process:
            return run_checks(names, machine)
        print(f"{runtime.machine_key(machine.device)}, {machine.dtype}")
        flags = ["--in-this-process", "--device-type", machine.device.type, "--checks"]
        results = watch(names, [sys.executable, "-m", "scripts.doctor", *flags])
        disabled, broken = judge(results, by_speed=machine.device.type == "cuda")
        chosen = choices(machine, disabled)
        for name, reason in disabled.items():
            print(f"{name} is disabled on this machine ({reason}); in its place: {REPLACED_BY[name]}")
        for name in broken:
            print(f"{name} is wrong here, and nothing replaces it: do not train on this machine")
        for what, why in chosen.items():
            print(f"{what}: {why}")
        if not args.checks:
            remember(machine, disabled, results)
        said = {"ok": not broken, "disabled": disabled, "broken": broken, "chosen": chosen, "checks": results}
        print(json.dumps(said))
    if broken:
        raise SystemExit(1)


# -- running the checks, each at the mercy of a kernel that may hang or take the process with it


def watch(names: list[str], command: list[str]) -> dict:
    """name -> what its check found. The checks run in a process of their own, the command with the names after it;
    where it dies, a new one goes on with the next."""
    results, remaining = {}, list(names)
    while remaining:
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen([*command, ",".join(remaining)], stdout=subprocess.PIPE, stderr=errors, text=True)
            clock = threading.Timer(PATIENCE, child.kill)
            clock.start()
            for line in child.stdout:
                if line.startswith("{"):
                    clock.cancel()
                    found = json.loads(line)
                    remaining.remove(found["check"])
                    results[found.pop("check")] = found
                    show(list(results)[-1], found)
                    clock = threading.Timer(PATIENCE, child.kill)
                    clock.start()
            clock.cancel()
            if remaining and child.wait() != RESTART:
                errors.seek(0)
                said = ([line for line in errors.read().splitlines() if line.strip()] or ["nothing said"])[-1]
                results[remaining[0]] = {"failed": f"the process ended with {child.returncode}: {said[:200]}"}
                show(remaining[0], results[remaining.pop(0)])
    return results


RESTART = 17  # the exit code of a process whose GPU answers no more


def run_checks(names: list[str], machine: Runtime) -> None:
    for name in names:
        try:
            found = CHECKS[name](machine)
        except Exception as error:  # whatever it is, it is what the doctor was called for
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(json.dumps({"check": name, **found}), flush=True)
        try:
            machine.synchronize()
        except RuntimeError:  # after some errors a CUDA process can do nothing more
            raise SystemExit(RESTART) from None


def show(name: str, found: dict) -> None:
    wrong = "failed" in found or found.get("error", 0) > found.get("tolerance", math.inf)
    numbers = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )
    print(f"  {'WRONG' if wrong else 'ok   '} {name:10} {numbers}", flush=True)


def judge(results: dict, by_speed: bool) -> tuple[dict, list]:
    """What is to be disabled, with the reason; and what is wrong without replacement. by_speed: also what is slower
    than its replacement, for devices that nobody else is using meanwhile."""
    disabled, broken = {}, []
    for name, found in results.items():
        if found.get("error", 0) > found.get("tolerance", math.inf):
            reason = f"error {found['error']:.2g}, at most {found['tolerance']:.2g} is expected"
        elif "failed" in found:
            reason = found["failed"]
        elif by_speed and found.get("ms", 0) > MARGIN * found.get("ms_without", math.inf):
            reason = f"{found['ms']:.1f} ms with it, {found['ms_without']:.1f} ms without"
        else:
            continue
        if name in REPLACED_BY:
            disabled[name] = reason
        else:
            broken.append(name)
    # of the attention backends that are right, the fastest; a small difference does not count
    right = {
        name: results[name]["ms"]
        for name in attention.BACKENDS
        if "ms" in results.get(name, {}) and name not in disabled
    }
    fastest = min(right, key=right.get, default=None)
    for name, ms in right.items():
        if name == fastest or not by_speed:
            break
        if ms > MARGIN * right[fastest]:
            disabled[name] = f"{ms:.1f} ms, {fastest} takes {right[fastest]:.1f} ms"
    return disabled, broken


def choices(machine: Runtime, disabled: dict) -> dict:
    """What later runs on this machine will take."""
    judged = Runtime(machine.device, machine.dtype, attention=machine.attention, disabled=tuple(disabled))
    lacking = missing_compiler(machine.device)
    backend = attention.choose_backend(judged, head_dim=128)
    return {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "orthogonalization": str(orthogonalization_dtype(machine.device, machine.dtype)).removeprefix("torch."),
        "attention": f"{backend}, "
        + ("by NANOCHAT_ATTENTION" if machine.attention else "the fastest that is right here"),
        "compile": "no: disabled"
        if "compile" in disabled
        else f"no: {lacking}"
        if lacking
        else "yes, on GPUs, or with --compile 1",
        "fp8": "no"
        if not fp8.available(judged)
        else "yes, with --fp8" + (", the head without" if "fp8_head" in disabled else ""),
    }


def remember(machine: Runtime, disabled: dict, results: dict) -> None:
    file = paths.machine_file()
    findings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    findings[runtime.machine_key(machine.device)] = {"checked": now, "disabled": disabled, "checks": results}
    paths.write_json(file, findings)
    print(f"kept in {file}")


# -- the checks


def check_names(machine: Runtime) -> list[str]:
    backends = attention.available_backends(machine.device, machine.dtype, head_dim=128)
    names = ["rates", *backends, "loss", "optimizer", "decoding"]
    if not missing_compiler(machine.device):
        names.append("compile")
    if fp8.available(Runtime(machine.device, machine.dtype)):
        names += ["fp8", "fp8_head"]
    return names


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, relative to the largest value that is right; of NaN, infinite."""
    right = right.detach()
    largest = (found.detach().cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float(largest) if math.isfinite(largest) else 1e30


def milliseconds(work, machine: Runtime, repeats: int = 7) -> float:
    work()  # warm
    seconds = []
    for _ in range(repeats):
        machine.synchronize()
        begin = time.perf_counter()
        work()
        machine.synchronize()
        seconds.append(time.perf_counter() - begin)
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
    compiles = backend == "flex" and not missing_compiler(machine.device)
    run = compile_function(attention.attend) if compiles else attention.attend
    for T, heads, kv_heads, D, window in ((257, 4, 2, 64, 100), (300, 2, 2, 128, 300)):
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
    found = {"error": largest, "tolerance": TOLERANCE[machine.dtype]}
    for T, rows in ((2048, 16), (8192, 4)) if machine.device.type == "cuda" else ((512, 4),):
        D = 128 if machine.device.type == "cuda" else 64
        inputs, _ = given(machine, *(random(rows, T, 6, D, seed=n) for n in range(3)))
        attention.prepare(backend, T, [T // 4, T], machine.device)
        for window, key in ((T, f"ms_full_{T}"), (T // 4, f"ms_window_{T}")):

            def both(window=window, inputs=inputs):
                run(*inputs, window, backend).sum().backward()

            found[key] = round(milliseconds(both, machine), 3)
    found["ms"] = sum(value for key, value in found.items() if key.startswith("ms_"))
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


def check_loss(machine, in_fp8=False):
    x, weight, targets = loss_inputs()
    vocab_size = weight.size(0) - 7
    (x, weight), exact = given(machine, x, weight)
    inputs = [x, weight.detach().float().requires_grad_()]
    right = plain_loss(*exact, targets, vocab_size)
    right.backward()
    found = cross_entropy(*inputs, targets.to(machine.device), vocab_size, 15.0, "sum", in_fp8)
    found.backward()
    errors = [error(found, right), *(error(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    return {"error": max(errors), "tolerance": 0.2 if in_fp8 else TOLERANCE[machine.dtype]}


def small_model(dtype, device, seed=0) -> GPT:
    """Nothing in it is zero, as it would be after initialization."""
    model = GPT(GPTConfig(256, 512, 4, 4, 2, 256, "SSL"), dtype, "sdpa").to(device)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model


def twins(machine):
    """The same model in float64 on the CPU and as it trains here."""
    model = small_model(machine.dtype, machine.device)
    exact = GPT(model.config, torch.float64, "sdpa").double()
    exact.load_state_dict({name: value.double().cpu() for name, value in model.state_dict().items()})
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
        before = [parameter.detach().double().cpu().clone() for parameter in twin.parameters()]
        for n, parameter in enumerate(twin.parameters()):
            parameter.grad = random(*parameter.shape, seed=n).to(parameter)
        optimizer.step()
        moved.append([p.detach().double().cpu() - old for p, old in zip(twin.parameters(), before, strict=True)])
    errors = [(x - y).norm() / y.norm() for y, x in zip(*moved, strict=True)]
    # bfloat16 tables move by whole roundings of themselves
    return {"error": float(max(errors)), "tolerance": 0.1 if machine.dtype == torch.bfloat16 else 1e-2}


def check_decoding(machine):
    """Logits by chunks through the cache, and by one pass."""
    exact, model, idx = twins(machine)
    with torch.no_grad():
        right = exact(idx[:, :64])
        cache = KVCache(model.config, 2, 64, machine.dtype, machine.device)
        found, idx = [], idx.to(machine.device)
        for begin, end in ((0, 40), (40, 41), (41, 42), (42, 64)):
            cache.begin(slice(0, 2), end - begin)
            found.append(model(idx[:, begin:end], cache=cache))
            cache.advance(idx[:, begin:end])
    return {"error": error(torch.cat(found, dim=1), right), "tolerance": 2 * TOLERANCE[machine.dtype]}


def check_compile(machine):
    """Three training steps as they are compiled, and as they are; the losses, and the time of a step."""
    losses, times = [], []
    backend = attention.choose_backend(Runtime(machine.device, machine.dtype, attention=machine.attention), 64)
    idx = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(1)).to(machine.device)
    for compiles in (False, True):
        model = small_model(machine.dtype, machine.device)
        model.attention_backend = backend
        optimizer = MuonAdamW(param_groups(model.roles(), 256), compiles=compiles)
        run = compiled(model, compiles)

        def step(run=run, optimizer=optimizer):
            return optimizer_step(run, optimizer, idx[:, :-1], idx[:, 1:], DeviceBatch(4, machine), machine).loss

        begin = time.perf_counter()
        losses.append(torch.tensor([step() for _ in range(3)], dtype=torch.float64))
        times.append(time.perf_counter() - begin)
    return {
        "error": error(*losses[::-1]),
        "tolerance": TOLERANCE[machine.dtype],
        "seconds_to_compile": round(times[1], 1),
    }


def check_fp8(machine):
    """A linear layer, forward and backward; its time, and without."""
    x, weight, upstream = random(512, 256), random(384, 256, seed=1) / 16, random(512, 384, seed=2)
    inputs, exact = given(machine, x, weight)
    upstream = upstream.to(machine.dtype)
    right = F.linear(*exact)
    right.backward(upstream.double())
    out = fp8.fp8_linear(*inputs)
    out.backward(upstream.to(machine.device))
    errors = [error(out, right), *(error(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    (x, weight), _ = given(machine, random(8192, 1536), random(6144, 1536, seed=1))

    def both(product):
        return lambda: product(x, weight).sum().backward()

    linear = compile_function(fp8.fp8_linear) if not missing_compiler(machine.device) else fp8.fp8_linear
    times = {"ms_fp8": milliseconds(both(linear), machine), "ms_bf16": milliseconds(both(F.linear), machine)}
    return {"error": max(errors), "tolerance": 0.2, **{key: round(value, 3) for key, value in times.items()}}


def check_fp8_head(machine):
    found = check_loss(machine, in_fp8=True)
    x, weight = random(8192, 1536), random(32768, 1536, seed=1) / 40
    x, weight = x.to(machine.device, machine.dtype).requires_grad_(), weight.float().to(machine.device).requires_grad_()
    targets = torch.randint(0, 32768, (8192,), device=machine.device)
    compiles = {} if missing_compiler(machine.device) else {"compile_function": compile_function}

    def both(in_fp8):
        return lambda: cross_entropy(x, weight, targets, 32768, 15.0, "sum", in_fp8, **compiles).backward()

    times = {"ms": milliseconds(both(True), machine), "ms_without": milliseconds(both(False), machine)}
    return found | {key: round(value, 3) for key, value in times.items()}


CHECKS = {
    "rates": check_rates,
    **{name: (lambda machine, name=name: check_attention(name, machine)) for name in attention.BACKENDS},
    "loss": check_loss,
    "optimizer": check_optimizer,
    "decoding": check_decoding,
    "compile": check_compile,
    "fp8": check_fp8,
    "fp8_head": check_fp8_head,
}


if __name__ == "__main__":
    main(parse_args())
