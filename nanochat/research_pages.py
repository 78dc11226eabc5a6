"""What came out of several runs, as a page and as a picture: scaling laws, a series of depths, pairs of runs."""

import math
from dataclasses import dataclass
from pathlib import Path

from nanochat import paths
from nanochat.report_charts import Axis, Line, curves, tick
from nanochat.report_pages import Chart, Number, Page, Paragraph, Table, Words, html, markdown, said
from nanochat.report_run import source
from nanochat.terminal import aligned

SMOOTH = 80  # points of a fitted curve
# as ui/report.css has them in the light
HEX = {"c1": "#3a6ea5", "c2": "#2a9d74", "c3": "#d9822b", "c4": "#8a8f98", "c5": "#8e5bb5", "c6": "#c0504d"}


@dataclass
class Panel:
    """A chart, for the page and for the picture. legend: (colour, words)."""

    title: str
    lines: list[Line]
    x_axis: Axis
    y_axis: Axis
    legend: list[tuple[str, Words]]

    def chart(self) -> Chart:
        return Chart(self.title, curves(self.title, self.lines, self.x_axis, self.y_axis), self.legend)


def write(folder: Path, name: str, page: Page, panels: list[Panel]) -> Path:
    """name.html, name.md and name.png; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(page), encoding="utf-8")
    (folder / f"{name}.html").write_text(html(page), encoding="utf-8")
    picture(panels, folder / f"{name}.png")
    return folder / f"{name}.html"


def folder_of(asked: str | None, name: str) -> Path:
    """Where the results of what has this name go."""
    return Path(asked).expanduser() if asked else paths.sweep_dir(name)


def plain(page: Page) -> str:
    """The page for a terminal: its sentences and tables."""
    parts = [page.title, said(page.summary)]
    for section in page.sections:
        blocks = [block for block in section.blocks if isinstance(block, (Table, Paragraph))]
        parts += [f"== {section.title}", *map(as_plain, blocks)] if blocks else []
    return "\n\n".join(parts)


def as_plain(block) -> str:
    if isinstance(block, Paragraph):
        return said(block.words)
    return aligned([block.header, *(["" if cell is None else str(cell) for cell in row] for row in block.rows)])


def picture(panels: list[Panel], file: Path) -> None:
    """The charts as PNG, two in a row, by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for line in panel.lines:
            colour, thin = HEX[line.colour], dict(alpha=0.6, linewidth=1) if line.faint or line.fitted else {}
            axes.plot(line.xs, line.ys, "-" if line.joined else "o", color=colour, markersize=4, **thin)
            if line.spans:
                lows, highs = zip(*line.spans, strict=True)
                axes.vlines(line.xs[: len(lows)], lows, highs, color=colour, linewidth=1.2)
        for axis, name in ((panel.x_axis, "x"), (panel.y_axis, "y")):
            side = getattr(axes, f"{name}axis")
            if axis.log:
                getattr(axes, f"set_{name}scale")("log")
                low, high = getattr(axes, f"get_{name}lim")()
                side.set_major_locator(FixedLocator([10**at for at in axis.ticks(math.log10(low), math.log10(high))]))
                side.set_minor_locator(NullLocator())
            side.set_major_formatter(FuncFormatter(lambda value, _, axis=axis: axis.show(value)))
        axes.set(title=panel.title, xlabel=panel.x_axis.label, ylabel=panel.y_axis.label)
        axes.grid(alpha=0.25)
        keys = [Line2D([], [], color=HEX[colour], label=said(words)) for colour, words in panel.legend]
        axes.legend(handles=keys, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


# -- numbers with an interval


def interval(found: dict, show, *place) -> list:
    """A value and where it lies with 95 %, for the cells of a table. found: value, low, high."""
    value = Number(found["value"], show(found["value"]), source(*place, "value"))
    return [value, between(found, show)]


def between(found: dict, show) -> str:
    return "unknown" if found["low"] is None else f"{show(found['low'])} to {show(found['high'])}"


def spans(found: list[dict]) -> list[tuple[float, float]]:
    return [(one["low"], one["high"]) for one in found] if all(one["low"] is not None for one in found) else []


def flops(value: float) -> str:
    """1e18, 2.15e18."""
    return f"{value:.3g}".replace("e+", "e") if value >= 1000 else f"{value:g}"


def size(value: float) -> str:
    """108M, 2.24G."""
    return tick(float(f"{value:.3g}"))


def ratio(value: float) -> str:
    return f"{value:.3g}"


def exponent(value: float) -> str:
    return f"{value:.3f}"
