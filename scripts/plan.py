"""What a run would be, before it is run: shape, tokens, steps, memory, time, dollars, from the scaling rules. With a
--gpu by name from a table, without it from timing this machine for about 20 seconds.

python -m scripts.plan                                      # what speedrun.sh would do here
python -m scripts.plan --hours 2 --gpus 8 --gpu h100        # the deepest speedrun of two hours
python -m scripts.plan --depth 12 --num-iterations 1000     # one run of base_train: it takes its flags that shape one
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanochat import forecast, fp8, machines, memory, runtime
from nanochat.compilation import will_compile
from nanochat.forecast_text import as_text
from nanochat.gpt import GPTConfig
from nanochat.probe import Speed, busy, probe
from nanochat.results import duration
from nanochat.runtime import Runtime
from nanochat.scaling import (
    Plan,
    add_horizon_flags,
    add_model_flags,
    check_model_flags,
    meta_model,
    shape_and_plan,
)

# Profile gpt2 of speedrun.sh, which is for eight GPUs and more; with fewer it trains what base_train makes of a depth.
GPT2_GPUS, GPT2_DEPTH, GPT2_RATIO = 8, 24, 8.0
RULE_RATIO = 10.5
SPEEDRUN_HOURS = 4  # of profile single
DEPTHS = range(64, 0, -2)  # among which --hours and --dollars choose
GOOD_ROWS = 4  # at once: a depth at which fewer fit is taken only where nothing else is left
FIRST_TIMED = {"cuda": 12, "cpu": 6, "mps": 8}  # the depth by whose speed the first guess is made
SHOWN_ROWS = 32
MOST_LAYERS = 1000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hours", type=float, help="the deepest model whose whole speedrun takes at most so many hours")
    add("--dollars", type=float, help="the same for so many dollars")
    add("--target", choices=["gpt2"], help="gpt2: depth 24 at ratio 8, CORE 0.2626 where GPT-2 has 0.2565")
    add("--gpu", help="a GPU by name, as h100 (default: this machine, timed)")
    add("--gpus", type=int, help="how many (default: those of this machine; 1 of a --gpu)")
    add("--price", type=float, help="dollars per GPU-hour, or hour of this machine (default: roughly, by name)")
    add("--json", action="store_true", help="one JSON object")
    # those of base_train
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--corpus", default="climbmix", help="which corpus it reads")
    add("--vocab-size", type=int, default=32768)
    add_model_flags(parser)
    add_horizon_flags(parser)
    add("--device-batch-size", type=memory.row_count, help="rows at once, or auto (default: auto on GPUs, else 32)")
    add("--fp8", action="store_true", help="matrix products in fp8 (Hopper and later)")
    add("--compile", type=int, default=-1, choices=[-1, 0, 1], help="torch.compile (-1: on GPUs)")
    parser.set_defaults(depth=None, target_param_data_ratio=None)
    args = parser.parse_args(argv)
    dials = [f"--{name}" for name in ("depth", "hours", "dollars", "target") if getattr(args, name) is not None]
    if len(dials) > 1:
        parser.error(f"{' and '.join(dials)} exclude each other")
    for name in ("hours", "dollars", "price", "gpus", "vocab_size", "target_param_data_ratio"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    for name in ("num_iterations", "total_batch_size", "target_flops"):
        value = getattr(args, name)
        if value != -1 and not 1 <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more, or -1")
    if args.depth and args.depth > MOST_LAYERS:
        parser.error(f"--depth is {args.depth}; expected {MOST_LAYERS} or fewer")
    if args.depth is not None:
        check_model_flags(parser, args)
    return args


def main(args):
    if args.gpu:
        try:
            found = by_name(args)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        with contextlib.redirect_stdout(sys.stderr), runtime.stage(args.device_type, training=True) as machine:
            found = by_timing(args, machine)
    print(json.dumps(found) if args.json else as_text(found))


# -- the machine, and the run


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for. Of its runtime count device type, dtype and ranks."""

    title: str
    gpus: int  # 0: a CPU
    runtime: Runtime
    memory: float  # bytes that one rank may fill
    compiles: bool
    has_fp8: bool
    price: float | None  # dollars an hour of all of it

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)


@dataclass(frozen=True)
class Run:
    args: argparse.Namespace
    config: GPTConfig
    plan: Plan
    rows_a_step: int
    rows: int  # on a device at once
    most_rows: int  # that fit there, 0 if not one does


def by_name(args) -> dict:
    device, there = machines.asked(args.gpu), args.gpus or 1
    gpus = power_of_two(there)
    machine = Machine(
        title=f"{gpus}{f' of {there}' * (there > gpus)} x {device.title} ({device.memory_gb} GB)",
        gpus=gpus,
        runtime=Runtime(torch.device("cuda"), torch.bfloat16, world_size=gpus),
        memory=device.memory_gb * 1e9,
        compiles=args.compile != 0,
        has_fp8=device.fp8,
        price=there * (args.price or device.dollars),
    )
    args, recipe = with_recipe(args, machine)

    def seconds(run):
        return run.plan.total_flops / (gpus * device.flops_per_second(run.config.n_layer, args.fp8))

    run = run_at(args.depth, args, machine) if args.depth else deepest(args, machine, seconds)
    return describe(run, machine, seconds(run), recipe, "by the table of GPUs, not timed")


def power_of_two(gpus: int) -> int:
    """Batches are powers of two, so the ranks are too: of seven GPUs speedrun.sh takes four."""
    return 1 << (gpus.bit_length() - 1)


def by_timing(args, here: Runtime) -> dict:
    on_gpu = here.device.type == "cuda"
    there = (args.gpus or torch.cuda.device_count()) if on_gpu else 0
    gpus = power_of_two(there) if there else 0
    if not on_gpu and args.gpus:
        raise ValueError(f"--gpus {args.gpus}: there is no NVIDIA GPU here; name one that is meant with --gpu, as h100")
    name = runtime.device_name(here.device)
    known = machines.find(name) if on_gpu else None
    price = args.price or (known.dollars if known else None)
    machine = Machine(
        title=f"{gpus}{f' of {there}' * (there > gpus)} x {name}" if on_gpu else name,
        gpus=gpus,
        runtime=replace(here, world_size=max(1, gpus)),
        memory=here.free_memory(),
        compiles=will_compile(args.compile, here),
        has_fp8=fp8.available(here),
        price=price and max(1, there) * price,
    )
    args, recipe = with_recipe(args, machine)
    shared = "" if on_gpu else busy()

    def time(run):
        rows = min(run.rows, max(1, run.most_rows))
        return probe(run.config, rows, here, machine.compiles, args.fp8)

    def by(speed: Speed):
        return lambda run: (
            run.plan.num_iterations * speed.step_seconds(run.config, run.plan.total_batch_size, machine.ranks)
        )

    if args.depth:
        run = run_at(args.depth, args, machine)
        speed = time(run)
    else:
        speed = time(run_at(FIRST_TIMED[here.device.type], args, machine))
        speed = time(deepest(args, machine, by(speed)))
        run = deepest(args, machine, by(speed))
    how = "timed here" if gpus < 2 else f"one GPU timed here, {gpus} taken to do {gpus} times as much"
    if speed.config != run.config:
        how += f", at depth {speed.config.n_layer} and width {speed.config.n_embd}, and scaled by FLOPs"
    if shared:
        how += f"; {shared}, alone it is faster"
        print(f"{shared}: time it again when it is free")
    return describe(run, machine, by(speed)(run), recipe, how)


def with_recipe(args, machine: Machine) -> tuple[argparse.Namespace, str]:
    """The flags with what speedrun.sh would choose in place of those that are not given, and words for it."""
    args = argparse.Namespace(**vars(args))
    if args.dollars:
        if not machine.price:
            raise ValueError(f"--dollars: nobody knows what an hour of {machine.title} costs; give --price")
        args.hours = args.dollars / machine.price
    if args.target or (machine.gpus >= GPT2_GPUS and not args.depth and not args.hours):
        args.depth = GPT2_DEPTH
    if not args.depth and not args.hours:
        args.hours = SPEEDRUN_HOURS
    explicit = args.target_param_data_ratio or args.num_iterations > 0 or args.target_flops > 0
    gpt2 = not explicit and (args.target or machine.gpus >= GPT2_GPUS)
    args.target_param_data_ratio = args.target_param_data_ratio or (GPT2_RATIO if gpt2 else RULE_RATIO)
    recipe = "as the flags say"
    if not explicit:
        recipe = "the recipe of profile gpt2" if gpt2 else "the rule of base_train"
        recipe += f": ratio {args.target_param_data_ratio:g}"
    if args.fp8 or gpt2:
        recipe += ", fp8" if machine.has_fp8 else ", no fp8, which this does not multiply"
        args.fp8 = machine.has_fp8
    return args, recipe


def run_at(depth: int, args, machine: Machine) -> Run:
    """As base_train would do it."""
    args = argparse.Namespace(**vars(args) | {"depth": depth})
    config, the_plan = shape_and_plan(args, args.vocab_size)
    most = memory.most_rows(machine.memory, config, config.sequence_len, machine.runtime, machine.compiles)
    at_once = args.device_batch_size or ("auto" if machine.gpus else 32)
    at_once = max(1, most) if at_once == "auto" else at_once
    rows_a_step, device_batch = memory.split_batch(
        the_plan.total_batch_size, config.sequence_len, at_once, machine.runtime
    )
    return Run(args, config, the_plan, rows_a_step, device_batch.rows, most)


def deepest(args, machine: Machine, seconds: Callable[[Run], float]) -> Run:
    """The deepest run whose speedrun takes at most args.hours and that fits the memory. ValueError, naming what would
    do, where there is none."""

    def hours(run):
        pretraining = seconds(run)
        return (pretraining + forecast.other_seconds(pretraining, machine.gpus > 0)) / 3600

    for good_rows in (GOOD_ROWS, 1):
        for depth in DEPTHS:
            run = run_at(depth, args, machine)
            if run.most_rows >= min(good_rows, run.rows_a_step // machine.ranks) and hours(run) <= args.hours:
                return run
    if not run.most_rows:
        needed = run_bytes(run, 1, machine) / memory.USABLE / 1e9
        raise ValueError(f"depth {depth} takes {needed:.1f} GB of memory, {machine.memory / 1e9:.1f} GB are there")
    enough = hours(run) * 1.02
    would_do = f"--hours {enough:.3g} would do"
    if args.dollars:
        would_do = f"--dollars {enough * machine.price:.3g} would do"
    raise ValueError(
        f"no depth is done in {duration(3600 * args.hours)} on {machine.title}: depth {depth} takes "
        f"{duration(3600 * hours(run))}, {duration(seconds(run))} of it pretraining; {would_do}"
    )


def run_bytes(run: Run, rows: int, machine: Machine) -> int:
    return memory.training_bytes(rows, run.config, run.config.sequence_len, machine.runtime, machine.compiles)


# -- what is said of it


def describe(run: Run, machine: Machine, pretraining: float, recipe: str, how: str) -> dict:
    """All that is said, as --json gives it. The depth comes first: speedrun.sh reads it."""
    config, the_plan, args = run.config, run.plan, run.args
    rest = forecast.other_seconds(pretraining, machine.gpus > 0)
    seconds = {"pretraining": pretraining, "rest": rest, "speedrun": pretraining + rest}
    num_shards = forecast.shards(the_plan.tokens) if args.corpus == "climbmix" else 0
    sizes = sorted({1 << power for power in range(max(SHOWN_ROWS, run.rows).bit_length())} | {run.rows})
    dtype = machine.runtime.dtype
    return {
        "depth": config.n_layer,
        "machine": {"title": machine.title, "gpus": machine.gpus, "dollars_an_hour": machine.price},
        "recipe": recipe,
        "model": {"config": config.__dict__, "parameters": meta_model(config).counts()},
        "plan": the_plan.as_dict(),
        "fp8": args.fp8,
        "data": {
            "corpus": args.corpus,
            "shards": num_shards or None,
            "disk_gb": round(forecast.disk_bytes(config, dtype, args.corpus, num_shards) / 1e9, 1),
        },
        "memory": {
            "there_gb": round(machine.memory / 1e9, 1),
            "rows_gb": {rows: round(run_bytes(run, rows, machine) / 1e9, 1) for rows in sizes},
            "usable": memory.USABLE,
            "rows_a_step": run.rows_a_step,
            "rows": run.rows,
            "most_rows": run.most_rows,
        },
        "tokens_per_second": the_plan.tokens / pretraining,
        "flops_per_second": the_plan.total_flops / pretraining,
        "how": how,
        "seconds": seconds,
        "dollars": {key: value / 3600 * machine.price for key, value in seconds.items()} if machine.price else None,
        "expected": forecast.known_result(the_plan, args.corpus),
        "fits": run.most_rows > 0,
        "commands": commands(args, machine) if run.most_rows else [],
    }


def commands(args, machine: Machine) -> list[str]:
    """What starts this run; of the speedrun only where it is its own."""
    usual = argparse.ArgumentParser()
    add_model_flags(usual)
    add_horizon_flags(usual)
    defaults = vars(usual.parse_args([])) | {
        "corpus": "climbmix",
        "vocab_size": 32768,
        "device_batch_size": None,
        "compile": -1,
    }
    words = [
        f"--{name.replace('_', '-')}={getattr(args, name):g}"
        if isinstance(getattr(args, name), float)
        else f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in defaults
        if name == "depth" or getattr(args, name) != defaults[name]
    ]
    words += ["--fp8"] * args.fp8
    start = "python -m scripts.base_train"
    if machine.gpus > 1:
        start = f"torchrun --standalone --nproc_per_node={machine.gpus} -m scripts.base_train --"
    lines = [" ".join([start, *words])]
    shape = set(defaults) - {"depth", "target_param_data_ratio"}
    ratio = args.target_param_data_ratio
    if machine.gpus and all(getattr(args, name) == defaults[name] for name in shape):
        if ratio == GPT2_RATIO and args.fp8 == machine.has_fp8:
            lines.append(f"bash speedrun.sh --profile gpt2 --depth {args.depth}")
        elif ratio == RULE_RATIO and not args.fp8:
            lines.append(f"bash speedrun.sh --profile single --depth {args.depth}")
    return lines


if __name__ == "__main__":
    main(parse_args())
