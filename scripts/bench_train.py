"""How fast the real model trains here: tokens a second, milliseconds by part, the share of what the machine can do. The
last line is JSON. With random rows it needs nothing but torch.

python -m scripts.bench_train --depth 12 --fp8
python -m scripts.bench_train --depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 8 --vocab-size 8192
python -m scripts.bench_train --depth 4 --against masked
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from nanochat import attention, fp8, memory, runtime
from nanochat.compilation import compiled, will_compile
from nanochat.gpt import build_model
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.scaling import add_model_flags, check_model_flags, model_config
from nanochat.training_step import optimizer_step

WARM_STEPS = 3  # compilation, cold caches
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024, "mps": 2048}  # of the matrices whose product is the machine's own rate


VARIANTS = {
    "masked": "attention with a T x T mask where there is a window",
    "plain-loss": "all logits at once in float32, their gradient by autograd",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--steps", type=int, default=20, help="timed ones")
    add("--data", default="random", metavar="random|CORPUS", help="random rows, or a tokenized corpus by its name")
    add("--vocab-size", type=int, default=32768, help="with the corpus, names the tokenizer")
    add_model_flags(parser)
    add("--device-batch-size", type=memory.row_count, help="rows at once, or auto (default: auto on GPUs, else 8)")
    add("--total-batch-size", type=int, default=-1, help="tokens a step (-1: one device batch a rank)")
    add("--fp8", action="store_true", help="matrix products in fp8 (Hopper and later)")
    add("--compile", type=int, default=-1, choices=[-1, 0, 1], help="torch.compile (-1: where it pays)")
    add("--seed", type=int, default=42)
    add("--variant", choices=VARIANTS, help="the same model with a part as one would write it first")
    add("--against", choices=VARIANTS, help="compare with that variant: speed and memory, in processes of their own")
    add("--trace", metavar="FILE", help="also write a trace of two steps for chrome://tracing or Perfetto")
    args = parser.parse_args(argv)
    check_model_flags(parser, args)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected 1 or more")
    return args


def main(args):
    if args.against:
        return print(json.dumps(compare(args)))
    with runtime.stage(args.device_type, training=True) as machine:
        machine.print(json.dumps(measure(args, machine)))


def compare(args) -> dict:
    """The benchmark between two runs of the variant, so that a drift of the machine shows; each in its own process, as
    the peak of memory is measured."""
    flags = {key: value for key, value in vars(args).items() if key not in ("against", "variant", "fp8", "trace")}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if value not in (None, "")]
    command = [sys.executable, "-m", "scripts.bench_train", *words, *["--fp8"] * args.fp8]
    runs = []
    for extra in ([f"--variant={args.against}"], [], [f"--variant={args.against}"]):
        said = subprocess.run([*command, *extra], check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(said.splitlines()[-1]))
    before, result, after = runs
    others = {key: (before[key] + after[key]) / 2 for key in ("tok_per_sec", "peak_memory_gb")}
    ratios = {
        "speed_ratio": round(result["tok_per_sec"] / others["tok_per_sec"], 3),
        "memory_ratio": round(result["peak_memory_gb"] / others["peak_memory_gb"], 3),
    }
    told = ("tok_per_sec", "peak_memory_gb", "matmul_tflops")
    variant_runs = [{key: run[key] for key in told} for run in (before, after)]
    return result | {"against": args.against, **ratios, "variant_runs": variant_runs}


def measure(args, machine) -> dict:
    T = args.max_seq_len
    config = model_config(args.depth, args.vocab_size, args.aspect_ratio, args.head_dim, T, args.window_pattern)
    compiles = will_compile(args.compile, machine)
    at_once = memory.choose_rows(args.device_batch_size, config, T, machine, compiles, default=8)
    total_batch_size = args.total_batch_size if args.total_batch_size > 0 else at_once * T * machine.world_size
    rows_per_step, device_batch = memory.split_batch(total_batch_size, T, at_once, machine)
    model = build_model(config, machine, args.seed)
    precision = orthogonalization_dtype(machine.device, machine.dtype)
    groups = param_groups(model.roles(), config.n_embd)
    optimizer = MuonAdamW(groups, machine.rank, machine.world_size, precision, compiles)
    in_fp8 = fp8.enable_where_possible(model, machine) if args.fp8 else 0
    if args.variant == "masked":
        attention.BACKENDS["masked"], model.attention_backend = masked_attention, "masked"
    elif args.variant == "plain-loss":
        model.loss = lambda *inputs, **options: plain_loss(model, *inputs)
    train_model = compiled(model, compiles)
    rows = read_rows(args, rows_per_step, machine)
    side = PRODUCT_SIDE[machine.device.type]
    factors = [torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2)]
    optimizer_seconds = []
    update = optimizer.step

    def timed_update():
        optimizer_seconds.append(timed(update, machine)[0])

    optimizer.step = timed_update
    data_seconds, step_seconds, rates, losses = [], [], [], []

    def step():
        seconds, (inputs, targets) = timed(lambda: next(rows), machine)
        data_seconds.append(seconds)
        seconds, outcome = timed(
            lambda: optimizer_step(train_model, optimizer, (inputs, targets), device_batch, machine), machine
        )
        step_seconds.append(seconds)
        losses.append(outcome.loss)

    begin = time.perf_counter()
    for number in range(WARM_STEPS + args.steps):
        step()
        if number == 0:
            first_step = time.perf_counter() - begin
        rates.append(2 * side**3 / timed(lambda: factors[0] @ factors[1], machine)[0])
    if args.trace:
        trace(step, args.trace, machine)
    data, seconds, update = (
        statistics.median(values[WARM_STEPS : WARM_STEPS + args.steps])
        for values in (data_seconds, step_seconds, optimizer_seconds)
    )
    tok_per_sec = total_batch_size / (data + seconds)
    achieved = tok_per_sec * model.flops_per_token() / machine.world_size
    rate, peak = statistics.median(rates[WARM_STEPS:]), runtime.peak_flops(machine.device)
    return {
        "tok_per_sec": round(tok_per_sec),
        "forward_backward_ms": round(1000 * (seconds - update), 2),
        "optimizer_ms": round(1000 * update, 2),
        "data_ms": round(1000 * data, 2),
        "mfu": round(achieved / peak, 4) if peak else None,
        "matmul_share": round(achieved / rate, 4),
        "achieved_tflops": round(achieved / 1e12, 4),
        "matmul_tflops": round(rate / 1e12, 4),
        "peak_memory_gb": round(machine.peak_memory() / 1e9, 3),
        "attention": model.attention_backend,
        "variant": args.variant,
        "compiled": train_model is not model,
        "fp8_layers": in_fp8,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "first_step_s": round(first_step, 2),
        "loss": round(losses[-1], 4),
        "depth": config.n_layer,
        "width": config.n_embd,
        "parameters": model.counts()["total"],
        "flops_per_token": model.flops_per_token(),
        "sequence_len": T,
        "window_pattern": config.window_pattern,
        "vocab_size": config.vocab_size,
        "device_batch_size": device_batch.rows,
        "total_batch_size": total_batch_size,
        "steps": args.steps,
        "data": args.data,
        "ranks": machine.world_size,
        "device": runtime.device_name(machine.device),
        "torch": torch.__version__,
    }


def masked_attention(q, k, v, window):
    distance = torch.arange(q.size(1), device=q.device).unsqueeze(1) - torch.arange(q.size(1), device=q.device)
    how = {"attn_mask": (distance >= 0) & (distance <= window)} if window < q.size(1) - 1 else {"is_causal": True}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


def plain_loss(model, x, targets, reduction):
    return F.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)


def timed(work, machine):
    machine.synchronize()
    begin = time.perf_counter()
    result = work()
    machine.synchronize()
    return time.perf_counter() - begin, result


def read_rows(args, rows_per_step, machine):
    """This rank's (inputs, targets) of each step, for ever."""
    if args.data != "random":
        return corpus_rows(args, rows_per_step, machine)
    generator = torch.Generator(machine.device).manual_seed(args.seed + machine.rank)
    shape = (rows_per_step // machine.world_size, args.max_seq_len + 1)

    def random_rows():
        while True:
            rows = torch.randint(args.vocab_size, shape, generator=generator, device=machine.device)
            yield rows[:, :-1], rows[:, 1:]

    return random_rows()


def corpus_rows(args, rows_per_step, machine):
    from nanochat import batches, dataset, paths
    from nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(paths.tokenizer_dir(f"{args.data}-{args.vocab_size}"))
    files = dataset.token_files(args.data, tokenizer.fingerprint, "train")
    batches.pack_shards(files, args.max_seq_len, machine)
    rows = batches.TextRows(files, args.max_seq_len, tokenizer.bos, tokenizer.vocab_size, args.seed)
    return batches.read_steps(rows, 0, rows_per_step, machine)


def trace(step, file, machine) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (machine.device.type == "cuda")
    with profile(activities=activities) as profiler:
        step()
        step()
    if machine.is_main:
        profiler.export_chrome_trace(file)
        sort_by = "self_cuda_time_total" if machine.device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    main(parse_args())
