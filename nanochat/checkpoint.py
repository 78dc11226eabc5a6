"""Checkpoints: one folder a step, in safetensors and JSON, complete or not there at all.

    <base>/base_checkpoints/<tag>/step_000450/
        model.safetensors
        optim_00000.safetensors ...   one a rank that wrote it; keys are name:state:first row:rows of the whole
        meta.json                     config, plan, flags, progress, position in the data, RNG states, environment

This file finds and reads them; saver.py writes them. Optimizer state is read back by slices, so that a run can go on
with another number of ranks.
"""

import errno
import fcntl
import itertools
import json
import os
import platform
import re
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from nanochat import paths
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer, TokenizerError

FORMAT_VERSION = 1
ASIDE = ".before-"  # in the name of a model that a newer one of the same tag has taken the place of
SECONDS_TO_SEE = 60  # what another node has written: network file systems remember names for so long
SECONDS_TO_END = 20  # for a process that was killed while it held a GPU
MAKERS = {"base": "scripts.base_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable, or does not fit."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*") if (path / "meta.json").exists())
    return sorted(int(match[1]) for match in found if match)


def find(source: str, tag: str | None = None, step: int | None = None) -> Path:
    """The folder of one checkpoint. Without a tag: the largest d<N>, or else the model written last. Without a step:
    the newest."""
    root = paths.checkpoint_dir(source)
    make = f"python -m {MAKERS[source]}"
    if tag is None:
        tags = [path for path in root.glob("*") if list_steps(path) and ASIDE not in path.name]
        if not tags:
            raise CheckpointError(f"no {source} model under {root}; make one with: {make}")
        tag = max(tags, key=lambda path: (_depth(path.name), max(list_steps(path)) and path.stat().st_mtime)).name
    folder = root / tag
    steps = list_steps(folder)
    if not steps:
        have = ", ".join(sorted(path.name for path in root.glob("*") if list_steps(path))) or "none"
        raise CheckpointError(
            f"no {source} model with tag {tag!r}; there are: {have}; make it with: {make} --model-tag {tag}"
        )
    if step is None or step == -1:
        step = steps[-1]
    if step not in steps:
        raise CheckpointError(f"{folder} has no step {step}; it has: {', '.join(map(str, steps))}")
    return step_folder(folder, step)


def find_resume(source: str, tag: str, newest: bool, step: int, runtime: Runtime) -> Path | None:
    """The checkpoint to go on from: that of a given step, or the newest if there is one; None to start afresh. Rank 0
    chooses for all: a network file system may show other nodes what was there a minute ago."""
    chosen = None
    if runtime.is_main:
        try:
            if step != -1 or (newest and list_steps(paths.checkpoint_dir(source, tag))):
                chosen = find(source, tag, step)
        except CheckpointError as error:
            chosen = error
    chosen = runtime.gather(chosen)[0]
    if isinstance(chosen, CheckpointError):
        raise chosen
    deadline = time.monotonic() + SECONDS_TO_SEE
    while chosen and not (chosen / "meta.json").exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"rank {runtime.rank} does not see {chosen}: NANOCHAT_BASE_DIR must be a folder that all nodes share"
            )
        time.sleep(0.5)
    return chosen


def set_aside(folder: Path, runtime: Runtime, after: int = -1):
    """Make room for a run: no other process may train this model while what is returned lives; checkpoints later than
    step `after` (-1: all) move to a folder beside, so that nobody resumes from them by mistake and nothing is lost."""
    lock = error = None
    if runtime.is_main:
        try:
            lock = claim(folder)
        except CheckpointError as taken:
            error = taken
    if error := runtime.gather(error)[0]:
        raise error
    later = [step for step in list_steps(folder) if step > after]
    if runtime.is_main and later:
        moment = time.strftime("%Y%m%d-%H%M%S")
        names = (f"{folder.name}{ASIDE}{moment}-{n}" for n in itertools.count(1))
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        if after == -1:
            folder.rename(aside)
        else:
            aside.mkdir()
            for step in later:
                step_folder(folder, step).rename(step_folder(aside, step))
        what = "an older model has" if after == -1 else f"steps {', '.join(map(str, later))} were made with"
        runtime.print(f"{what} the tag {folder.name}: moved to {aside}")
    runtime.barrier()
    return lock


def lock_file(folder: Path) -> Path:
    """Locked by the process that trains the model of a folder."""
    return folder.with_name(f".{folder.name}.lock")


def claim(folder: Path):
    """Take a model for this process, as long as the file that is returned is open. A lock of the system, which goes
    with the process: nothing is left behind by a kill. Raises CheckpointError where another process has it."""
    path, here = lock_file(folder), platform.node()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a+")
    deadline = time.monotonic() + SECONDS_TO_END
    while not locked(lock):
        lock.seek(0)
        host, _, pid = lock.read().partition(" ")
        if time.monotonic() > deadline and host == here:
            raise CheckpointError(
                f"process {pid} is training {folder.name} already: wait for it, stop it, or take another --model-tag"
            )
        if time.monotonic() > deadline:  # on some network file systems the lock of a dead node lives on
            print(f"{host} was training {folder.name} and is taken for dead; if it is not, stop it now", flush=True)
            return lock
        time.sleep(0.2)
    lock.truncate(0)
    lock.write(f"{here} {os.getpid()}")
    lock.flush()
    return lock


def locked(file) -> bool:
    """Whether this process now has the lock of an open file; where the file system has no locks, too."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print(f"no locks here ({error}): see to it that no two processes train the same model", flush=True)
    return True


def _depth(tag: str) -> int:
    match = re.fullmatch(r"d(\d+)", tag)
    return int(match[1]) if match else -1


def read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'meta.json'} cannot be read ({error}); delete {folder} to use an older step"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version}, this nanochat reads up to {FORMAT_VERSION}: update it")
    return meta


def check_resumable(folder: Path, meta: dict, **wanted) -> None:
    """That a checkpoint belongs to the run that would go on from it: each named entry of meta is what is wanted."""
    if "imported" in meta:
        raise CheckpointError(
            f"{folder} cannot be resumed: it was imported from {meta['imported']['from']}. "
            "Begin the next stage from it, or start anew without --resume"
        )
    for name, value in wanted.items():
        if meta.get(name) != value:
            raise CheckpointError(
                f"{folder} cannot be resumed: its {name.replace('_', ' ')} was {meta.get(name)}, now it is {value}. "
                "Give the flags of the first run, or start anew without --resume"
            )


def tell_dtype(meta: dict, runtime: Runtime) -> None:
    """One line when a run goes on in another compute dtype than its checkpoint was trained in."""
    before, now = meta.get("dtype", "float32"), str(runtime.dtype).removeprefix("torch.")
    if before != now:
        runtime.print(f"trained in {before} so far, going on in {now}; NANOCHAT_DTYPE={before} keeps it")


def restore_rng(meta: dict, runtime: Runtime) -> None:
    """The generators of torch as they stood on this rank, or on the first one where the run had fewer ranks. nanochat
    draws nothing from them while it trains; what you add may."""
    states = meta.get("rng")
    if states:
        runtime.set_rng_state(states[runtime.rank if runtime.rank < len(states) else 0])


def load_weights(folder: Path, model: GPT) -> None:
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own kinds for truncated and foreign files
        raise CheckpointError(f"{path} cannot be read ({error}); delete {folder} to use an older step") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model of its meta.json: {error}") from error


def load_optimizer(folder: Path, optimizer: MuonAdamW) -> None:
    """Fill this rank's state from whatever slices the ranks of the saved run wrote."""
    files = []
    for path in sorted(folder.glob("optim_*.safetensors")):
        try:
            files.append(safe_open(path, framework="pt"))
        except Exception as error:  # safetensors raises its own kinds
            raise CheckpointError(f"{path} cannot be read ({error}); delete {folder} to use an older step") from error
    if not files:
        raise CheckpointError(
            f"{folder} holds no optimizer state; it cannot be resumed, only used (chat_sft: --load-optimizer 0)"
        )
    slices: dict[tuple[str, str], dict] = {}  # by first row: small tensors are whole in the file of every rank
    for file in files:
        for key in file.keys():
            name, state, first, _ = key.rsplit(":", 3)
            slices.setdefault((name, state), {})[int(first)] = file.get_slice(key)
    for name, states in optimizer.state_shares().items():
        for state, (target, low, _) in states.items():
            filled = 0
            for first, part in slices.get((name, state), {}).items():
                begin, end = max(low, first), min(low + target.size(0), first + part.get_shape()[0])
                if begin < end:
                    target[begin - low : end - low] = part[begin - first : end - first].to(target.device)
                    filled += end - begin
            if filled != target.size(0):
                raise CheckpointError(
                    f"{folder}: optimizer state {state} of {name} has {filled} of {target.size(0)} rows"
                )
    optimizer.steps = read_meta(folder)["optimizer_steps"]


def load_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with; an error when the one on disk is another."""
    name, fingerprint = meta["tokenizer"]["name"], meta["tokenizer"]["fingerprint"]
    tokenizer = Tokenizer.load(paths.tokenizer_dir(name))
    if tokenizer.fingerprint != fingerprint:
        raise TokenizerError(
            f"the tokenizer {name} was trained anew since model {meta['tag']!r} was: its ids mean other text now. "
            f"Train the model again (python -m {MAKERS[meta['stage']]} --model-tag {meta['tag']}), "
            f"or put the old {paths.tokenizer_dir(name) / 'tokenizer.json'} back"
        )
    return tokenizer


def load_model(
    source: str, runtime: Runtime, tag: str | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """A trained model, its tokenizer and the checkpoint's meta. source: base, sft or rl."""
    folder = find(source, tag, step)
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta)
    model = build_model(GPTConfig(**meta["model_config"]), runtime, seed=None)
    load_weights(folder, model)
    return model, tokenizer, meta
