"""Where every artifact lives, and how a small one is written. Paths are computed on call; whoever writes a file makes
its folder."""

import json
import os
import shlex
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

CHECKPOINT_FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def base_dir() -> Path:
    """The one artifact root: `NANOCHAT_BASE_DIR`, or `~/.cache/nanochat`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def corpus_dir(name: str) -> Path:
    return base_dir() / "corpora" / name


def tokenizer_dir(name: str) -> Path:
    return base_dir() / "tokenizers" / name


def checkpoint_dir(stage: str, tag: str = "") -> Path:
    """Checkpoints of one model; without a tag, the folder that holds the tags. stage: base, sft or rl."""
    return base_dir() / CHECKPOINT_FOLDERS[stage] / tag


def results_dir(tag: str) -> Path:
    return base_dir() / "results" / tag


def sweep_dir(name: str) -> Path:
    """Of several runs that belong together: what was asked for, and what was made of them."""
    return base_dir() / "sweeps" / name


def scores_file() -> Path:
    return base_dir() / "results" / "scores.json"


def report_dir() -> Path:
    return base_dir() / "report"


def task_dir() -> Path:
    """Data sets that chat tasks were fetched into."""
    return base_dir() / "task_data"


def eval_bundle_dir(name: str = "eval_bundle") -> Path:
    return base_dir() / name


def compile_cache_dir() -> Path:
    """Code that torch.compile and flash-attn made for this machine."""
    return base_dir() / "compiled"


def machine_file() -> Path:
    """What scripts.doctor found, by device and version of torch."""
    return base_dir() / "machine.json"


def conversations_file() -> Path:
    """What was said to `chat_web --log-conversations`."""
    return base_dir() / "conversations.jsonl"


def data_mirror() -> Path | None:
    """A local folder that is looked into before the network (`NANOCHAT_DATA_MIRROR`)."""
    mirror = os.environ.get("NANOCHAT_DATA_MIRROR")
    return Path(mirror).expanduser() if mirror else None


def hf_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def child_environment(base: Path, code: Path) -> dict[str, str]:
    """The environment of a process whose artifacts go elsewhere, and that finds our code from wherever it runs."""
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path}


def write_json(path: Path, value) -> None:
    """Atomic: a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def put_in_place(partial: Path, folder: Path) -> None:
    """A folder that is complete gets its name; one that had it goes away only then. Killed between the two, the old one
    is left beside as .NAME.old until the next is in place."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def command_line() -> str:
    """What this process was called by, as one would type it."""
    main = sys.modules["__main__"]
    module = getattr(main.__spec__, "name", None) if getattr(main, "__spec__", None) else None
    return shlex.join([*(["python", "-m", module] if module else [sys.argv[0]]), *sys.argv[1:]])


def write_result(stage: str, tag: str, started: float, summary: dict, spent: float = 0.0) -> None:
    """results/<tag>/<stage>.json: what a stage has found, after who it is and before how long it took. started: by
    time.time(). spent: seconds before that, by processes that this one went on from."""
    when = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
    head = {"stage": stage, "tag": tag, "command": command_line(), "started": when}
    write_json(
        results_dir(tag) / f"{stage}.json", {**head, **summary, "seconds": round(time.time() - started + spent, 2)}
    )
