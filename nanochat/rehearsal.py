"""From a stage that ran for a few steps to how long all of it will take.

A stage is a start, which is the same however long it runs, and parts that repeat: steps, measurements, examples,
problems. The start is what of the wall time the parts do not explain. Every function takes the flags of the whole run
(args), the JSON that the short one left (found), its log, and its wall time in seconds; and returns seconds and a
sentence on what they rest on. Models in a rehearsal have learned nothing, so their answers are taken to be as long as
the expected ones.
"""

import itertools
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nanochat.corpora import CLIMBMIX_SHARDS
from nanochat.memory import USABLE
from nanochat.results import duration
from nanochat.runtime import usable_cores

TAIL = 20_000  # bytes of a log
WARM = 2  # steps of a process that say little of the others


def steps(log: list[dict], first: int) -> tuple[float, int]:
    """(seconds of one step, how many there were) from `first` on, the wait for their rows included."""
    seconds = [
        line["train/dt"] / (1 - line["train/data_wait"]) for line in log if "train/dt" in line and line["step"] >= first
    ]
    return statistics.median(seconds[WARM:] or seconds or [0.0]), len(seconds)


def measurements(log: list[dict], after: int) -> tuple[float, int]:
    """(seconds of one, how many there were); the first may have been compiled."""
    seconds = [line["val/dt"] for line in log if "val/dt" in line and line["step"] > after]
    return statistics.median(seconds[1:] or seconds or [0.0]), len(seconds)


def times_due(every: int, num_steps: int, from_start: bool) -> int:
    """How often something is done that is due every so many steps, after the last, and maybe before the first."""
    return 0 if every < 1 else (num_steps - 1) // every + 1 + from_start


def training(args, found: dict, log: list[dict], wall: float, num_steps: int, first: int, share: float = 1.0) -> tuple:
    """Pretraining and SFT. num_steps: of the whole run; first: the step that the short one began at; share: of
    --eval-tokens that it took. What its first steps and measurements took longer, is start."""
    (step, ran), (measurement, measured) = steps(log, first), measurements(log, first if first else -1)
    start = wall - ran * step - measured * measurement
    count = times_due(args.eval_every, num_steps, from_start=True)
    said = f"{num_steps:,} steps of {brief(step)}"
    said += f", {count} measurements of {brief(measurement / share)}" if count else ""
    return start + num_steps * step + count * measurement / share, f"{said}, {brief(start)} to start and save"


def fine_tuning(args, found: dict, log: list[dict], wall: float, share: float = 1.0) -> tuple:
    """SFT of a part of the mixture: its rendering and, where an epoch is wanted, its steps grow with the whole."""
    num_steps, rendering = steps_of_the_mixture(args, found), found["rendering_seconds"]
    seconds, said = training(args, found, log, wall - rendering, num_steps, 0, share)
    return seconds + rendering * found["available"] / found["conversations"], said


def steps_of_the_mixture(args, found: dict) -> int:
    """As many as are asked for, or an epoch of all conversations, of which the short run took a part."""
    epoch = found["num_iterations"] * found["available"] / found["conversations"]
    return args.num_iterations if args.num_iterations > 0 else round(epoch)


def shards_wanted(flags: list[str]) -> int:
    """Training shards that a command of nanochat.dataset asks for."""
    count = int(flags[flags.index("-n") + 1])
    return CLIMBMIX_SHARDS - 1 if count == -1 else count


class Shards:
    """Those of ClimbMix: how many are here, and how long they take. fetched: seconds of each that the rehearsal
    fetched; brought: how many the run will have by the commands that were asked about so far."""

    def __init__(self, folder: Path):
        self.folder, self.fetched, self.brought = folder, [], 0

    def here(self) -> int:
        """Training shards from the first on."""
        there = ((self.folder / f"shard_{count:05d}.parquet").exists() for count in range(CLIMBMIX_SHARDS))
        return sum(itertools.takewhile(bool, there))

    def forecast(self, flags: list[str], seconds: float) -> tuple[float, str]:
        """Of a command of nanochat.dataset that took so long for one more shard, or for the tokens of two."""
        if "-n" not in flags:
            return seconds, "done whole"
        wanted = shards_wanted(flags)
        if "tokenize" in flags:  # the validation shard, too
            count, cores = wanted + 1, usable_cores()
            return seconds * min(cores, 2) / 2 * count / min(cores, count), f"{count} shards on {cores} cores"
        missing, self.brought = max(0, wanted - max(self.here(), self.brought)), wanted
        if not missing:
            return seconds, "all shards are there"
        each = statistics.mean(self.fetched or [0.0])
        return missing * each, f"{missing} shards of {brief(each)}"


def core_seconds(found: dict, max_per_task: int) -> float:
    """CORE over so many examples of each task (-1: all)."""
    return sum(
        task["seconds"]
        / task["examples"]
        * min(task["available"], max_per_task if max_per_task > 0 else task["available"])
        for task in found["core"]["tasks"].values()
    )


def base_evaluation(args, found: dict, wall: float) -> tuple:
    took = found["took"]
    start = wall - sum(took.values())
    bpb = took.get("bpb", 0.0) * args.split_tokens / found.get("bpb_tokens", args.split_tokens)
    core = core_seconds(found, args.max_per_task) if "core" in found else 0.0
    seconds = start + took.get("sample", 0.0) + bpb + core
    return seconds, f"CORE {brief(core)}, bits per byte {brief(bpb)}, {brief(seconds - core - bpb)} to start and sample"


def chat_seconds(found: dict, limit: int | None) -> float:
    """All of its tasks, `limit` problems of each at most."""
    return sum(
        task["seconds"] / task["problems"] * min(task["available"], limit or task["available"])
        for task in found["tasks"].values()
    )


def chat_evaluation(args, found: dict, wall: float) -> tuple:
    start = wall - sum(task["seconds"] for task in found["tasks"].values())
    problems = chat_seconds(found, args.max_problems)
    count = sum(min(task["available"], args.max_problems or task["available"]) for task in found["tasks"].values())
    return start + problems, f"{count:,} problems in {brief(problems)}, {brief(start)} to start"


def practice(args, found: dict, log: list[dict], wall: float, share: float) -> tuple:
    """RL. share: of --eval-examples that the short run took."""
    num_steps = found["num_iterations"]
    (step, ran), (examination, examined) = steps(log, 0), measurements(log, -1)
    start = wall - ran * step - examined * examination
    count = times_due(args.eval_every, num_steps, from_start=True)
    said = f"{num_steps:,} steps of {brief(step)}"
    said += f", {count} examinations of {brief(examination / share)}" if count else ""
    return start + num_steps * step + count * examination / share, f"{said}, {brief(start)} to start"


def brief(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * max(0.0, seconds):.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- for people


def watch(process: subprocess.Popen, title: str, log: Path) -> int:
    """Wait for a command, with its progress; returns its exit code."""
    began = time.time()
    while process.poll() is None:
        show_progress(title, log, began)
        time.sleep(0.2)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return process.returncode


def show_progress(title: str, log: Path, began: float) -> None:
    """On a terminal: how long it runs, and the last line that it wrote."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        text = f"{title} {time.time() - began:.0f} s | {last_line(log)}"
        print("\r\033[K" + text[:width], end="", file=sys.stderr, flush=True)


def last_line(log: Path) -> str:
    return (lines_of(log) or [""])[-1]


def reason(log: Path) -> str:
    """Of a command that failed: its last line, or that of its workers before torchrun speaks of their end."""
    lines = lines_of(log)
    ends = [i for i, line in enumerate(lines) if i and "torch/distributed/elastic" in line]
    return lines[ends[0] - 1] if ends else (lines or [""])[-1]


def lines_of(log: Path) -> list[str]:
    """The last lines of a log that are not blank; what a progress bar wrote over itself counts as several."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = re.split(r"[\r\n]+", file.read().decode("utf-8", "replace"))
    return [line.strip() for line in lines if line.strip()]


def told(found: dict) -> str:
    """The summary of a rehearsal, for people."""
    lines = [f"\nrehearsed in {duration(found['seconds'])}", ""]
    lines.append(f"{'stage':14} {'rehearsed':>10} {'will take':>12}   rests on")
    spent = 0.0
    for name, one in found["stages"].items():
        lines.append(
            f"{name:14} {duration(one['rehearsed']):>10} {duration(one['forecast']):>12}   {one['rests_on']}".rstrip()
        )
        for failure in one["failed"]:
            when = f", after about {duration(spent)} of the run" if spent else ""
            lines.append(f"{'':14} {'' if ': not tried' in failure else f'WOULD HAVE FAILED{when}: '}{failure}")
        spent += one["forecast"]
    cost = f", about ${found['cost']:,.2f}" if found["cost"] is not None else ""
    lines.append(f"{'all':14} {'':10} {duration(found['forecast']):>12}   set-up aside{cost}")
    lines.append("")
    if found["resumed_at"]:
        lines.append(f"kill -9    pretraining went on from its checkpoint at step {found['resumed_at']}")
    there = found["memory"]["there"]
    for name, peak in found["memory"]["peaks"].items():
        room = f" of {there / 1e9:.0f} GB{', which is very full' if peak > USABLE * there else ''}" if there else ""
        lines.append(f"memory     {name} took {peak / 1e9:.2f} GB{room}")
    needed, free = found["disk"]["needed"], found["disk"]["free"]
    fits = "fits" if needed < free else "DOES NOT FIT: set NANOCHAT_BASE_DIR to a larger disk"
    lines.append(f"disk       {needed / 1e9:.1f} GB for data and checkpoints, {free / 1e9:.0f} GB are free: {fits}")
    return "\n".join(lines)
