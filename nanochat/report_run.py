"""The results of one model, as its stages left them, and numbers out of them that know where they stand.

What a report works out itself (totals, costs, ratios) is written to `results/TAG/report.json` first, and taken from
there.
"""

import re
import subprocess
from pathlib import Path

from nanochat import machines, paths
from nanochat.report_pages import Number, Table
from nanochat.report_shapes import fault, is_number
from nanochat.results import duration, parsed, read

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
PROBLEM = {"task", "correct", "prompt", "expected", "answers"}  # what a problem is shown by
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
    """6586514 -> 6.59 million."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


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
    """stages: name -> its JSON, None where it has not run; `report`: what was worked out from them. damaged: stage ->
    what is wrong with its file."""

    def __init__(self, tag: str, seconds: float | None = None, price: float | None = None, one_of: int = 1):
        """seconds: of the whole speedrun; without it, what a former report of the same stages was told, or their sum.
        price: dollars per hour of one GPU, in place of the former or the table's. one_of: how many models the report is
        about; with others, numbers say whose they are."""
        self.tag, self.whose, self.damaged = tag, (tag,) if one_of > 1 else (), {}
        self.stages = {stage: self.read(tag, stage) for stage in MODEL_STAGES}
        if not any(self.stages.values()):
            raise ValueError(
                "; ".join(self.damaged.values())
                or f"no results of a model {tag!r} under {paths.results_dir(tag)}; check --model-tag"
            )
        named = next((found["tokenizer"] for found in self.stages.values() if found and found.get("tokenizer")), None)
        self.tokenizer = named.get("name") if isinstance(named, dict) else named
        corpus = (self.stages["base_train"] or {}).get("corpus")
        before = {stage: self.read(corpus, stage) for stage in CORPUS_STAGES}
        before |= {stage: self.read(self.tokenizer, stage) for stage in TOKENIZER_STAGES}
        self.stages = before | self.stages
        self.logs = {stage: read_log(paths.results_dir(tag) / f"{stage}.jsonl") for stage in TRAINED}
        taken = seconds_of(self.stages)
        former = self.read(tag, "report") or {}
        if former.get("seconds") == taken:
            paid = former.get("cost") or {}
            seconds = former.get("speedrun_seconds") if seconds is None else seconds
            price = paid["dollars_per_device_hour"] if price is None and paid.get("price_of") == "--price" else price
        self.stages["rehearsal"] = self.read(tag, "rehearsal")
        self.stages["report"] = worked_out(tag, self.stages, self.damaged, taken, seconds, price)

    def read(self, tag: str | None, stage: str) -> dict | None:
        """A stage's JSON; nothing where there is none, or it is damaged, which is kept in mind."""
        try:
            found = read(tag, stage) if tag else None
            wrong = "" if found is None else fault(stage, found)
        except ValueError as error:  # no JSON, or no text
            wrong = str(error)
        if not wrong:
            return found
        self.damaged[stage] = f"{paths.results_dir(tag) / stage}.json is damaged: {wrong}"
        return None

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
        return None if not is_number(value) else Number(value, show(value), source(*self.whose, stage, *path))

    def table(self, stage: str, *path) -> Table:
        """All of what stands there, whatever it is, but for what has parts of its own."""
        rows = [
            [words(key), self.number(stage, *path, key) or str(value)]
            for key, value in self.get(stage, *path, default={}).items()
            if value is not None and not isinstance(value, (dict, list))
        ]
        return Table([words(path[-1]), ""], rows)

    def problems(self, stage: str) -> list[dict]:
        """Of each task the first problem that went right and the first that went wrong."""
        shown: dict[tuple, dict] = {}
        for problem in read_lines(paths.results_dir(self.tag) / f"{stage}.problems.jsonl"):
            if PROBLEM <= problem.keys():
                shown.setdefault((problem["task"], bool(problem["correct"])), problem)
        return list(shown.values())

    @property
    def missing(self) -> list[str]:
        return self.stages["report"]["missing"]

    @property
    def examined(self) -> list[str]:
        """Of base, sft and rl those with a chat examination."""
        return [name for name in SOURCES if self.has(f"chat_eval_{name}")]


def read_lines(file: Path) -> list[dict]:
    """The lines of a file that are whole; a kill or a full disk may have torn one."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    return [line for line in map(parsed, lines) if isinstance(line, dict)]


def read_log(file: Path) -> list[dict]:
    """What a stage logged, step by step."""
    return [line for line in read_lines(file) if is_number(line.get("step"))]


def source(*path) -> str:
    """Where a number stands: file and place in it."""
    return " › ".join(map(str, path))


# --- what is worked out


def seconds_of(stages: dict) -> dict[str, float]:
    """Of the stages. Downloads run beside others, so they count in the clock of the whole speedrun only."""
    return {stage: stages[stage]["seconds"] for stage in TITLES if stages[stage] and stage not in CORPUS_STAGES}


def worked_out(tag: str, stages: dict, damaged: dict, taken: dict, seconds: float | None, price: float | None) -> dict:
    total = max(seconds or 0.0, sum(taken.values()))
    plan, final = ((stages["base_train"] or {}).get(part) or {} for part in ("plan", "final"))
    found = {
        "tag": tag,
        "code": code_size(),
        "metrics": final_metrics(stages),
        "seconds": taken,
        "between_seconds": total - sum(taken.values()) if seconds else None,
        "total_seconds": total,
        "speedrun_seconds": seconds,
        "cost": cost(stages, taken, total, price),
        "missing": [stage for stage in TITLES if not stages[stage] and stage not in OPTIONAL],
        "damaged": damaged,
        "not_run": [stage for stage in OPTIONAL if not stages[stage]],
    }
    if is_number(final.get("tokens")) and is_number(plan.get("scaling_params")) and plan["scaling_params"]:
        found["tokens_per_scaling_parameter"] = final["tokens"] / plan["scaling_params"]
    if stages["tok_eval"]:
        found["bytes_per_token"] = {
            text: {name: row["bytes"] / count for name, count in row["tokens"].items() if count}
            for text, row in stages["tok_eval"]["texts"].items()
        }
    num_tasks = len(((stages["base_eval"] or {}).get("core") or {}).get("tasks", ()))
    return found | {
        "mean_chat_accuracy": mean_accuracy(stages),
        "tasks_above": tasks_above(stages),
        "num_tasks": num_tasks,
    }


def tasks_above(stages: dict) -> dict[str, int]:
    """GPT-2 model -> in how many tasks of CORE the model is better."""
    core = (stages["base_eval"] or {}).get("core") or {}
    above: dict[str, int] = {}
    for task, references in (core.get("references_by_task") or {}).items():
        for name, value in references.items():
            above[name] = above.get(name, 0) + (task in core["tasks"] and core["tasks"][task]["centered"] > value)
    return above


def mean_accuracy(stages: dict) -> dict[str, float]:
    """base, sft, rl -> the mean over the chat tasks that all of those examined have in common."""
    tasks = {name: found["tasks"] for name in SOURCES if (found := stages[f"chat_eval_{name}"])}
    common = set.intersection(*map(set, tasks.values())) - set(MISTAKES) if tasks else set()
    return {
        name: sum(found[kind]["accuracy"] for kind in common) / len(common) for name, found in tasks.items() if common
    }


def cost(stages: dict, taken: dict, total: float, price: float | None) -> dict | None:
    """In dollars, at a price for an hour of one device: the one given, or the table's for its name."""
    where = next((found["environment"] for found in stages.values() if found and found.get("environment")), {})
    trained = (stages["base_train"] or {}).get("environment") or where
    known = machines.find(trained.get("device") or "")
    said_by = "--price" if price is not None else "a usual price of this GPU"
    price = price if price is not None else known.dollars if known else None
    if price is None:
        return None
    hourly = price * trained.get("world_size", 1)
    by_stage = {stage: seconds / 3600 * hourly for stage, seconds in taken.items()}
    return {
        "dollars_per_device_hour": price, "price_of": said_by, "devices": trained.get("world_size", 1),
        "dollars_by_stage": by_stage, "dollars": total / 3600 * hourly,
    }  # fmt: skip


def validation_bpb(stages: dict) -> float | None:
    measured = ((stages["base_eval"] or {}).get("bpb") or {}).get("val")
    if measured is None:
        measured = ((stages["base_train"] or {}).get("final") or {}).get("val_bpb")
    return measured if is_number(measured) else None


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
    put("CORE", "base", (base.get("core") or {}).get("metric"))
    put("bits per byte, train", "base", (base.get("bpb") or {}).get("train"))
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
