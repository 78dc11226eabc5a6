"""Line charts of a report, as SVG that takes its colours and its font from the page's style sheet, so that they are
right in the dark and in print; a point says its numbers when one points at it. No scripts."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 10, 40  # room around the plot
SECOND_AXIS = 26  # more of it above, where there is one
MOST = 600  # points drawn of a line
TELLING = 48  # of them that say their numbers
EARLY = 0.02  # share of a line, at its beginning, that may lie outside of the plot: a loss begins far up


@dataclass
class Line:
    """name: in the legend. colour: a class of the style sheet, c1 to c6. source: where its numbers stand. faint: drawn
    thin, below the others; fitted: likewise, but to be seen. joined: by a line; points alone otherwise. spans: from
    where to where each point may lie."""

    name: str
    xs: list[float]
    ys: list[float]
    colour: str
    source: str = ""
    faint: bool = False
    fitted: bool = False
    joined: bool = True
    spans: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Axis:
    """label: at its end. show: how its marks and the points are written. log: by factors, for values above 0. zero: a
    horizontal one begins at 0 or before."""

    label: str
    show: Callable[[float], str]
    log: bool = False
    zero: bool = True

    def place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def told(self, place: float) -> str:
        return self.show(10**place if self.log else place)

    def ticks(self, low: float, high: float, about: int = 5) -> list[float]:
        return powers(low, high) if self.log and high > low else ticks(low, high, about)


def tick(value: float) -> str:
    """4000 -> 4k, 5.12e6 -> 5.12M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def curves(
    title: str,
    lines: list[Line],
    x_axis: Axis,
    y_axis: Axis,
    above: tuple[Axis, list[float], list[float]] | None = None,
    from_zero: bool = False,
    clip: bool = False,
) -> str:
    """above: a second axis over the first, with the xs of some points and what it counts there, rising. clip: the plot
    is as high as what is not early in the lines; where one begins above it, this is said."""
    lines = [placed(line, x_axis, y_axis) for line in lines]
    top = TOP + (SECOND_AXIS if above else 0)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - top
    x_low, x_high = min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines)
    if x_axis.zero and not x_axis.log:
        x_low = min(0, x_low)
    else:
        x_low, x_high = x_low - 0.04 * (x_high - x_low), x_high + 0.04 * (x_high - x_low)
    y_low, y_high = y_range(lines, from_zero, EARLY if clip else 0)

    def x_of(x):
        return width * (x - x_low) / (x_high - x_low) if x_high > x_low else width / 2

    def y_of(y):
        return height * (y_high - y) / (y_high - y_low)

    svg = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']

    def text(x, y, words, kind, anchor="middle"):
        svg.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    for y in y_axis.ticks(y_low, y_high):
        at = top + y_of(y)
        svg.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        text(LEFT - 6, at + 4, y_axis.told(y), "tick", "end")
    for x in x_axis.ticks(x_low, x_high):
        anchor = "end" if x_of(x) > width - 12 else "middle"
        text(LEFT + min(x_of(x), width), HEIGHT - BOTTOM + 16, x_axis.told(x), "tick", anchor)
    text(WIDTH - RIGHT, HEIGHT - 6, x_axis.label, "axis", "end")
    if above:
        axis, xs, counts = above
        for count in ticks(counts[0], counts[-1], 4):
            at = LEFT + x_of(xs[min(bisect_left(counts, count), len(xs) - 1)])
            svg.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4}" y2="{top}"/>')
            text(at, top - 7, axis.show(count), "tick")
        text(WIDTH - RIGHT, TOP, axis.label, "axis", "end")
    for line in lines:
        if line.ys[0] > y_high and not line.faint:
            inside = next((x for x, y in zip(line.xs, line.ys, strict=True) if y <= y_high), x_high)
            text(LEFT + x_of(inside) + 10, top + 12, f"↑ from {y_axis.told(line.ys[0])}", "tick", "start")
            break
    # an inner svg cuts off what leaves the plot
    svg.append(f'<svg x="{LEFT}" y="{top}" width="{width}" height="{height}" overflow="hidden">')
    for line in sorted(lines, key=lambda line: not (line.faint or line.fitted)):
        for x, (low, high) in zip(line.xs, line.spans, strict=False):
            at = f'x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{y_of(low):.1f}" y2="{y_of(high):.1f}"'
            svg.append(f'<line class="line span {line.colour}" {at}/>')
        if not line.joined:
            continue
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thinned(line.xs, line.ys, MOST))
        kind = f"line {line.colour}{' faint' if line.faint else ' fitted' if line.fitted else ''}"
        svg.append(f'<polyline class="{kind}" data-from="{escape(line.source)}" points="{points}"/>')
    svg.append("</svg>")
    for line in lines:
        if line.faint or line.fitted:
            continue
        few = len(line.xs) <= TELLING
        for x, y in thinned(line.xs, line.ys, TELLING):
            if y_low <= y <= y_high:
                told = f"{line.name} {y_axis.told(y)} at {x_axis.told(x)} {x_axis.label}"
                svg.append(
                    f'<circle class="{"dot" if few else "point"} {line.colour}" cx="{LEFT + x_of(x):.1f}" '
                    f'cy="{top + y_of(y):.1f}" r="{2.5 if few else 6}"><title>{escape(told)}</title></circle>'
                )
    return "".join([*svg, "</svg>"])


def placed(line: Line, x_axis: Axis, y_axis: Axis) -> Line:
    """The line in the places of the axes: logarithms where they go by factors."""
    spans = [(y_axis.place(low), y_axis.place(high)) for low, high in line.spans]
    return replace(line, xs=[*map(x_axis.place, line.xs)], ys=[*map(y_axis.place, line.ys)], spans=spans)


def y_range(lines: list[Line], from_zero: bool, early: float) -> tuple[float, float]:
    """From the lowest to the highest of what is not early, with a margin."""
    late = [y for line in lines for y in line.ys[math.ceil(early * len(line.ys)) if len(line.ys) > 2 else 0 :]]
    late += [y for line in lines for span in line.spans for y in span]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - margin), high + margin


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if (high - low) / step <= about)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Logarithms of round numbers from low to high: powers of ten, and 2 and 5 times these where that are few."""
    wholes = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        places = [whole + math.log10(step) for whole in wholes for step in steps]
        inside = [place for place in places if low <= place <= high]
        if len(inside) >= 3:
            return inside
    return [math.log10(value) for value in ticks(10**low, 10**high, 4)]  # less than a factor of two or so


def thinned(xs: list[float], ys: list[float], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, the first and the last among them; none is made up."""
    places = range(len(xs)) if len(xs) <= most else [i * (len(xs) - 1) // (most - 1) for i in range(most)]
    return [(xs[i], ys[i]) for i in places]
