"""The pages of scripts.scaling: scaling laws, and a series of depths."""

import math

import numpy as np

from nanochat.core_references import GPT2_CORE
from nanochat.report_charts import Axis, Line, tick
from nanochat.report_compare import PALETTE
from nanochat.report_pages import Number, Page, Paragraph, Section, Side, Table, Words
from nanochat.report_run import duration, number, short, source
from nanochat.research_pages import SMOOTH, Panel, between, exponent, flops, interval, ratio, size, spans


def laws_page(name: str, found: dict, what: str) -> tuple[Page, list[Panel]]:
    """found: of laws.fit; what: which parameters were counted."""
    good = [(i, curve) for i, curve in enumerate(found["budgets"]) if not curve["problem"]]
    panels = [bowls(found["budgets"])]
    if found["laws"]:
        panels += [
            law_panel("Best size", "params", f"parameters ({what})", found, good),
            law_panel("Tokens at the best size", "tokens", "tokens", found, good),
            law_panel("Tokens per parameter at the best size", "ratio", "tokens per parameter", found, good),
        ]
    rows = []
    for i, curve in enumerate(found["budgets"]):
        budget = Number(curve["budget"], flops(curve["budget"]), source("fit", "budgets", i, "budget"))
        if curve["problem"]:
            rows.append([budget, *[None] * 7, curve["problem"]])
            continue
        cells = [budget]
        for key, show in (("params", size), ("tokens", size), ("ratio", ratio)):
            cells += interval(curve[key], show, "fit", "budgets", i, key)
        rows.append([*cells, interval(curve["bpb"], number, "fit", "budgets", i, "bpb")[0], ""])
    header = [
        "FLOPs",
        f"best size ({what})",
        "95 %",
        "tokens",
        "95 %",
        "tokens / parameter",
        "95 %",
        "bits per byte",
        "",
    ]
    blocks = [Table(header, rows), *scatter_told(found["scatter"]), *(Paragraph((note,)) for note in found["notes"])]
    sections = [Section("By budget", blocks), Section("Charts", [Side([panel.chart() for panel in panels])])]
    summary: Words = (f"The best size was found at {len(good)} of {len(found['budgets'])} budgets.",)
    if found["laws"]:
        sections.insert(1, Section("Laws", [laws_table(found), *predictions(found, what)]))
        summary = laws_summary(found["ratio"], found["laws"])
    return Page(f"Scaling laws: {name}", summary, sections), panels


def laws_summary(best: dict, laws: dict) -> Words:
    def told(key: str) -> list:
        power = laws[key]["exponent"]
        value = Number(power["value"], exponent(power["value"]), source("fit", "laws", key, "exponent", "value"))
        return [value, f" ({between(power, exponent)})"]

    tokens = Number(best["value"], ratio(best["value"]), source("fit", "ratio", "value"))
    where = (
        f" tokens per parameter at {flops(best['budget'])} FLOPs (95 %: {between(best, ratio)}); the best size grows"
    )
    powers = [" with FLOPs to the power of ", *told("params"), ", its tokens to that of ", *told("tokens"), "."]
    return "Best at ", tokens, where, *powers


def scatter_told(scatter: dict) -> list:
    """What the intervals are made of."""
    if scatter["sigma"] is None:
        return [Paragraph(("No intervals: they need four sizes at a budget, or several seeds.",), True)]
    sigma = Number(scatter["sigma"], number(scatter["sigma"]), source("fit", "scatter", "sigma"))
    told = [Paragraph(("The runs lie about the parabolas by ", sigma, " bits per byte (standard deviation)."), True)]
    if scatter["same_way"]:
        same = "They do so in the same places at every budget: it is mostly that a parabola is not the whole truth."
        told.append(Paragraph((same,), True))
    return told


def bowls(budgets: list[dict]) -> Panel:
    """Bits per byte over size, a parabola for each budget."""
    lines, legend = [], []
    for i, curve in enumerate(budgets):
        colour, name = PALETTE[i % len(PALETTE)], flops(curve["budget"])
        sizes = [run["params"] for run in curve["runs"]]
        where = source("fit", "budgets", i, "runs")
        lines.append(Line(name, sizes, [run["bpb"] for run in curve["runs"]], colour, where, joined=False))
        legend.append((colour, (f"{name} FLOPs",)))
        if "parabola" in curve:
            xs = np.linspace(math.log10(sizes[0]), math.log10(sizes[-1]), SMOOTH)
            ys = np.polyval(curve["parabola"], xs)
            where = source("fit", "budgets", i, "parabola")
            lines.append(Line(f"{name}, fitted", [*(10**xs)], [*map(float, ys)], colour, where, fitted=True))
    return Panel(
        "Bits per byte by size, at equal FLOPs",
        lines,
        Axis("parameters", tick, log=True),
        Axis("bits per byte", tick),
        legend,
    )


def law_panel(title: str, key: str, label: str, found: dict, good: list) -> Panel:
    budgets = [curve["budget"] for _, curve in good]
    values = [curve[key] for _, curve in good]
    dots = Line(
        "best", budgets, [value["value"] for value in values], "c1", source("fit", "budgets", key), joined=False
    )
    dots.spans = spans(values)
    law = found["laws"][key]
    xs = np.geomspace(budgets[0], budgets[-1], SMOOTH)
    ys = [law["coefficient"] * float(x) ** law["exponent"]["value"] for x in xs]
    fitted = Line("law", [*map(float, xs)], ys, "c3", source("fit", "laws", key), fitted=True)
    legend = [("c1", ("at each budget",)), ("c3", (f"FLOPs to the power of {exponent(law['exponent']['value'])}",))]
    return Panel(title, [dots, fitted], Axis("FLOPs", flops, log=True), Axis(label, tick, log=True), legend)


def laws_table(found: dict) -> Table:
    rows = []
    for key, title in (("params", "best size N"), ("tokens", "tokens D"), ("ratio", "D / N")):
        law = found["laws"][key]
        factor = Number(law["coefficient"], f"{law['coefficient']:.3g}", source("fit", "laws", key, "coefficient"))
        rows.append([title, factor, *interval(law["exponent"], exponent, "fit", "laws", key, "exponent")])
    return Table(["= factor x FLOPs ^ exponent", "factor", "exponent", "95 %"], rows)


def predictions(found: dict, what: str) -> list:
    rows = []
    for i, one in enumerate(found["predictions"]):
        cells = [Number(one["budget"], flops(one["budget"]), source("fit", "predictions", i, "budget"))]
        for key, show in (("params", size), ("tokens", size), ("ratio", ratio)):
            cells += interval(one[key], show, "fit", "predictions", i, key)
        rows.append([*cells, Number(one["depth"], ratio(one["depth"]), source("fit", "predictions", i, "depth"))])
    header = ["FLOPs", f"best size ({what})", "95 %", "tokens", "95 %", "tokens / parameter", "95 %", "depth, about"]
    note = Paragraph(("What the laws say elsewhere: the further away, the less it is worth.",), True)
    return [note, Table(header, rows)] if rows else []


# -- a series of depths


def series_page(name: str, found: dict) -> tuple[Page, list[Panel]]:
    """found: as scripts.scaling series makes it."""
    runs = found["runs"]
    spent, bpb = [run["flops"] for run in runs], [run["val_bpb"] for run in runs]
    x_axis = Axis("FLOPs", flops, log=True)
    lines = [Line("runs", spent, bpb, "c1", source("series", "runs", "val_bpb"), joined=False)]
    legend: list = [("c1", ("a run of each depth",))]
    if curve := found["bpb"]:
        xs = np.geomspace(spent[0], spent[-1], SMOOTH)
        ys = [curve["floor"] + curve["A"] * float(x) ** -curve["alpha"] for x in xs]
        lines.append(Line("fitted", [*map(float, xs)], ys, "c3", source("series", "bpb"), fitted=True))
        legend.append(("c3", (f"{curve['floor']:.3f} + {curve['A']:.3g} FLOPs^-{curve['alpha']:.3f}",)))
    panels = [Panel("Bits per byte", lines, x_axis, Axis("bits per byte", tick), legend)]
    tested = [run for run in runs if run["core"] is not None]
    beside = GPT2_CORE if found["published"] else {}
    if len(tested) > 1:
        by_bpb = sorted(tested, key=lambda run: run["val_bpb"])
        bpb_axis = Axis("bits per byte", tick, zero=False)
        for title, *how in (
            ("CORE by FLOPs", tested, "flops", x_axis, found["core_by_log_flops"], math.log10),
            ("CORE by bits per byte", by_bpb, "val_bpb", bpb_axis, found["core_by_bpb"], float),
        ):
            panels.append(core_panel(title, *how, beside))
    rows = []
    for i, run in enumerate(runs):
        shown = (("depth", number), ("total_params", short), ("tokens", short), ("flops", flops),
                 ("val_bpb", number), ("core", number), ("training_seconds", duration))  # fmt: skip
        cells = [
            run[key] if run[key] is None else Number(run[key], show(run[key]), source("series", "runs", i, key))
            for key, show in shown
        ]
        rows.append([run["tag"], *cells])
    header = ["run", "depth", "parameters", "tokens", "FLOPs", "bits per byte", "CORE", "time of training"]
    sections = [Section("Runs", [Table(header, rows)]), Section("Charts", [Side([panel.chart() for panel in panels])])]
    if told := [drawn_on(i, one) for i, one in enumerate(found["predictions"])]:
        far = "Lines drawn on beyond what was run; the intervals know of the runs' scatter about them alone."
        sections.insert(1, Section("Drawn on", [*told, Paragraph((far,), True)]))
    if found["notes"]:
        sections.append(Section("To know", [Paragraph((note,)) for note in found["notes"]]))
    depths = [run["depth"] for run in runs]
    summary = (f"{len(runs)} runs, depth {min(depths)} to {max(depths)}.",)
    return Page(f"A series of depths: {name}", summary, sections), panels


def drawn_on(i: int, one: dict) -> Paragraph:
    """A prediction: of bits per byte, of CORE, or of the FLOPs that a CORE takes."""

    def told(key: str, show) -> Number:
        return Number(one[key], show(one[key]), source("series", "predictions", i, key))

    if one["of"] == "flops":
        if one["flops"] is None:
            return Paragraph((f"FLOPs to a CORE of {one['core']}: not in sight of these runs.",))
        words = (
            f"FLOPs to a CORE of {one['core']}: ",
            told("flops", flops),
            ", about depth ",
            told("depth", ratio),
            ".",
        )
        return Paragraph(words)
    what = {"bpb": "Bits per byte", "core": "CORE"}[one["of"]]
    between = "" if one["low"] is None else f" (95 %: {one['low']:.3f} to {one['high']:.3f})"
    return Paragraph((f"{what} at {flops(one['at'])} FLOPs: ", told("value", number), f"{between}."))


def core_panel(title: str, runs: list[dict], key: str, x_axis: Axis, fitted: dict | None, place, beside: dict) -> Panel:
    """place: of a value of key where the line is straight. beside: model -> CORE, of those to compare with."""
    xs = [run[key] for run in runs]
    lines = [Line("runs", xs, [run["core"] for run in runs], "c1", source("series", "runs", "core"), joined=False)]
    legend: list = [("c1", ("a run of each depth",))]
    if fitted:
        line = np.geomspace(xs[0], xs[-1], SMOOTH)
        ys = [fitted["slope"] * place(float(x)) + fitted["height"] for x in line]
        lines.append(Line("fitted", [*map(float, line)], ys, "c3", source("series", "core"), fitted=True))
        legend.append(("c3", (f"straight line, R² {fitted['r2']:.3f}",)))
    for colour, (name, core) in zip(("c4", "c5", "c2", "c6"), beside.items(), strict=False):
        if min(run["core"] for run in runs) - 0.05 < core < max(run["core"] for run in runs) + 0.05:
            lines.append(Line(name, [xs[0], xs[-1]], [core, core], colour, "core_references", fitted=True))
            legend.append((colour, (f"{name}: {core:.4f}",)))
    return Panel(title, lines, x_axis, Axis("CORE", tick), legend)
