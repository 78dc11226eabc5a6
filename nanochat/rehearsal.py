"""From a stage that ran for a few steps to how long all of it will take.

A stage is a start, which is the same however long it runs, and parts that repeat: steps, measurements, examples,
problems. The start is what of the wall time the parts do not explain. Every function takes the flags of the whole run
(args), the JSON that the short one left (found), its log, and its wall time in seconds; and returns seconds and a
sentence on what they rest on. Models in a rehearsal have learned nothing, so their answers are taken to be as long as
the expected ones.
"""

import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nanochat.memory import USABLE
from nanochat.report_run import duration

WARM = 2  # steps of a process that say little of the others


def steps(log: list[dict], first: int, num_steps: int) -> tuple[float, float]:
    """(seconds of one step, of all steps from `first` on), the wait for its rows included."""
    seconds = [
        line["train/dt"] / (1 - line["train/data_wait"]) for line in log if "train/dt" in line and line["step"] >= first
    ]
    return statistics.median(seconds[WARM:] or seconds), sum(seconds)


def times_due(every: int, num_steps: int, from_start: bool) -> int:
    """How often something is done that is due every so many steps, after the last, and maybe before the first."""
    return 0 if every < 1 else (num_steps - 1) // every + 1 + from_start


def training(args, found: dict, log: list[dict], wall: float, num_steps: int, ran: int, share: float = 1.0) -> tuple:
    """Pretraining and SFT. num_steps: of the whole run; ran: of the short one; share: of --eval-tokens that it took."""
    first = found["final"]["step"] - ran
    step, all_steps = steps(log, first, ran)
    measured = [line["val/dt"] for line in log if "val/dt" in line and (line["step"] > first or first == 0)]
    start = wall - all_steps - sum(measured)
    measurement = statistics.median(measured) / share if measured else 0.0
    count = times_due(args.eval_every, num_steps, from_start=True)
    seconds = start + num_steps * step + count * measurement
    said = f"{num_steps:,} steps of {brief(step)}"
    said += f", {count} measurements of {brief(measurement)}" if count else ""
    return seconds, f"{said}, {brief(start)} to start and save"


def fine_tuning(args, found: dict, log: list[dict], wall: float, ran: int, share: float = 1.0) -> tuple:
    """SFT of a part of the mixture: its rendering and, where an epoch is wanted, its steps grow with the whole."""
    whole = found["available"] / found["conversations"]
    num_steps = args.num_iterations if args.num_iterations > 0 else round(found["num_iterations"] * whole)
    rendering = found["rendering_seconds"]
    seconds, said = training(args, found, log, wall - rendering, num_steps, ran, share)
    return seconds + rendering * whole, said


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


def practice(args, found: dict, log: list[dict], wall: float, ran: int, share: float) -> tuple:
    """RL. share: of --eval-examples that the short run took. Where the short run has learned from nothing, because all
    answers were wrong, what learning takes is not in."""
    num_steps = found["num_iterations"]
    step, all_steps = steps(log, found["final"]["step"] - ran, ran)
    measured = [line["val/dt"] for line in log if "val/dt" in line]
    start = wall - all_steps - sum(measured)
    examination = statistics.median(measured) / share if measured else 0.0
    count = times_due(args.eval_every, num_steps, from_start=True)
    seconds = start + num_steps * step + count * examination
    said = (
        f"{num_steps:,} steps of {brief(step)}, {count} examinations of {brief(examination)}, {brief(start)} to start"
    )
    return seconds, said


def brief(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * max(0.0, seconds):.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


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
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = re.split(rb"[\r\n]+", file.read())
    said = [line for line in lines if line.strip()]
    return said[-1].decode("utf-8", "replace").strip() if said else ""


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
            lines.append(f"{'':14} WOULD HAVE FAILED{when}: {failure}")
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
