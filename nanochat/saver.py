"""Writing checkpoints beside the training: the loop is held only while tensors are copied to host memory.

A thread on every rank writes that rank's files into a hidden folder and flushes them. Whether all ranks are done is
agreed in the main thread, with the numbers that every step exchanges anyway; then rank 0 renames the folder, and the
checkpoint is complete. Killed at any moment, a run finds the last complete one as it was.
"""

import concurrent.futures
import errno
import json
import os
import re
import shutil
import signal
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanochat import paths, results
from nanochat.checkpoint import FORMAT_VERSION, SECONDS_TO_SEE, list_steps, step_folder
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.progress import is_due
from nanochat.runtime import Runtime, StopSignals

MODEL = "model.safetensors"
WRITE_ERRORS = (OSError, SafetensorError)  # a disk's, not a mistake of ours
LAST_TRIES, SECONDS_BETWEEN_TRIES = 20, 30  # for the checkpoint of the last step


def add_flags(parser) -> None:
    """The flags of every stage that trains: when to save, what to keep, how to go on."""
    add = parser.add_argument
    add("--save-every", type=int, default=-1, help="steps between checkpoints (-1: at the end, before examinations)")
    add("--save-minutes", type=float, default=-1, help="save by the clock, too (-1: no)")
    add("--keep", type=int, default=-1, help="newest checkpoints to keep (-1: all)")
    add("--resume", action="store_true", help="go on from the newest checkpoint of this tag, or start")
    add("--resume-from-step", type=int, default=-1, help="go on from this checkpoint")
    add("--stop-after", type=int, default=-1, help="end after so many steps; --resume goes on (-1: at the run's end)")
    add("--on-nan", default="stop", choices=["stop", "skip"], help="what to do with a step that is not finite")


def check_flags(parser, args) -> None:
    if args.resume and args.resume_from_step != -1:
        parser.error("--resume takes the newest checkpoint, --resume-from-step a given one: choose one of them")
    if args.keep != -1 and args.keep < 1:
        parser.error(f"--keep is {args.keep}; expected 1 or more, or -1 for all")
    if args.stop_after != -1 and args.stop_after < 1:
        parser.error(f"--stop-after is {args.stop_after}; expected 1 or more steps, or -1")
    if args.save_minutes != -1 and args.save_minutes <= 0:
        parser.error(f"--save-minutes is {args.save_minutes}; expected more than 0, or -1 for never")


class Saver:
    """Saves one run, step after step, under `folder` (paths.checkpoint_dir(stage, tag)).

    saved: the step that is on disk already, when the run goes on from one. log: a file to flush with every save. lock:
    what keeps other processes from the folder (checkpoint.set_aside), held with this. All ranks make the same calls.
    """

    def __init__(
        self,
        folder: Path,
        model: GPT,
        optimizer: MuonAdamW | None,
        runtime: Runtime,
        saved: int = -1,
        every: int = -1,
        minutes: float = -1,
        keep: int = -1,
        log: Path | None = None,
        lock=None,
    ):
        self.folder, self.model, self.optimizer, self.runtime = folder, model, optimizer, runtime
        self.every, self.minutes, self.keep, self.log, self.lock = every, minutes, keep, log, lock
        self.asked = saved  # the step that was last saved or is being saved
        self.failed = False
        self.time_is_up = False
        self.since = time.monotonic()
        self.writing = None  # what the thread is at
        self.environment = results.environment(runtime)
        if runtime.is_main:
            for leftover in folder.glob(".step_*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        runtime.barrier()
        self._probe()
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        # memory that is new costs more than the copying, so it is taken now and kept
        self.copies = self.thread.submit(lambda: {name: _host_copies(part) for name, part in self.files().items()})

    def _probe(self) -> None:
        """Every rank writes a small file: better to hear at the beginning than after hours that this folder cannot be
        written, or is another one on another node."""
        error = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".step_probe_{self.runtime.rank}"
            probe.write_text("")
            _flush(probe)
            _flush(self.folder)
        except OSError as refused:
            error = str(refused)
        errors = self.runtime.gather(error)
        if any(errors):
            where = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)
            self.runtime.print(f"WARNING: checkpoints cannot be written at present ({where})")
        unseen = []
        if self.runtime.is_main and not any(errors):
            probes = {rank: self.folder / f".step_probe_{rank}" for rank in range(self.runtime.world_size)}
            deadline = time.monotonic() + SECONDS_TO_SEE
            while unseen := [rank for rank, probe in probes.items() if not probe.exists()]:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        unseen = self.runtime.gather(unseen)[0]
        for probe in self.folder.glob(".step_probe_*"):
            probe.unlink(missing_ok=True)
        if unseen:
            raise ValueError(
                f"what rank {', '.join(map(str, unseen))} writes in {self.folder} is not seen by rank 0: "
                "NANOCHAT_BASE_DIR must be a folder that all nodes share"
            )

    # -- when

    def due(self, step: int, last: bool) -> bool:
        return step != self.asked and (last or self.time_is_up or is_due(step, self.every, False))

    def news(self) -> list[float]:
        """What this rank has to tell at a step: that the time is up, that it is writing, that writing failed."""
        up = self.runtime.is_main and self.minutes > 0 and time.monotonic() - self.since > 60 * self.minutes
        writing = self.writing is not None and not self.writing.done()
        failed = self.writing is not None and not writing and self.writing.exception() is not None
        return [float(up), float(writing), float(failed)]

    def heard(self, news: list[float]) -> None:
        """The sum of all ranks' news. A save that all of them have written becomes complete."""
        up, writing, failed = news
        self.time_is_up = up > 0
        if self.writing is not None and not writing:
            self._conclude(failed > 0)

    # -- how

    def save(self, step: int, meta: dict) -> None:
        """Copy the state and begin to write it. meta: what the stage wants to find again; rank 0's is written."""
        self._wait()
        self.asked, self.since, self.time_is_up = step, time.monotonic(), False
        files, copies = self.files(), self.copies.result()
        for name, tensors in files.items():
            for key, tensor in tensors.items():
                copies[name][key].copy_(tensor, non_blocking=True)
        rng = self.runtime.gather(self.runtime.rng_state())
        self.runtime.synchronize()
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dtype": self.environment["dtype"],
            "environment": self.environment,
            "rng": rng,
            **({"optimizer_steps": self.optimizer.steps} if self.optimizer else {}),
            **meta,
        }
        own = (None, 0, None)
        if self.runtime.is_main:  # the other ranks' shares are of the size of this one's
            shares = {name: 1 if name == MODEL else self.runtime.world_size for name in files}
            needed = sum(shares[name] * tensor.nbytes for name in files for tensor in files[name].values())
            own = (meta, needed, self.log)
        self.writing = self.thread.submit(write, self._partial, copies, *own)

    def finish(self) -> bool:
        """Wait for the save under way. Whether the one that was asked for last is complete, the same on all ranks."""
        self._wait()
        return not self._anywhere(self.failed)

    def ensure(self, save, step: int, signals: StopSignals | None = None) -> None:
        """Have the step on disk: save it unless it is, and wait. With signals, of the last step: try again half a
        minute after each failure, until there is a signal or ten minutes are over."""
        if self.asked == step and self.finish():
            return
        for tries_left in reversed(range(LAST_TRIES if signals else 1)):
            save(step)
            if self.finish():
                return
            if signals and any(self.runtime.gather(signals.received is not None)):
                self.leave(signals)
            if tries_left:
                self.runtime.print(f"trying again in {SECONDS_BETWEEN_TRIES} s; make room in {self.folder}")
                time.sleep(SECONDS_BETWEEN_TRIES)
        if signals:
            mending = f"make room in {self.folder}, then the same command with --resume does the rest again"
            raise ValueError(f"step {step} could not be saved; {self.last_good()}; {mending}")

    def leave(self, signals: StopSignals) -> None:
        """End the process after a signal, with the exit code that shells know: 128 + its number."""
        complete = self.finish()
        number = max(self.runtime.gather(int(signals.received or 0)))
        again = _resuming(paths.command_line())
        if self.runtime.world_size > 1:
            again += "   (by torchrun, on as many ranks as there are then)"
        self.runtime.print(
            f"{signal.Signals(number).name}: stopped after step {self.asked}, {'saved' if complete else 'NOT SAVED'}; "
            f"{self.last_good()}\ngo on with: {again}"
        )
        raise SystemExit(128 + number)

    def last_good(self) -> str:
        steps = list_steps(self.folder)
        if not steps:
            return f"there is no checkpoint in {self.folder}"
        return f"the last good checkpoint is {step_folder(self.folder, steps[-1])}"

    @property
    def _partial(self) -> Path:
        return self.folder / f".step_{self.asked:06d}.partial"

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """This rank's files: name -> tensors. The weights are rank 0's, of the optimizer every rank has a share."""
        files = {}
        if self.runtime.is_main:
            files[MODEL] = {name: p.detach() for name, p in self.model.named_parameters()}
        if self.optimizer:
            files[f"optim_{self.runtime.rank:05d}.safetensors"] = {
                f"{name}:{key}:{first}:{whole}": tensor
                for name, states in self.optimizer.state_shares().items()
                for key, (tensor, first, whole) in states.items()
            }
        return files

    def _anywhere(self, flag: bool) -> bool:
        return self.runtime.sum(torch.tensor(float(flag), device=self.runtime.device)).item() > 0

    def _wait(self) -> None:
        if self.writing is not None:
            concurrent.futures.wait([self.writing])
            self._conclude(self._anywhere(self.writing.exception() is not None))

    def _conclude(self, failed: bool) -> None:
        """All ranks have written, or failed to: the folder gets its name, or goes away with a warning."""
        error, self.writing, self.failed = self.writing.exception(), None, failed
        if error is not None and not isinstance(error, WRITE_ERRORS):
            raise error
        errors = self.runtime.gather(error and str(error)) if failed else []
        if not self.runtime.is_main:
            return
        if not failed:
            try:
                self._partial.rename(step_folder(self.folder, self.asked))
            except OSError as late:
                self.failed, errors = True, [str(late)]
        if not self.failed:
            try:
                _flush(self.folder)
                self._rotate()
            except OSError as late:
                print(f"WARNING: {self.folder}: {late}", flush=True)
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        where = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)
        print(f"WARNING: step {self.asked} could not be saved ({where}); {self.last_good()}", flush=True)

    def _rotate(self) -> None:
        """Old checkpoints first lose their name, so that none is ever listed while its files go away."""
        for step in list_steps(self.folder)[: -self.keep] if self.keep > 0 else []:
            gone = self.folder / f".step_{step:06d}.old"
            step_folder(self.folder, step).rename(gone)
            self.thread.submit(shutil.rmtree, gone, ignore_errors=True)


def _resuming(command: str) -> str:
    """The command with --resume in the place of what it was told to go on from."""
    words = re.sub(r" --resume(-from-step(=| )\S+)?(?= |$)", "", command)
    return f"{words} --resume"


def _host_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Memory of the same shapes for the thread to write from; pinned for GPUs, where the system has enough of it."""
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    copies = {}
    for key, tensor in tensors.items():
        try:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        except RuntimeError as error:
            if not pinned:
                raise
            print(f"saving will hold the training a little longer: no more pinned memory ({error})", flush=True)
            copy, pinned = torch.empty(tensor.shape, dtype=tensor.dtype), False
        # touched by numpy, in one thread: torch would make a second team of OpenMP threads here, and with more of them
        # than cores, those of the training sleep where they used to spin: a third of a step's time on two cores
        copy.view(-1).view(torch.uint8).numpy().fill(0)
        copies[key] = copy
    return copies


def write(folder: Path, files: dict[str, dict], meta: dict | None, needed: int = 0, log: Path | None = None) -> None:
    """Write a rank's files and flush them. needed: bytes of all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:  # rather than to fill the disk, on which others write, too
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB free in", str(folder))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        _flush(folder / name)
    if log is not None:
        _flush(log)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        _flush(folder / "meta.json")
    _flush(folder)


def _flush(path: Path) -> None:
    """Onto the disk, not only into the system's memory. Of a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
