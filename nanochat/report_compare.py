"""Several runs on one page: what came out, how they got there, and in what they differ."""

from collections.abc import Callable

from nanochat.report_charts import Axis, Line, curves, tick
from nanochat.report_pages import Bar, Bars, Chart, Number, Page, Paragraph, Section, Side, Table
from nanochat.report_run import (
    MISTAKES,
    SOURCES,
    TITLES,
    TRAINED,
    Run,
    dollars,
    duration,
    gigabytes,
    number,
    percent,
    rate,
    scientific,
    short,
    source,
    words,
)
from nanochat.report_shapes import is_number
from nanochat.report_training import tokens_a_step

PALETTE = ("c1", "c3", "c2", "c5", "c6", "c4")  # a colour for each run, again from the first after the last
NOT_A_CHOICE = ("run", "model_tag", "device_type", "resume", "resume_from_step", "stop_after")  # flags


def compare(runs: list[Run]) -> Page:
    colour = {run.tag: PALETTE[i % len(PALETTE)] for i, run in enumerate(runs)}
    tags = [run.tag for run in runs]
    sections = [
        Section("Side by side", side_by_side(runs)),
        Section("Curves", curves_of(runs, colour)),
        Section("Chat tasks", chat_tasks(runs, colour)),
        Section("CORE by task", core(runs, colour), "CORE"),
        Section("What differs", differences(runs)),
    ]
    bpb = [(run.number("report", "metrics", "bits per byte, validation", "base"), run.tag) for run in runs]
    measured = sorted((value.value, tag, value) for value, tag in bpb if value is not None)
    said = ("",)
    if measured:
        _, best, value = measured[0]
        said = ("Lowest validation bits per byte: ", value, f" ({best}).")
    return Page(f"nanochat: {', '.join(tags)}", said, [section for section in sections if section.blocks])


def side_by_side(runs: list[Run]) -> list:
    rows = []

    def row(title, *path, show=number):
        values = [run.number(*path, show=show) for run in runs]
        if any(values):
            rows.append([title, *values])

    row("validation bits per byte", "report", "metrics", "bits per byte, validation", "base")
    row("CORE", "base_eval", "core", "metric")
    for name, title in SOURCES.items():
        row(f"chat, {title}: mean of the tasks", "report", "mean_chat_accuracy", name, show=percent)
        row(f"ChatCORE, {title}", f"chat_eval_{name}", "chatcore")
    row("layers", "base_train", "model", "config", "n_layer")
    row("parameters", "base_train", "model", "counts", "total", show=short)
    row("tokens", "base_train", "final", "tokens", show=short)
    row("tokens a step", "base_train", "plan", "total_batch_size")
    row("steps", "base_train", "final", "step")
    row("FLOPs", "base_train", "final", "total_training_flops", show=scientific)
    row("tokens a second", "base_train", "final", "tok_per_sec", show=rate)
    row("MFU", "base_train", "final", "mfu", show=percent)
    row("memory in pretraining", "base_train", "final", "peak_memory_bytes", show=gigabytes)
    row("time of training", "base_train", "final", "total_training_time", show=duration)
    row("time of all stages", "report", "total_seconds", show=duration)
    row("cost", "report", "cost", "dollars", show=dollars)
    lacking = [f"{run.tag}: {', '.join(TITLES[stage] for stage in run.missing)}" for run in runs if run.missing]
    text = f"Not there: {'; '.join(lacking)}."
    return [Table(["", *(run.tag for run in runs)], rows), *([Paragraph((text,))] if lacking else [])]


def curves_of(runs: list[Run], colour: dict) -> list:
    charts = [
        chart(runs, colour, "Validation bits per byte, by tokens", "base_train", "val/bpb", "tokens"),
        chart(runs, colour, "Validation bits per byte, by time", "base_train", "val/bpb", "minutes of training"),
        chart(runs, colour, "Validation bits per byte, by FLOPs", "base_train", "val/bpb", "FLOPs"),
        chart(runs, colour, "Training loss, by tokens", "base_train", "train/loss", "tokens"),
        chart(runs, colour, "Throughput", "base_train", "train/tok_per_sec", "tokens", rate),
        chart(runs, colour, "SFT: validation bits per byte", "chat_sft", "val/bpb", "tokens"),
        chart(runs, colour, "RL: reward", "chat_rl", "reward", "steps"),
    ]
    drawn = [one for one in charts if one]
    return [Side(drawn)] if drawn else []


def chart(runs: list[Run], colour: dict, title: str, stage: str, key: str, along: str, show=number) -> Chart | None:
    lines, legend = [], []
    for run in runs:
        place = places(run, stage, along)
        log = [line for line in run.logs[stage] if show is not rate or line.get("total_training_time")]  # warm
        points = [(place(line), line[key]) for line in log if is_number(line.get(key))]
        points = [(x, y) for x, y in points if x is not None]
        if len(points) > 1:
            xs, ys = map(list, zip(*points, strict=True))
            where = source(run.tag, f"{stage}.jsonl", key)
            lines.append(Line(run.tag, xs, ys, colour[run.tag], where))
            legend.append((colour[run.tag], (f"{run.tag} ", Number(ys[-1], show(ys[-1]), f"{where} › last"))))
    if not lines:
        return None
    return Chart(
        title, curves(title, lines, Axis(along, tick), Axis("", tick), clip=key in ("val/bpb", "train/loss")), legend
    )


def places(run: Run, stage: str, along: str) -> Callable[[dict], float | None]:
    """Where a line of a log stands along an axis; None where that is not known."""
    seconds = {
        line["step"]: line["total_training_time"]
        for line in run.logs[stage]
        if is_number(line.get("total_training_time"))
    }
    flops, tokens = run.number(stage, "plan", "flops_per_token"), tokens_a_step(run, stage)
    a_step = {"steps": 1, "tokens": tokens, "FLOPs": flops.value * tokens if flops and tokens else None}

    def place(line: dict) -> float | None:
        done = line["step"] + ("train/dt" in line)
        if along == "minutes of training":
            return seconds[done - 1] / 60 if done - 1 in seconds else None
        return done * a_step[along] if a_step[along] else None

    return place


def chat_tasks(runs: list[Run], colour: dict) -> list:
    """Of each run its newest examination."""
    newest = {run.tag: run.examined[-1] for run in runs if run.examined}
    tasks = dict.fromkeys(
        task for run in runs if run.examined for task in run.get(f"chat_eval_{newest[run.tag]}", "tasks")
    )
    rows = []
    for task in tasks:
        bars = []
        for run in runs:
            if run.examined:
                stage = f"chat_eval_{newest[run.tag]}"
                if value := run.number(stage, "tasks", task, "accuracy", show=percent):
                    bars.append(Bar(run.tag, value, value.value, colour[run.tag]))
        rows.append((task + (" (fewer is better)" if task in MISTAKES else ""), bars, []))
    legend = [(colour[run.tag], f"{run.tag}, {SOURCES[newest[run.tag]]}") for run in runs if run.examined]
    return [Bars(rows, legend)] if rows else []


def core(runs: list[Run], colour: dict) -> list:
    """Only what was measured by the same bundle stands side by side."""
    measured = [run for run in runs if run.get("base_eval", "core")]
    bundles = {run.get("base_eval", "core", "bundle") for run in measured}
    if len(bundles) > 1:
        return [Paragraph((f"Different bundles, which cannot be compared: {', '.join(sorted(bundles))}.",))]
    rows = []
    for task in dict.fromkeys(task for run in measured for task in run.get("base_eval", "core", "tasks")):
        values = [(run, run.number("base_eval", "core", "tasks", task, "centered")) for run in measured]
        bars = [Bar(run.tag, value, value.value, colour[run.tag]) for run, value in values if value]
        rows.append((task, bars, []))
    said = Paragraph(("Accuracy above guessing.",), quiet=True)
    return [said, Bars(rows, [(colour[run.tag], run.tag) for run in measured])] if rows else []


def differences(runs: list[Run]) -> list:
    """The flags that are not the same in all runs, and where they ran."""
    rows = []
    for stage in TRAINED:
        configs = {run.tag: run.get(stage, "config") for run in runs}
        if sum(config is not None for config in configs.values()) < 2:
            continue
        for flag in dict.fromkeys(flag for config in configs.values() for flag in config or {}):
            values = [None if config is None else config.get(flag) for config in configs.values()]
            if flag not in NOT_A_CHOICE and any(value != values[0] for value in values):
                cells = [
                    run.number(stage, "config", flag) if isinstance(value, (int, float)) else str(value)
                    for run, value in zip(runs, values, strict=True)
                ]
                rows.append([f"{stage} --{flag.replace('_', '-')}", *cells])
    for key in ("git_commit", "device", "dtype", "torch"):
        values = [run.get("base_train", "environment", key, default="-") for run in runs]
        if len(set(values)) > 1:
            rows.append([words(key), *values])
    same = Paragraph(("The same flags, on the same machine.",))
    return [Table(["", *(run.tag for run in runs)], rows) if rows else same]
