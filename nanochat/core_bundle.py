"""The evaluation bundle of CORE on disk: found, downloaded, checked, read.

A bundle is a folder with `core.yaml` (the tasks), `eval_meta_data.csv` (their random baselines, in percent) and
`eval_data/` (one JSON object a line).
"""

import csv
import json
import random
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock
import yaml

from nanochat import paths
from nanochat.download import plain_file

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FIELDS = {  # kind -> what a row must hold
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # a key of FIELDS
    shots: int
    delimiter: str
    baseline: float  # accuracy of guessing, a fraction
    path: Path


def find_bundle(name_or_path: str | Path = "eval_bundle") -> Path:
    """The folder of a bundle: a path, or a name looked up in the base folder and in the mirror. `eval_bundle` is
    downloaded when it is nowhere; any other missing bundle is a ValueError."""
    mirror, name = paths.data_mirror(), str(name_or_path)
    places = [Path(name_or_path), paths.eval_bundle_dir(name)] + ([mirror / name] if mirror else [])
    for place in places:
        if (place / "core.yaml").is_file():
            return place
    if name != "eval_bundle":
        mend = "python -m nanochat.tinyworld" if "tinyworld" in name else "python -m scripts.base_eval --eval core"
        looked = ", ".join(str(place) for place in places[1:])
        raise ValueError(f"no evaluation bundle {name!r}: no core.yaml in it (looked in {looked}); make one: {mend}")
    target = paths.eval_bundle_dir(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f"{name}.lock"):
        if not (target / "core.yaml").is_file():
            unzip_bundle(plain_file(BUNDLE_URL, "eval_bundle.zip"), target)
    return target


def unzip_bundle(archive: Path, target: Path) -> None:
    """Unpacks the folder `eval_bundle/` of a zip file as `target`, whole or not at all."""
    scratch = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as bundle:
            for member in bundle.namelist():
                where = PurePosixPath(member.replace("\\", "/"))
                if where.is_absolute() or ".." in where.parts or ":" in where.parts[0]:
                    raise ValueError(f"{archive}: entry {member!r} would be written outside its folder; not unpacked")
            bundle.extractall(scratch)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a whole zip file ({error}); delete it and run the command again") from None
    if not (scratch / "eval_bundle" / "core.yaml").is_file():
        raise ValueError(f"{archive} holds no eval_bundle/core.yaml; delete it and run the command again")
    shutil.rmtree(target, ignore_errors=True)  # a folder without core.yaml: left by something else
    (scratch / "eval_bundle").rename(target)
    shutil.rmtree(scratch)


def load_bundle(directory: Path) -> list[CoreTask]:
    """The tasks of a bundle, in its order. Baselines come from `eval_meta_data.csv` (the old edition of the table is
    the one behind published numbers). ValueError names the file that is missing or wrong."""
    listing, table = Path(directory) / "core.yaml", Path(directory) / "eval_meta_data.csv"
    for file in (listing, table):
        if not file.is_file():
            raise ValueError(f"{file} is missing; remove {directory} and run: python -m scripts.base_eval --eval core")
    try:
        entries = yaml.safe_load(listing.read_text(encoding="utf-8"))["icl_tasks"]
        with open(table, newline="", encoding="utf-8") as file:
            percent = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: core.yaml or eval_meta_data.csv cannot be read: {error!r}") from None
    if not entries:
        raise ValueError(f"{listing} lists no tasks")
    return [_task(entry, percent, Path(directory)) for entry in entries]


def _task(entry: dict, percent: dict[str, float], directory: Path) -> CoreTask:
    listing, missing = directory / "core.yaml", {"label", "dataset_uri", "num_fewshot", "icl_task_type"} - set(entry)
    if missing:
        raise ValueError(f"{listing}: the task {entry.get('label', entry)} lacks {', '.join(sorted(missing))}")
    label, kind, path = entry["label"], entry["icl_task_type"], directory / "eval_data" / entry["dataset_uri"]
    if kind not in FIELDS:
        raise ValueError(f"{listing}: {label} has icl_task_type {kind!r}; known are {', '.join(FIELDS)}")
    if not 0 <= percent.get(label, -1) < 100:
        raise ValueError(f"{directory / 'eval_meta_data.csv'}: no random baseline of 0 to 99 percent for {label}")
    if not path.is_file():
        raise ValueError(f"{path}, the data of {label}, is missing: unpack the bundle again into {directory}")
    return CoreTask(
        label, kind, int(entry["num_fewshot"][0]), entry.get("continuation_delimiter", " "), percent[label] / 100, path
    )


def read_rows(task: CoreTask, max_per_task: int = -1) -> list[dict]:
    """The examples of a task, shuffled as every run shuffles them, then cut to `max_per_task` (-1: all)."""
    if max_per_task == 0 or max_per_task < -1:
        raise ValueError(f"examples of a CORE task at most: expected 1 or more, or -1 for all, got {max_per_task}")
    rows = []
    with open(task.path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_checked(line, task, number))
    if not rows:
        raise ValueError(f"{task.path}, the data of {task.label}, has no rows")
    random.Random(1337).shuffle(rows)
    return rows if max_per_task < 0 else rows[:max_per_task]


def _checked(line: str, task: CoreTask, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{task.path}, line {number}: not JSON ({error})") from None
    for field, wanted in FIELDS[task.kind].items():
        fits = isinstance(row, dict) and isinstance(row.get(field), wanted)
        if not fits:
            raise ValueError(f"{task.path}, line {number}: a {task.kind} row needs {field} as {wanted.__name__}")
    if "gold" in FIELDS[task.kind]:
        alternatives = row["choices"] if task.kind == "multiple_choice" else row["context_options"]
        if not 0 <= row["gold"] < len(alternatives):
            raise ValueError(f"{task.path}, line {number}: gold {row['gold']} of {len(alternatives)} alternatives")
    return row
