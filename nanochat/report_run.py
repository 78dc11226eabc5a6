"""The results of one model, as its stages left them, and numbers out of them that know where they stand.

What a report works out itself (totals, costs, ratios) is written to `results/TAG/report.json` first, and taken from
there.
"""

import json
import re
import subprocess
from pathlib import Path

from nanochat import machines, paths
from nanochat.report_pages import Number, Table
from nanochat.results import parsed, read

CORPUS_STAGES = ("data",)
TOKENIZER_STAGES = ("tok_train", "tokenize", "tok_eval")
MODEL_STAGES = (
    "base_train",
    "base_eval",
    "chat_eval_base",
    "chat_sft",
    "chat_eval_sft",
    "chat_rl",
    "chat_eval_rl",
)
TRAINED = ("base_train", "chat_sft", "chat_rl")  # they log every step
OPTIONAL = ("data", "tokenize", "chat_eval_base", "chat_rl", "chat_eval_rl")
TITLES = {
    "data": "Text",
    "tok_train": "Tokenizer",
    "tokenize": "Text as tokens",
    "tok_eval": "Tokenizer: compression",
    "base_train": "Pretraining",
    "base_eval": "Evaluation of the base model",
    "chat_eval_base": "Chat examination of the base model",
    "chat_sft": "Fine-tuning (SFT)",
    "chat_eval_sft": "Chat examination after SFT",
    "chat_rl": "Reinforcement learning (RL)",
    "chat_eval_rl": "Chat examination after RL",
}
COMMANDS = {  # what makes a stage that is not there
    "data": "python -m nanochat.dataset -n 8",
    "tok_train": "python -m scripts.tok_train",
    "tokenize": "python -m nanochat.dataset tokenize",
    "tok_eval": "python -m scripts.tok_eval",
    "base_train": "python -m scripts.base_train --model-tag {tag}",
    "base_eval": "python -m scripts.base_eval --model-tag {tag}",
    "chat_eval_base": "python -m scripts.chat_eval -i base -g {tag}",
    "chat_sft": "python -m scripts.chat_sft --model-tag {tag}",
    "chat_eval_sft": "python -m scripts.chat_eval -i sft -g {tag}",
    "chat_rl": "python -m scripts.chat_rl --model-tag {tag}",
    "chat_eval_rl": "python -m scripts.chat_eval -i rl -g {tag}",
}
SOURCES = {"base": "base", "sft": "SFT", "rl": "RL"}  # the stages of a model, as people call them
COLOURS = {"base": "c1", "sft": "c2", "rl": "c3"}  # classes of ui/report.css
SCORES = (  # chat tasks whose accuracy goes into scores.json
    "facts_new_phrasing", "facts_never_asked", "arithmetic", "arithmetic_hard", "counting", "multiple_choice",
    "stories", "unknown_refused", "known_refused",
)  # fmt: skip
MISTAKES = ("known_refused",)  # a share of these that is high is bad


# --- how numbers are written


def number(value, digits: int = 4) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def short(value: float) -> str:
    """6586514 -> 6.59 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def dollars(value: float) -> str:
    return f"${value:,.2f}"


def rate(value: float) -> str:
    return f"{value:,.0f}/s"


def scientific(value: float) -> str:
    return f"{value:.2e}"


def to_hundredths(value: float) -> str:
    return f"{value:.2f}"


def words(key: str) -> str:
    return str(key).replace("_", " ")


FORMATS = (number, short, percent, duration, gigabytes, dollars, rate, scientific, to_hundredths)


# --- the results


def choose_tag() -> str:
    """The largest d<N> that has results, else the model that was worked on last."""
    folders = [folder for folder in paths.results_dir("").glob("*") if (folder / "base_train.json").is_file()]
    if not folders:
        raise ValueError(
            f"no results under {paths.results_dir('')}: train a model (bash speedrun.sh) or name one: --model-tag"
        )
    sized = [folder.name for folder in folders if re.fullmatch(r"d\d+", folder.name)]
    if sized:
        return max(sized, key=lambda name: int(name[1:]))
    return max(folders, key=lambda folder: (folder / "base_train.json").stat().st_mtime).name


class Run:
    """stages: name -> its JSON, None where it has not run; `report`: what was worked out from them."""

    def __init__(self, tag: str, seconds: float | None = None, price: float | None = None, one_of: int = 1):
        """seconds: of the whole speedrun; without it, the sum of the stages stands for it. price: dollars per hour of
        one GPU, in place of the table's. one_of: how many models the report is about; with others, numbers say whose
        they are."""
        self.tag, self.whose = tag, (tag,) if one_of > 1 else ()
        self.stages = {stage: read(tag, stage) for stage in MODEL_STAGES}
        if not any(self.stages.values()):
            raise ValueError(f"no results of a model {tag!r} under {paths.results_dir(tag)}; check --model-tag")
        named = next((found["tokenizer"] for found in self.stages.values() if found and found.get("tokenizer")), None)
        self.tokenizer = named.get("name") if isinstance(named, dict) else named
        corpus = (self.stages["base_train"] or {}).get("corpus")
        before = {stage: read(corpus, stage) if corpus else None for stage in CORPUS_STAGES}
        before |= {stage: read(self.tokenizer, stage) if self.tokenizer else None for stage in TOKENIZER_STAGES}
        self.stages = before | self.stages
        self.logs = {stage: read_log(paths.results_dir(tag) / f"{stage}.jsonl") for stage in TRAINED}
        self.stages["report"] = worked_out(tag, self.stages, seconds, price)

    def has(self, stage: str) -> bool:
        return self.stages[stage] is not None

    def get(self, stage: str, *path, default=None):
        """What stands there in a stage's JSON, or the default."""
        found = self.stages[stage]
        for key in path:
            if not isinstance(found, dict) or found.get(key) is None:
                return default
            found = found[key]
        return default if found is None else found

    def number(self, stage: str, *path, show=number) -> Number | None:
        value = self.get(stage, *path)
        return None if value is None else Number(value, show(value), source(*self.whose, stage, *path))

    def table(self, stage: str, *path) -> Table:
        """All of what stands there, whatever it is, but for what has parts of its own."""
        rows = [
            [words(key), self.number(stage, *path, key) if isinstance(value, (int, float)) else str(value)]
            for key, value in self.get(stage, *path, default={}).items()
            if value is not None and not isinstance(value, (dict, list))
        ]
        return Table([words(path[-1]), ""], rows)

    def problems(self, stage: str) -> list[dict]:
        """Of each task the first problem that went right and the first that went wrong."""
        file = paths.results_dir(self.tag) / f"{stage}.problems.jsonl"
        shown: dict[tuple, dict] = {}
        if file.is_file():
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    problem = json.loads(line)
                    shown.setdefault((problem["task"], bool(problem["correct"])), problem)
        return list(shown.values())

    @property
    def missing(self) -> list[str]:
        return self.stages["report"]["missing"]

    @property
    def examined(self) -> list[str]:
        """Of base, sft and rl those with a chat examination."""
        return [name for name in SOURCES if self.has(f"chat_eval_{name}")]


def read_log(file: Path) -> list[dict]:
    """The lines that a stage logged, step by step."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    return [line for line in map(parsed, lines) if line is not None]


def source(*path) -> str:
    """Where a number stands: file and place in it."""
    return " › ".join(map(str, path))


# --- what is worked out


def worked_out(tag: str, stages: dict, seconds: float | None, price: float | None) -> dict:
    taken = {stage: found["seconds"] for stage, found in stages.items() if found and "seconds" in found}
    total = seconds or sum(taken.values())
    plan, final = ((stages["base_train"] or {}).get(part, {}) for part in ("plan", "final"))
    found = {
        "tag": tag,
        "code": code_size(),
        "metrics": final_metrics(stages),
        "seconds": taken,
        "between_seconds": max(0.0, total - sum(taken.values())),
        "total_seconds": total,
        "speedrun_seconds": seconds,
        "cost": cost(stages, total, price),
        "missing": [stage for stage, found in stages.items() if not found and stage not in OPTIONAL],
        "not_run": [stage for stage, found in stages.items() if not found and stage in OPTIONAL],
    }
    if final.get("tokens") and plan.get("scaling_params"):
        found["tokens_per_scaling_parameter"] = final["tokens"] / plan["scaling_params"]
    if stages["tok_eval"]:
        found["bytes_per_token"] = {
            text: {name: row["bytes"] / count for name, count in row["tokens"].items() if count}
            for text, row in stages["tok_eval"]["texts"].items()
        }
    means = {}
    for name in SOURCES:
        tasks = (stages[f"chat_eval_{name}"] or {}).get("tasks", {})
        right = [task["accuracy"] for kind, task in tasks.items() if kind not in MISTAKES]
        if right:
            means[name] = sum(right) / len(right)
    return found | {"mean_chat_accuracy": means}


def cost(stages: dict, total: float, price: float | None) -> dict | None:
    """In dollars, at a price for an hour of one device: the one given, or the table's for its name."""
    where = next((found["environment"] for found in stages.values() if found and "environment" in found), {})
    trained = (stages["base_train"] or {}).get("environment", where)
    known = machines.find(trained.get("device", ""))
    said_by = "--price" if price is not None else "a usual price of this GPU, nanochat/machines.py"
    price = price if price is not None else known.dollars if known else None
    if price is None:
        return None
    hourly = price * trained.get("world_size", 1)
    by_stage = {stage: found["seconds"] / 3600 * hourly for stage, found in stages.items() if found}
    return {
        "dollars_per_device_hour": price, "price_of": said_by, "devices": trained.get("world_size", 1),
        "dollars_by_stage": by_stage, "dollars": total / 3600 * hourly,
    }  # fmt: skip


def validation_bpb(stages: dict) -> float | None:
    measured = (stages["base_eval"] or {}).get("bpb", {}).get("val")
    return measured if measured is not None else (stages["base_train"] or {}).get("final", {}).get("val_bpb")


def scores(tag: str, stages: dict) -> dict:
    """The profile's scores as fractions by name; a score that was not measured is left out."""
    tasks = (stages["chat_eval_rl"] or stages["chat_eval_sft"] or {}).get("tasks", {})
    found = {name: tasks[name]["accuracy"] for name in SCORES if name in tasks}
    bpb = validation_bpb(stages)
    found |= {"bpb": bpb} if bpb is not None else {}
    return {"tag": tag, **found, "seconds": stages["report"]["total_seconds"]}


def final_metrics(stages: dict) -> dict[str, dict[str, float]]:
    """metric -> {"base" | "sft" | "rl": value}, in the order of the final table."""
    table: dict[str, dict[str, float]] = {}

    def put(metric, column, value):
        if value is not None:
            table.setdefault(metric, {})[column] = value

    base = stages["base_eval"] or {}
    put("CORE", "base", base.get("core", {}).get("metric"))
    put("bits per byte, train", "base", base.get("bpb", {}).get("train"))
    put("bits per byte, validation", "base", validation_bpb(stages))
    for column in SOURCES:
        found = stages[f"chat_eval_{column}"] or {}
        for name, task in found.get("tasks", {}).items():
            put(name, column, task["accuracy"])
    for column in SOURCES:
        put("ChatCORE", column, (stages[f"chat_eval_{column}"] or {}).get("chatcore"))
    return table


def code_size() -> dict:
    """Python files of the repository: those that git tracks, else those that lie there."""
    root = Path(__file__).resolve().parent.parent
    try:
        listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True)
        names = listed.stdout.split("\n") if listed.returncode == 0 else []
    except FileNotFoundError:  # no git here
        names = []
    files = [root / name for name in names if name and (root / name).is_file()]
    counted_by = "git ls-files" if files else "folders"
    if not files:
        files = [file for folder in ("nanochat", "tasks", "scripts") for file in sorted((root / folder).rglob("*.py"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return {
        "files": len(files),
        "lines": sum(text.count("\n") for text in texts),
        "characters": sum(len(text) for text in texts),
        "counted_by": counted_by,
    }
