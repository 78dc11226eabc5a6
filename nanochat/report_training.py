"""What a report says of training: curves, schedules, speed, and how it ended."""

from nanochat.report_charts import Axis, Line, curves, tick
from nanochat.report_pages import Bar, Bars, Chart, Fold, Number, Paragraph, Side, Table
from nanochat.report_run import COLOURS, Run, number, percent, rate, short, source, words
from nanochat.report_shapes import is_number

SPEED = "c4"  # colours
LONG = 600  # seconds from which an axis counts minutes


def pretraining(run: Run) -> list:
    if not run.has("base_train"):
        return []
    counts = run.get("base_train", "model", "counts", default={})
    plan = run.table("base_train", "plan")
    plan.rows.append(["tokens per scaling parameter", run.number("report", "tokens_per_scaling_parameter")])
    blocks = training_curves(run, "base_train", COLOURS["base"])
    if run.get("base_train", "config", "in_order"):
        text = "The corpus was read shard by shard (--in-order): where another kind of text begins, the loss jumps."
        blocks.append(Paragraph((text,), quiet=True))
    done, wanted = run.number("base_train", "final", "step"), run.number("base_train", "plan", "num_iterations")
    if done and wanted and done.value < wanted.value:
        blocks.append(Paragraph(("Ended after ", done, " of ", wanted, " steps; --resume goes on.")))
    if counts:
        sizes = [
            (words(group), run.number("base_train", "model", "counts", group, show=short))
            for group in counts
            if group != "total"
        ]
        rows = [(group, [Bar("parameters", n, n.value / counts["total"], "c1")], []) for group, n in sizes]
        blocks.append(Fold("Parameters by group", [Bars(rows)]))
    tables = [run.table("base_train", "model", "config"), plan, run.table("base_train", "final")]
    return [*blocks, Fold("Shape, plan, outcome", [Side(tables)])]


def fine_tuning(run: Run) -> list:
    if not run.has("chat_sft"):
        return []
    conversations, rows = run.number("chat_sft", "conversations"), run.number("chat_sft", "rows")
    said = (conversations, " conversations, packed into ", rows, " rows.")
    blocks = [Paragraph(said, quiet=True)] if conversations and rows else []
    blocks += training_curves(run, "chat_sft", COLOURS["sft"])
    return [*blocks, Fold("Outcome", [run.table("chat_sft", "final")])]


def practice(run: Run) -> list:
    """How reinforcement learning went, and what it did to held-out questions."""
    if not run.has("chat_rl"):
        return []
    text = (
        "Reward: the share of sampled answers that were right. pass@8: of eight answers to a held-out question at "
        "least one is. Entropy: how undecided the model is; KL: how far it went from the SFT model; in nats a token."
    )
    plot = Plot(run, "chat_rl")
    passes = [key for key in run.get("chat_rl", "final", default={}) if key.startswith("pass@")]
    held_out = [(key, key, colour) for key, colour in zip([*passes[:1], *passes[1:][-1:]], ("c3", "c5"), strict=False)]
    charts = [
        plot.chart("Reward of the sampled answers", [("reward", "reward", "c3")], from_zero=True),
        plot.chart("Held-out questions", held_out, from_zero=True),
        plot.chart("Entropy, and divergence from SFT", [("entropy", "entropy", "c2"), ("kl", "KL", "c6")], "nats"),
        plot.chart("Length of the answers", [("sequence_length", "tokens", SPEED)], "tokens", from_zero=True),
    ]
    tables = [run.table("chat_rl", "final")]
    for key, title in {"course": "Means of the steps up to each", "examinations": "Held-out questions"}.items():
        lines = run.get("chat_rl", key)
        if lines:
            names = list(lines[0])
            rows = [
                [Number(line[name], number(line[name]), source("chat_rl", key, i, name)) for name in names]
                for i, line in enumerate(lines)
            ]
            tables += [Paragraph((f"{title}:",)), Table(list(map(words, names)), rows)]
    return [Paragraph((text,), quiet=True), *side_by_side(charts), Fold("Outcome, course, examinations", tables)]


def training_curves(run: Run, stage: str, colour: str) -> list:
    plot = Plot(run, stage)
    loss = [("train/step_loss", "of each step", colour), ("train/loss", "smoothed loss", colour)]
    schedules = [
        ("train/lrm", "learning rate, as a share", "c1"),
        ("train/momentum", "Muon momentum", "c2"),
        ("train/weight_decay", "Muon weight decay", "c3"),
    ]
    charts = [
        plot.chart("Training loss", loss, "nats", faint="train/step_loss", clip=True),
        plot.chart("Validation, along the way", [("val/bpb", "bits per byte", colour)], clip=True),
        plot.chart("Schedules", schedules, from_zero=True, last=False),
        plot.chart("Throughput", [("train/tok_per_sec", "tokens", SPEED)], show=rate, from_zero=True, warm=True),
        plot.chart("Model FLOPs utilization", [("train/mfu", "MFU", SPEED)], show=percent, from_zero=True, warm=True),
        plot.chart("CORE along the way", [("core_metric", "CORE", colour)]),
        plot.chart("ChatCORE along the way", [("chatcore_metric", "ChatCORE", colour)]),
    ]
    return side_by_side(charts)


def side_by_side(charts: list) -> list:
    drawn = [chart for chart in charts if chart]
    return [Side(drawn)] if drawn else []


def tokens_a_step(run: Run, stage: str) -> float | None:
    step, tokens = run.number(stage, "final", "step"), run.number(stage, "final", "tokens")
    return tokens.value / step.value if step and tokens and step.value else None


class Plot:
    """Charts of one stage's log, over the tokens read (or steps where they differ in length) and the time it took."""

    def __init__(self, run: Run, stage: str):
        self.stage, self.log = stage, run.logs[stage]
        self.tokens_a_step = tokens_a_step(run, stage)
        self.warm = [
            line for line in self.log if is_number(line.get("total_training_time")) and line["total_training_time"]
        ]

    def x(self, line: dict) -> float:
        """Where a line of the log stands: after its step, if it tells of one."""
        return (line["step"] + ("train/dt" in line)) * (self.tokens_a_step or 1)

    def time(self) -> tuple | None:
        """The axis of time: minutes or seconds of training by the places of the steps."""
        if len(self.warm) < 2 or not self.tokens_a_step:
            return None
        long = self.warm[-1]["total_training_time"] > LONG
        times = [line["total_training_time"] / (60 if long else 1) for line in self.warm]
        return Axis("minutes of training" if long else "seconds of training", tick), list(map(self.x, self.warm)), times

    def chart(
        self,
        title: str,
        keys: list[tuple],
        label="",
        show=number,
        from_zero=False,
        warm=False,
        faint="",
        clip=False,
        last=True,
    ) -> Chart | None:
        """keys: (of the log, name, colour) of each curve. warm: of timed steps only. faint: the key that is drawn thin
        and stands in no legend. clip: what comes early may lie above the chart. last: the legend has the last values.
        None where nothing was logged."""
        lines, legend = [], []
        for key, name, colour in keys:
            log = self.warm if warm else self.log
            points = [(self.x(line), line[key]) for line in log if is_number(line.get(key))]
            if len(points) < 2:
                continue
            xs, ys = map(list, zip(*points, strict=True))
            lines.append(Line(name, xs, ys, colour, source(f"{self.stage}.jsonl", key), key == faint))
            if key != faint:
                value = Number(ys[-1], show(ys[-1]), source(f"{self.stage}.jsonl", key, "last"))
                legend.append((colour, (f"{name} ", value) if last else (name,)))
        if not lines:
            return None
        across = Axis("tokens" if self.tokens_a_step else "steps", tick)
        up = Axis(label, show if show is percent else tick)
        return Chart(title, curves(f"{title}, {self.stage}", lines, across, up, self.time(), from_zero, clip), legend)
