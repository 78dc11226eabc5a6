"""Runs of the public nanochat, made ours: their checkpoints in torch's format, their tokenizer in a pickle.

    <root>/base_checkpoints/<tag>/model_000030.pt           likewise under chatsft_checkpoints, chatrl_checkpoints
                                  meta_000030.json
                                  optim_000030_rank0.pt ...  one a rank; may be missing
    <root>/tokenizer/tokenizer.pkl

public_files.py reads them. token_bytes.pt is not read: it counts the bytes of decoded text, where a part of a character
has become a replacement character; ours are counted from the raw bytes of each token.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from nanochat import paths, saver
from nanochat.checkpoint import FORMAT_VERSION, list_steps, read_meta, step_folder
from nanochat.gpt import GPT, GPTConfig
from nanochat.public_files import OTHER_ARCHITECTURE, PublicRunError, read_moments, read_tokenizer, read_weights
from nanochat.tokenizer import Tokenizer

CORPUS = "climbmix"  # what runs of this architecture were pretrained on
LONGEST_CONFIG = {"n_layer": 1000}  # of a hostile meta file: models are built before their weights are looked at
# what the public flags are when a meta file does not say
RATES = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
BATCHES = {"total_batch_size": 524288, "device_batch_size": 32}


@dataclass(frozen=True)
class PublicCheckpoint:
    """One step of a public run. stage: base, sft or rl."""

    stage: str
    tag: str
    step: int
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / f"model_{self.step:06d}.pt"

    @property
    def meta(self) -> Path:
        return self.folder / f"meta_{self.step:06d}.json"

    @property
    def optimizer(self) -> list[Path]:
        """One file a rank, in their order; none where only the model was kept."""
        pattern = re.compile(rf"optim_{self.step:06d}_rank(\d+)\.pt")
        found = {int(match[1]): path for path in self.folder.iterdir() if (match := pattern.fullmatch(path.name))}
        if sorted(found) != list(range(len(found))):
            ranks = ", ".join(map(str, sorted(found)))
            raise PublicRunError(f"{self.folder} has optimizer files of ranks {ranks} at step {self.step}: not of all")
        return [found[rank] for rank in sorted(found)]


# --- what is there


def find_runs(root: Path) -> list[PublicCheckpoint]:
    """Every public checkpoint under `root`: by stage, tag and ascending step. Empty when there is none."""
    found = []
    for stage, name in paths.CHECKPOINT_FOLDERS.items():
        for path in (Path(root) / name).glob("*/model_*.pt"):
            if match := re.fullmatch(r"model_(\d{6,})\.pt", path.name):
                found.append(PublicCheckpoint(stage, path.parent.name, int(match[1]), path.parent))
    order = list(paths.CHECKPOINT_FOLDERS)
    return sorted(found, key=lambda checkpoint: (order.index(checkpoint.stage), checkpoint.tag, checkpoint.step))


def choose(root: Path, tag: str | None = None, step: int | None = None, stages: list[str] | None = None):
    """One PublicCheckpoint for each stage that is there, or that is asked for. Without a tag: the largest d<N>, or
    else the one written last. Without a step: the newest of each stage."""
    found = find_runs(root)
    if not found:
        raise PublicRunError(f"no public run under {root}: expected base_checkpoints/<tag>/model_<step>.pt in it")
    there = "; there are: " + ", ".join(f"{c.stage} {c.tag} step {c.step}" for c in found)
    of_stages = [c for c in found if stages is None or c.stage in stages]
    if tag is None and of_stages:
        tag = max(of_stages, key=lambda c: (_depth(c.tag), c.model.stat().st_mtime)).tag
    chosen = {c.stage: c for c in of_stages if c.tag == tag and step in (None, -1, c.step)}  # the last of each
    missing = [stage for stage in stages or [] if stage not in chosen]
    if missing or not chosen:
        wanted = " ".join([*missing, *([tag] if tag else []), *([f"step {step}"] if step is not None else [])])
        raise PublicRunError(f"{root} has no {wanted}{there}")
    return list(chosen.values())


def _depth(tag: str) -> int:
    match = re.fullmatch(r"d(\d+)", tag)
    return int(match[1]) if match else -1


# --- importing


def import_run(
    root: Path,
    tokenizer_name: str | None = None,
    tag: str | None = None,
    step: int | None = None,
    stages: list[str] | None = None,
    new_tag: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write our checkpoint of each chosen public one (see `choose`), and our tokenizer. Returns the new folders.

    new_tag: the name of the model here (default: as it was). tokenizer_name: that of the tokenizer (default: the one by
    which base_train and nanochat.dataset look for it with CORPUS, climbmix-32768). force: replace what is here of the
    same name and step. Each checkpoint is complete or not there at all. Raises PublicRunError; without force, nothing
    that was here before is ever changed. OSError where the disk is full.
    """
    root = Path(root).expanduser()
    for name in (new_tag, tokenizer_name):
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise PublicRunError(f"a model or a tokenizer is named by letters, digits and . _ -; got {name!r}")
    chosen = choose(root, tag, step, stages)
    tokenizer = read_tokenizer(root / "tokenizer" / "tokenizer.pkl")
    tokenizer_name = tokenizer_name or f"{CORPUS}-{tokenizer.vocab_size}"
    metas = [_read_public_meta(checkpoint, tokenizer.vocab_size) for checkpoint in chosen]
    folders = [paths.checkpoint_dir(checkpoint.stage, new_tag or checkpoint.tag) for checkpoint in chosen]
    if not force:
        _check_room(chosen, folders, tokenizer, tokenizer_name)
    written = []
    for checkpoint, (public_meta, config), folder in zip(chosen, metas, folders, strict=True):
        partial = folder / f".step_{checkpoint.step:06d}.partial"
        meta = _our_meta(checkpoint, public_meta, config, folder.name, tokenizer, tokenizer_name)
        try:
            _write_checkpoint(checkpoint, config, partial, meta)
            _keep_tokenizer(tokenizer, tokenizer_name)
            written.append(step_folder(folder, checkpoint.step))
            paths.put_in_place(partial, written[-1])
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return written


def _check_room(chosen, folders, tokenizer, tokenizer_name) -> None:
    """That nothing here goes under, and that no tag comes to hold steps of two runs."""
    for checkpoint, folder in zip(chosen, folders, strict=True):
        for step in list_steps(folder):
            origin = read_meta(step_folder(folder, step)).get("imported", {}).get("from")
            if step == checkpoint.step or origin is None or Path(origin).parent != checkpoint.folder.absolute():
                raise PublicRunError(
                    f"{step_folder(folder, step)} is here already: import under another name with --model-tag, "
                    "or replace what is of the same step with --force"
                )
    if (paths.tokenizer_dir(tokenizer_name) / "tokenizer.json").exists():
        if Tokenizer.load(paths.tokenizer_dir(tokenizer_name)).fingerprint != tokenizer.fingerprint:
            raise PublicRunError(
                f"another tokenizer is here under the name {tokenizer_name}: import under another name with "
                "--tokenizer-name, or put it in the old one's place with --force"
            )


def _keep_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Other models may have been trained with a tokenizer that has this name: it is moved, not lost."""
    path = paths.tokenizer_dir(name) / "tokenizer.json"
    if path.exists():
        if Tokenizer.load(path.parent).fingerprint == tokenizer.fingerprint:
            return
        old = path.with_name(f"tokenizer.json.before-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(old)
        print(f"another tokenizer had the name {name}: it is in {old} now", flush=True)
    tokenizer.save(path.parent)


def _write_checkpoint(checkpoint: PublicCheckpoint, config: GPTConfig, partial: Path, meta: dict) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    with torch.device("meta"):
        model = GPT(config)
    _write_tensors(partial, saver.MODEL, read_weights(checkpoint.model, model))
    ranks = checkpoint.optimizer
    for rank, path in enumerate(ranks):  # a file at a time: the moments are twice as large as the model
        steps, tensors = read_moments(path, model, rank, len(ranks))
        meta["optimizer_steps"] = steps
        _write_tensors(partial, f"optim_{rank:05d}.safetensors", tensors)
    if not ranks:
        print(f"{checkpoint.folder} has no optimizer state of step {checkpoint.step}: the import has none", flush=True)
    saver.write(partial, {}, meta)


def _write_tensors(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    saver.write(folder, {name: tensors}, None, needed=sum(tensor.nbytes for tensor in tensors.values()))


# --- meta


def _read_public_meta(checkpoint: PublicCheckpoint, vocab_size: int) -> tuple[dict, GPTConfig]:
    try:
        meta = json.loads(checkpoint.meta.read_text(encoding="utf-8"))
        given = dict(meta["model_config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PublicRunError(
            f"{checkpoint.meta} cannot be read ({type(error).__name__}: {error}); "
            f"it belongs beside {checkpoint.model.name}: fetch it again"
        ) from error
    known = [field.name for field in fields(GPTConfig)]
    if given.keys() != set(known):
        differing = ", ".join(f"{name!a:.50}" for name in sorted(given.keys() ^ set(known))[:5])
        raise PublicRunError(
            f"{checkpoint.meta}: unknown or missing in model_config: {differing}; {OTHER_ARCHITECTURE}"
        )
    for name in (name for name in known if name != "window_pattern"):
        value, largest = given[name], LONGEST_CONFIG.get(name, 1 << 24)
        if type(value) is not int or not 0 < value <= largest:
            raise PublicRunError(f"{checkpoint.meta}: {name} is {value!r:.50}, expected a number from 1 to {largest}")
    try:
        config = GPTConfig(**given)
    except (ValueError, AttributeError, TypeError) as error:
        raise PublicRunError(f"{checkpoint.meta}: {error}") from error
    if config.vocab_size != vocab_size:
        raise PublicRunError(
            f"{checkpoint.meta}: the model has a vocabulary of {config.vocab_size}, the tokenizer one of {vocab_size}: "
            "they are not of the same run"
        )
    return meta, config


def _our_meta(checkpoint, public, config, tag, tokenizer, tokenizer_name) -> dict:
    """What our scripts read of a checkpoint. Rows and shards are those of the public loader, which we do not have."""
    flags = public.get("user_config") if isinstance(public.get("user_config"), dict) else {}
    rates = {name: flags[name] if _is_positive(flags.get(name), (int, float)) else RATES[name] for name in RATES}
    batches = {}
    for name, default in BATCHES.items():
        said = [value for value in (public.get(name), flags.get(name)) if _is_positive(value, int)]
        batches[name] = (said or [default])[0]
        if not said and checkpoint.stage == "base":
            print(f"{checkpoint.meta.name} does not say its {name.replace('_', ' ')}: taken as {default}", flush=True)
    return {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtype": "float32",
        "stage": checkpoint.stage,
        "tag": tag,
        "model_config": config.__dict__,
        "tokenizer": {"name": tokenizer_name, "fingerprint": tokenizer.fingerprint},
        "rows": {"loader": "of the public nanochat"},
        "corpus": CORPUS,
        "shards": [],
        "flags": rates,
        "plan": {"total_batch_size": batches["total_batch_size"]},
        "device_batch_size": batches["device_batch_size"],
        "imported": {"from": str(checkpoint.model.absolute()), "public_meta": public},
    }


def _is_positive(value, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0
