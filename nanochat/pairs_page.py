"""The page of scripts.compare: did it help?"""

from nanochat.pairs import ALONG, Arm, difference_curve, verdict
from nanochat.report_charts import Axis, Line, tick
from nanochat.report_compare import PALETTE
from nanochat.report_pages import Number, Page, Paragraph, Section, Side, Table
from nanochat.report_run import source
from nanochat.research_pages import Panel, spans
from nanochat.results import duration


def pairs_page(name: str, found: list[dict], arms: list[Arm], notes: list[str]) -> tuple[Page, list[Panel]]:
    """found: pairs.against of every arm but the first."""
    sections, panels = [], []
    for i, one in enumerate(found):
        rows = [
            [key, *pair_cells(one[key], "compare", "arms", i, key)]
            for key in ("at the end", *(f"equal {a}" for a in ALONG))
        ]
        header = ["", one["against"], one["arm"], "difference", "95 %", "", "where"]
        note = Paragraph((f"{len(one['seeds'])} pairs, seeds {', '.join(map(str, one['seeds']))}.",), True)
        sections.append(Section(f"{one['arm']} against {one['against']}", [Table(header, rows), note], one["arm"]))
    panels.append(arm_panel(arms))
    panels += difference_panels(arms)
    blocks: list = [Side([panel.chart() for panel in panels])]
    sections.append(Section("Charts", blocks))
    if notes:
        sections.append(Section("To know", [Paragraph((note,)) for note in notes]))
    summary = tuple(f"{one['arm']}: {headline(one)}. " for one in found)
    return Page(f"Did it help? {name}", summary, sections), panels


def headline(found: dict) -> str:
    end = found["at the end"]
    wide = "" if end["error"] is None else f" ± {(end['high'] - end['low']) / 2:.4f}"
    return (
        f"{verdict(end)} at the end ({end['difference']:+.4f}{wide} bits per byte); "
        f"at equal time: {verdict(found['equal time'])}"
    )


def pair_cells(found: dict, *place) -> list:
    if "why_not" in found:
        return [None, None, None, None, found["why_not"], None]
    values = [
        Number(found[key], f"{found[key]:+.4f}" if key == "difference" else f"{found[key]:.4f}", source(*place, key))
        for key in ("first", "other", "difference")
    ]
    wide = None if found["error"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}"
    return [*values, wide, verdict(found), where(found, place[-1])]


def where(found: dict, key: str) -> str:
    """At which place, and of which run it is not the end."""
    if "place" not in found:
        return "each at its own"
    along = key.removeprefix("equal ")
    text = duration(found["place"]) if along == "time" else f"{tick(found['place'])} {along}"
    for share, whose in ((found["share_of_first"], "first"), (found["share_of_other"], "other")):
        if share < 0.99:
            text += f", {share:.0%} of the {whose}'s way"
    return text


def arm_panel(arms: list[Arm]) -> Panel:
    lines, legend = [], []
    for i, arm in enumerate(arms):
        colour = PALETTE[i % len(PALETTE)]
        legend.append((colour, (arm.name,)))
        for run in arm.runs.values():
            points = run.curve[1:]
            where = source(run.tag, "base_train.jsonl", "val/bpb")
            lines.append(Line(run.tag, [p["tokens"] for p in points], [p["bpb"] for p in points], colour, where))
    return Panel("Bits per byte", lines, Axis("tokens", tick), Axis("bits per byte", tick), legend)


def difference_panels(arms: list[Arm]) -> list[Panel]:
    panels = []
    for along in ("tokens", "time"):
        lines, legend = [], []
        for i, arm in enumerate(arms[1:], 1):
            curve = difference_curve(arms[0], arm, along)
            if not curve:
                continue
            xs, colour = [point[along] for point in curve], PALETTE[i % len(PALETTE)]
            bars = spans(curve)
            lines.append(Line(arm.name, xs, [p["difference"] for p in curve], colour, "compare", spans=bars))
            legend.append((colour, (f"{arm.name}{', 95 %' if bars else ''}",)))
        if lines:
            ends = [min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines)]
            lines.append(Line(f"{arms[0].name}", ends, [0.0, 0.0], PALETTE[0], "", fitted=True))
            axis = Axis(along, duration if along == "time" else tick)
            panels.append(
                Panel(f"Difference to {arms[0].name}, by {along}", lines, axis, Axis("bits per byte", tick), legend)
            )
    return panels
