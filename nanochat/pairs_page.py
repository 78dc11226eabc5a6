"""The page of scripts.compare: did it help?"""

from nanochat.pairs import ALONG, Arm, difference_curve, verdict
from nanochat.report_charts import Axis, Line, tick
from nanochat.report_compare import PALETTE
from nanochat.report_pages import Number, Page, Paragraph, Section, Side, Table
from nanochat.report_run import source
from nanochat.research_pages import Panel, size, spans
from nanochat.results import duration

NAMES = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "time": "time"}


def pairs_page(name: str, found: list[dict], arms: list[Arm], notes: list[str]) -> tuple[Page, list[Panel]]:
    """found: pairs.against of every arm but the first."""
    sections = []
    for i, one in enumerate(found):
        rows = [["at the end", *cells(one["at_end"], i, "at_end"), "each at its own"]]
        for along in ALONG:
            key = f"equal_{along}"
            rows.append([f"equal {NAMES[along]}", *cells(one[key], i, key), where(one[key], along)])
        header = ["", one["against"], one["arm"], "difference", "95 %", "", "where"]
        count = len(one["seeds"])
        said = f"{count} pairs, seeds" if count > 1 else "One pair, seed"
        told = [Paragraph((f"{said} {', '.join(map(str, one['seeds']))}.",), True)]
        if one["pace"]:
            told.append(Paragraph((speed(one["pace"]),), True))
        sections.append(Section(f"{one['arm']} against {one['against']}", [Table(header, rows), *told], one["arm"]))
    panels = [arm_panel(arms), *difference_panels(arms, found)]
    sections.append(Section("Charts", [Side([panel.chart() for panel in panels])]))
    if len(found) > 1:
        notes = [*notes, "Each of the arms has 5 % of its own to be taken for better or worse by chance."]
    if notes:
        sections.append(Section("To know", [Paragraph((note,)) for note in notes]))
    summary = (" ".join(f"{one['arm']}: {headline(one)}." for one in found),)
    return Page(f"Did it help? {name}", summary, sections), panels


def headline(found: dict) -> str:
    end = found["at_end"]
    wide = "" if end["error"] is None else f" ± {(end['high'] - end['low']) / 2:.4f}"
    first, other = end["flops"]
    work = "" if 0.99 < other / first < 1.01 else f" with {other / first:.2g} times the FLOPs"
    return (
        f"{verdict(end)} at the end{work} ({end['difference']:+.4f}{wide} bits per byte); "
        f"at equal FLOPs: {verdict(found['equal_flops'])}; at equal time: {verdict(found['equal_time'])}"
    )


def speed(pace: dict) -> str:
    (a, b), (c, d) = ([f"{1000 * seconds:.3g}" for seconds in one] for one in pace["ranges"])
    same = "; they overlap, and count as equally fast" if pace["same"] else ""
    return f"Milliseconds a step, medians of the runs: {a} to {b} against {c} to {d}{same}."


def cells(found: dict, i: int, key: str) -> list:
    if "why_not" in found:
        return [None, None, None, None, found["why_not"]]
    values = []
    for name in ("first", "other", "difference"):
        text = f"{found[name]:+.4f}" if name == "difference" else f"{found[name]:.4f}"
        values.append(Number(found[name], text, source("compare", "arms", i, key, name)))
    wide = None if found["error"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}"
    return [*values, wide, verdict(found)]


def where(found: dict, along: str) -> str:
    """At which place, and of which run it is not the end."""
    if "place" not in found:
        return ""
    text = duration(found["place"]) if along == "time" else f"{size(found['place'])} {NAMES[along]}"
    for share, whose in zip(found["shares"], ("first", "other"), strict=True):
        if share < 0.99:
            text += f", {share:.0%} of the {whose}'s way"
    return text


def arm_panel(arms: list[Arm]) -> Panel:
    lines, legend = [], []
    for i, arm in enumerate(arms):
        colour = PALETTE[i % len(PALETTE)]
        legend.append((colour, (arm.name,)))
        for run in arm.runs.values():
            tokens = [steps * run.a_step["tokens"] for steps, _ in run.curve[1:]]
            where = source(run.tag, "base_train.jsonl", "val/bpb")
            lines.append(Line(run.tag, tokens, [bpb for _, bpb in run.curve[1:]], colour, where))
    return Panel("Bits per byte", lines, Axis("tokens", tick), Axis("bits per byte", tick), legend)


def difference_panels(arms: list[Arm], found: list[dict]) -> list[Panel]:
    panels = []
    for along in ("tokens", "time"):
        lines, legend = [], []
        for i, (arm, one) in enumerate(zip(arms[1:], found, strict=True), 1):
            curve = difference_curve(arms[0], arm, along, one["pace"])
            if not curve:
                continue
            colour, bars = PALETTE[i % len(PALETTE)], spans([told for _, told in curve])
            ys = [told["difference"] for _, told in curve]
            lines.append(Line(arm.name, [place for place, _ in curve], ys, colour, "compare", spans=bars))
            legend.append((colour, (f"{arm.name}{', 95 %' if bars else ''}",)))
        if lines:
            ends = [min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines)]
            lines.append(Line(arms[0].name, ends, [0.0, 0.0], PALETTE[0], "", fitted=True))
            axis = Axis(along, duration if along == "time" else tick)
            title = f"Difference to {arms[0].name}, by {along}"
            panels.append(Panel(title, lines, axis, Axis("bits per byte", tick), legend))
    return panels
