"""The sink of numbers: JSON lines per step, one JSON per stage, a live line, wandb when asked. Machines read these."""

import io
import json
import mmap
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from nanochat import __version__, paths
from nanochat.runtime import Runtime, device_name, git_commit

PLAIN_SECONDS = 10  # between two progress lines where there is no terminal


class Results:
    """One run of one stage. Only rank 0 writes. stage names the files, tag the folder under results/. resume_step: of
    the checkpoint from which the run goes on; measured_at: the last step whose bits per byte it holds; spent: seconds
    of the run before it."""

    def __init__(
        self,
        stage: str,
        tag: str,
        runtime: Runtime,
        run: str = "dummy",
        config: dict | None = None,
        project: str = "nanochat",
        resume_step: int = -1,
        measured_at: int = -1,
        wandb_id: str | None = None,
        beside: str = "",
        spent: float = 0.0,
    ):
        self.stage, self.tag, self.runtime, self.config = stage, tag, runtime, config or {}
        self.started, self.spent = time.time(), spent
        self.folder = paths.results_dir(tag)
        self.log_file = self.folder / f"{stage}.jsonl"
        self.lines = None
        self.beside_file = self.folder / f"{stage}.{beside}.jsonl"
        self.beside = None
        self.full_disk = False
        self.wandb = None
        if not runtime.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines = open_log(self.log_file, resume_step, measured_at)
        if beside:
            self.beside = open_log(self.beside_file, resume_step)
        if run != "dummy":
            self.wandb = start_wandb(project, run, self.config, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        """By which a resumed run goes on in the same curves."""
        return getattr(self.wandb, "id", None)

    def log(self, step: int, values: dict) -> None:
        """values: wandb's key -> number."""
        if self.lines:
            self._despite_a_full_disk(self.log_file, self.lines.write, json.dumps({"step": step, **values}) + "\n")
        self._to_wandb("log", {"step": step, **values})

    def log_beside(self, step: int, records: list[dict]) -> None:
        """Lines that people read, in a file of their own."""
        if self.beside:
            lines = [json.dumps({"step": step, **record}, ensure_ascii=False) + "\n" for record in records]
            self._despite_a_full_disk(self.beside_file, self.beside.writelines, lines)

    def logged(self) -> list[dict]:
        """All lines of the log so far, on rank 0; those that a kill or a full disk has torn are left out."""
        if not self.lines:
            return []
        self._despite_a_full_disk(self.log_file, self.lines.flush)
        values = (parsed(line) for line in self.log_file.read_bytes().splitlines(keepends=True))
        return [line for line in values if line is not None]

    def finish(self, summary: dict) -> None:
        """Write results/<tag>/<stage>.json."""
        if self.lines:
            self._despite_a_full_disk(self.log_file, self.lines.close)
            if self.beside:
                self._despite_a_full_disk(self.beside_file, self.beside.close)
            where = {"environment": environment(self.runtime), "config": self.config}
            paths.write_result(self.stage, self.tag, self.started, {**summary, **where}, self.spent)
        self._to_wandb("finish")

    def _despite_a_full_disk(self, file: Path, act, *args) -> None:
        """A log with a hole is better than no training: one line says so."""
        try:
            act(*args)
        except OSError as error:
            if not self.full_disk:
                print(f"WARNING: {file} cannot be written, lines will be missing: {error}", flush=True)
            self.full_disk = True

    def _to_wandb(self, call: str, *args) -> None:
        if self.wandb:
            try:
                getattr(self.wandb, call)(*args)
            except Exception as error:  # whatever it is, the training goes on without its dashboard
                print(f"wandb is off: {type(error).__name__}: {first_line(error)}", flush=True)
                self.wandb = None


def open_log(log: Path, resume_step: int, measured_at: int = -1):
    """To add lines to: from the beginning, or after those that the checkpoint of a resumed run has seen."""
    if resume_step == -1:
        log.unlink(missing_ok=True)
    elif log.exists():
        cut(log, resume_step, measured_at)
    return open(log, "a", buffering=1, encoding="utf-8")


def cut(log: Path, step: int, measured_at: int) -> None:
    """Drop the lines of what is about to be done again: from the end, so that a long log costs no more."""
    with open(log, "r+b") as file:
        end = os.path.getsize(log)
        with mmap.mmap(file.fileno(), 0) if end else io.BytesIO() as text:
            while end:
                begin = text.rfind(b"\n", 0, end - 1) + 1
                if _precedes(text[begin:end], step, measured_at):
                    break
                end = begin
        file.truncate(end)


def _precedes(line: bytes, step: int, measured_at: int) -> bool:
    """Whether a checkpoint of `step` has seen what a line logs: steps before it, and bits per byte up to its own."""
    values = parsed(line)
    if values is None:
        return False
    return values["step"] < step or (values["step"] <= measured_at and "val/bpb" in values)


def parsed(line: bytes) -> dict | None:
    """What a line logs; nothing when it was torn by a kill or a full disk."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def read(tag: str, stage: str) -> dict | None:
    """What a stage left behind, or None."""
    return read_json(paths.results_dir(tag) / f"{stage}.json")


def read_json(path: Path):
    """What stands in a file, or None where there is none; a number that is not finite counts as none."""
    text = path.read_text(encoding="utf-8") if path.exists() else "null"
    return json.loads(text, parse_constant=lambda name: None)


def environment(runtime: Runtime) -> dict:
    return {
        "nanochat": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device_name(runtime.device),
        "device_memory": runtime.device_memory(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "world_size": runtime.world_size,
    }


def start_wandb(project: str, run: str, config: dict, run_id: str | None = None):
    """A wandb run, or None with one line that says why: a training never dies of its dashboard. run_id: of the run that
    goes on."""
    try:
        import wandb

        mode = None if wandb.api.api_key else "offline"  # without a key it would stop and ask
        again = {"id": run_id, "resume": "allow"} if run_id else {}
        return wandb.init(project=project, name=run, config=config, mode=mode, **again)
    except Exception as error:  # not installed, not logged in, offline, refused: all the same to the training
        print(f"wandb is off: {type(error).__name__}: {first_line(error)}", flush=True)
        return None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class LiveLine:
    """Progress of a stage: one line that is rewritten on a terminal, a plain line now and then elsewhere."""

    def __init__(self, runtime: Runtime):
        self.enabled = runtime.is_main
        self.terminal = sys.stderr.isatty()
        self.shown = 0.0

    def show(self, text: str, last: bool = False) -> None:
        if not self.enabled:
            return
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.time() - self.shown > PLAIN_SECONDS:
            print(text, flush=True)
            self.shown = time.time()


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s, 3700 -> 1 h 01 min, 300000 -> 3.5 days, 1e9 -> 31.7 years."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        days = seconds / 86400
        return f"{days:.1f} days" if days < 1000 else f"{days / 365.25:,.1f} years"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
