"""The report card: `report.md` from the JSON that the stages left, and from nothing else.

    python -m nanochat.report generate [--model-tag TAG]
    python -m nanochat.report reset

The numbers that the report works out itself (code size, totals, the final table) are kept as JSON too, in
`results/TAG/report.json`; the scores of a profile in `results/scores.json`.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

from nanochat import paths
from nanochat.results import read

TOKENIZER_STAGES = ("tok_train", "tok_eval")
MODEL_STAGES = ("base_train", "base_eval", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl")
OPTIONAL = ("chat_rl", "chat_eval_rl")
COMMANDS = {  # what makes a stage that is not there
    "tok_train": "python -m scripts.tok_train",
    "tok_eval": "python -m scripts.tok_eval",
    "base_train": "python -m scripts.base_train --model-tag {tag}",
    "base_eval": "python -m scripts.base_eval --model-tag {tag}",
    "chat_sft": "python -m scripts.chat_sft --model-tag {tag}",
    "chat_eval_sft": "python -m scripts.chat_eval -i sft -g {tag}",
    "chat_rl": "python -m scripts.chat_rl --model-tag {tag}",
    "chat_eval_rl": "python -m scripts.chat_eval -i rl -g {tag}",
}
SCORES = (  # chat tasks whose accuracy goes into scores.json
    "facts_new_phrasing",
    "facts_never_asked",
    "arithmetic",
    "arithmetic_hard",
    "counting",
    "multiple_choice",
    "stories",
    "unknown_refused",
    "known_refused",
)
CODE_UNITS = (("files", "Python files"), ("lines", "lines"), ("characters", "characters"))
EXCERPT = 400  # characters of a sample or an answer that are shown


# --- from the results to the numbers of the report


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


def collect(tag: str) -> dict[str, dict | None]:
    """stage -> its JSON, None where it has not run."""
    stages = {stage: read(tag, stage) for stage in MODEL_STAGES}
    if not any(stages.values()):
        raise ValueError(f"no results of a model {tag!r} under {paths.results_dir(tag)}; check --model-tag")
    tokenizer = next((found["tokenizer"] for found in stages.values() if found and found.get("tokenizer")), None)
    name = tokenizer.get("name") if isinstance(tokenizer, dict) else tokenizer
    before = {stage: read(name, stage) if name else None for stage in TOKENIZER_STAGES}
    return before | stages


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


def last_chat_eval(stages: dict) -> dict | None:
    return stages["chat_eval_rl"] or stages["chat_eval_sft"]


def validation_bpb(stages: dict) -> float | None:
    measured = (stages["base_eval"] or {}).get("bpb", {}).get("val")
    return measured if measured is not None else (stages["base_train"] or {}).get("final", {}).get("val_bpb")


def scores(tag: str, stages: dict, seconds: float | None = None) -> dict:
    """The profile's scores as fractions by name; a score that was not measured is left out."""
    tasks = (last_chat_eval(stages) or {}).get("tasks", {})
    found = {name: tasks[name]["accuracy"] for name in SCORES if name in tasks}
    bpb = validation_bpb(stages)
    found |= {"bpb": bpb} if bpb is not None else {}
    return {"tag": tag, **found, "seconds": seconds or total_seconds(stages)}


def total_seconds(stages: dict) -> float:
    """Of the stages that leave results; a speedrun's own clock counts the other stages and start-up times too."""
    return sum(found.get("seconds", 0) for found in stages.values() if found)


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
    for column in ("sft", "rl"):
        found = stages[f"chat_eval_{column}"] or {}
        for name, task in found.get("tasks", {}).items():
            put(name, column, task["accuracy"])
    for column in ("sft", "rl"):
        put("ChatCORE", column, (stages[f"chat_eval_{column}"] or {}).get("chatcore"))
    return table


# --- Markdown


def number(value, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.3e}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def table(header: list[str], rows: list[list]) -> str:
    def line(cells):
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    ruler = "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"
    return "\n".join([line(header), ruler, *(line(row) for row in rows)])


def bullets(values: dict) -> str:
    return "\n".join(f"- {key}: {number(value)}" for key, value in values.items() if value is not None)


def verbatim(text: str) -> str:
    """An indented block: nothing that a model writes can end it."""
    cut = text if len(text) <= EXCERPT else text[:EXCERPT] + " [...]"
    return "\n".join("    " + line for line in cut.splitlines() or [""])


def missing(stage: str, tag: str) -> str:
    return f"*Not there: `{stage}.json`. Make it with* `{COMMANDS[stage].format(tag=tag)}`"


def headline(tag: str, stages: dict, seconds: float | None = None) -> str:
    train, measured = stages["base_train"] or {}, scores(tag, stages)
    core = (stages["base_eval"] or {}).get("core", {}).get("metric")
    chat = (last_chat_eval(stages) or {}).get("chatcore")
    parts = [
        ("parameters", train.get("model", {}).get("counts", {}).get("total")),
        ("training tokens", train.get("final", {}).get("tokens")),
        ("validation bits per byte", measured.get("bpb")),
        ("CORE", core),
        ("ChatCORE", chat),
    ]
    told = ", ".join(f"{name} {number(value)}" for name, value in parts if value is not None)
    gone = [stage for stage in stages if not stages[stage] and stage not in OPTIONAL]
    lines = [f"**{tag}**: {told or 'nothing measured yet'}; {duration(measured['seconds'])} of work in all."]
    if gone:
        lines.append(f"Missing stages: {', '.join(gone)}.")
    return "\n\n".join(lines)


def environment(stages: dict) -> str:
    rows = []
    for stage, found in stages.items():
        where = (found or {}).get("environment", {})
        if where:
            keys = ("device", "world_size", "dtype", "torch", "python", "platform", "nanochat", "git_commit")
            rows.append([stage, *(number(where.get(key)) for key in keys)])
    head = ["stage", "device", "ranks", "dtype", "torch", "python", "platform", "nanochat", "commit"]
    return table(head, rows) if rows else "*No stage has written its environment.*"


def code(size: dict) -> str:
    counts = ", ".join(f"{size[key]:,} {name}" for key, name in CODE_UNITS)
    return f"{counts} ({size['counted_by']})."


def tokenizer_training(found: dict) -> str:
    keys = ("tokenizer", "vocab_size", "documents", "characters", "bytes_per_token", "fingerprint")
    return bullets({key.replace("_", " "): found.get(key) for key in keys} | {"time": duration(found.get("seconds"))})


def tokenizer_evaluation(found: dict) -> str:
    names = found["encoders"]
    rows = []
    for kind, row in found["texts"].items():
        counts = [row["tokens"].get(name) for name in names]
        ratios = [f"{row['bytes'] / count:.2f}" if count else "-" for count in counts]
        rows.append([kind, number(row["bytes"]), *(f"{number(c)} ({r})" for c, r in zip(counts, ratios, strict=True))])
    text = table(["text", "bytes", *(f"{name}: tokens (bytes each)" for name in names)], rows)
    return text if len(names) > 1 else text + "\n\nGPT-2's and GPT-4's encodings could not be loaded there."


def flat(values: dict) -> dict:
    """Nested dicts as one, a blank between names: plan, model counts and the like are shown whatever is in them."""
    found = {}
    for key, value in values.items():
        name = str(key).replace("_", " ")
        if isinstance(value, dict):
            found |= {f"{name}: {inner}": inside for inner, inside in flat(value).items()}
        elif not isinstance(value, list):
            found[name] = value
    return found


def training(found: dict) -> str:
    parts = [bullets(flat(found.get("final", {})) | {"time": duration(found.get("seconds"))})]
    for key in ("plan", "model"):
        if found.get(key):
            parts.append(f"### {key.capitalize()}\n\n{bullets(flat(found[key]))}")
    told = flat({key: found[key] for key in ("tokenizer", "corpus", "rows", "conversations") if key in found})
    if told:
        parts.append("### Data\n\n" + bullets(told))
    return "\n\n".join(parts)


def practice(found: dict) -> str:
    """Reinforcement learning: how it went, and what it did to held-out questions."""
    parts = [bullets(flat(found.get("final", {})) | {"time": duration(found.get("seconds"))})]
    for key, title in {"course": "Means of the steps up to each", "examinations": "Held-out questions"}.items():
        if lines := found.get(key):
            names = list(lines[0])
            head = [name.replace("_", " ") for name in names]
            parts.append(
                f"### {title}\n\n" + table(head, [[number(line.get(name)) for name in names] for line in lines])
            )
    return "\n\n".join(parts)


def base_evaluation(found: dict) -> str:
    parts = []
    if found.get("bpb"):
        parts.append("### Bits per byte\n\n" + bullets(found["bpb"]))
    core = found.get("core")
    if core:
        rows = [
            [label, number(row["accuracy"]), number(row.get("baseline")), number(row["centered"]), row["examples"],
             duration(row["seconds"])]
            for label, row in core["tasks"].items()
        ]  # fmt: skip
        rows.append(["**CORE**", "", "", f"**{number(core['metric'])}**", "", ""])
        if "interval" in core:
            rows.append(["95 % interval", "", "", " to ".join(map(number, core["interval"])), "", ""])
        rows += [[name, "", "", number(value), "", ""] for name, value in core.get("references", {}).items()]
        parts.append(
            f"### CORE\n\nBundle `{core['bundle']}`, baselines of `{core['baselines']}`.\n\n"
            + table(["task", "accuracy", "baseline", "centered", "examples", "time"], rows)
        )
    samples = found.get("samples")
    if samples:
        said = [f"**{one['prompt']}**\n\n{verbatim(one['text'])}" for one in samples["prompted"]]
        free = [verbatim(text) for text in samples["unconditioned"]]
        parts += ["### Samples\n\n" + "\n\n".join(said), "### Samples without a prompt\n\n" + "\n\n---\n\n".join(free)]
    return "\n\n".join(parts) or "*Nothing was evaluated.*"


def chat_evaluation(found: dict) -> str:
    rows = [
        [
            name + "".join(f" (pass@{n})" for n in list(row.get("pass@k", {}))[-1:]),
            number(row["accuracy"]),
            number(row["baseline"]),
            row["problems"],
            duration(row["seconds"]),
        ]
        for name, row in found["tasks"].items()
    ]
    if found.get("chatcore") is not None:
        rows.append(["**ChatCORE**", f"**{number(found['chatcore'])}**", "", "", ""])
    return table(["task", "accuracy", "baseline", "problems", "time"], rows)


def problems(path: Path) -> str:
    """Of each task the first problem that went right and the first that went wrong."""
    if not path.is_file():
        return f"*Not there: `{path.name}`.*"
    shown: dict[tuple, dict] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            problem = json.loads(line)
            shown.setdefault((problem["task"], bool(problem["correct"])), problem)
    parts = []
    for (task, correct), problem in shown.items():
        answers = "\n".join(problem.get("said", problem["answers"])) or "(nothing)"
        parts.append(
            f"**{task}**, {'right' if correct else 'wrong'}\n\n{verbatim(problem['prompt'])}\n\nanswer:\n\n"
            f"{verbatim(answers)}\n\nexpected:\n\n{verbatim(problem['expected'])}"
        )
    return "\n\n".join(parts)


def final_table(stages: dict) -> str:
    columns = ["base", "sft"] + (["rl"] if stages["chat_eval_rl"] else [])
    rows = [[metric, *(number(row.get(column)) for column in columns)] for metric, row in final_metrics(stages).items()]
    return table(["metric", *columns], rows) if rows else "*No metric yet.*"


def wall_clock(stages: dict, seconds: float | None = None) -> str:
    rows = [
        [stage, found.get("started", "-"), duration(found.get("seconds"))] for stage, found in stages.items() if found
    ]
    rows.append(["**total**", "", f"**{duration(total_seconds(stages))}**"])
    if seconds:
        rows.append(["**speedrun, data and start-up included**", "", f"**{duration(seconds)}**"])
    return table(["stage", "started", "time"], rows)


def markdown(tag: str, stages: dict, size: dict, seconds: float | None = None) -> str:
    sections = [
        ("Environment", environment(stages)),
        ("Size of the code", code(size)),
    ]
    rooms = {
        "tok_train": ("Tokenizer: training", tokenizer_training),
        "tok_eval": ("Tokenizer: evaluation", tokenizer_evaluation),
        "base_train": ("Base model: training", training),
        "base_eval": ("Base model: evaluation", base_evaluation),
        "chat_sft": ("Fine-tuning (SFT)", training),
        "chat_eval_sft": ("Chat evaluation after SFT", chat_evaluation),
        "chat_rl": ("Reinforcement learning", practice),
        "chat_eval_rl": ("Chat evaluation after RL", chat_evaluation),
    }
    for stage, (title, room) in rooms.items():
        found = stages[stage]
        if found or stage not in OPTIONAL:
            sections.append((title, room(found) if found else missing(stage, tag)))
        if found and stage.startswith("chat_eval"):
            listing = paths.results_dir(tag) / f"{stage}.problems.jsonl"
            sections.append(("Some problems and answers", problems(listing)))
    sections += [("Metrics by stage", final_table(stages)), ("Wall-clock time", wall_clock(stages, seconds))]
    rooms = (f"## {title}\n\n{text}" for title, text in sections)
    body = [f"# nanochat report: {tag}", headline(tag, stages, seconds), *rooms]
    return "\n\n".join(body) + "\n"


# --- commands


def generate(tag: str | None = None, seconds: float | None = None) -> Path:
    """Writes report.md (into the report folder and the current one), report.json and scores.json.

    seconds: what the whole speedrun took; without it, the sum of the stages stands for it.
    """
    tag = tag or choose_tag()
    stages, size = collect(tag), code_size()
    summary = {
        "tag": tag,
        "code": size,
        "metrics": final_metrics(stages),
        "seconds": {stage: found.get("seconds") for stage, found in stages.items() if found},
        "total_seconds": seconds or total_seconds(stages),
        "missing": [stage for stage, found in stages.items() if not found],
    }
    paths.write_json(paths.results_dir(tag) / "report.json", summary)
    paths.write_json(paths.scores_file(), scores(tag, stages, seconds))
    text = markdown(tag, stages, size, seconds)
    target = paths.report_dir() / "report.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in (target, Path.cwd() / "report.md"):
        file.write_text(text, encoding="utf-8")
    return target


def reset() -> int:
    """Removes the files of the report folder; the results they were made of stay."""
    files = [file for file in paths.report_dir().glob("*") if file.is_file()]
    for file in files:
        file.unlink()
    return len(files)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("generate", "reset"))
    parser.add_argument("--model-tag", help="which model (default: the largest d<N>, else the newest)")
    parser.add_argument("--seconds", type=float, help="what the whole speedrun took, start-up times included")
    return parser.parse_args(argv)


def main(args):
    if args.action == "reset":
        print(f"{reset()} files removed from {paths.report_dir()}; results stay in {paths.results_dir('')}")
        return
    try:
        path = generate(args.model_tag, args.seconds)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"scores: {paths.scores_file()}")
    print(f"report: {path} (and ./report.md)")


if __name__ == "__main__":
    main(parse_args())
