"""Scaling laws: from runs of several sizes at several budgets of FLOPs, which size is best at each, and how that grows.

The method is the second of arXiv 2203.15556. At each budget a parabola is laid through the bits per byte over the
logarithm of the parameters; its lowest point is the best size N*, the tokens there are D*. Straight lines through the
logarithms of N* and D* over that of the budget C are the laws N* ~ C^a and D* ~ C^b. Intervals hold 95 %, and come of
drawing the scatter of the runs about the parabolas anew: noise, and what a parabola does not follow.

N parameters, D tokens, C FLOPs. Pure functions.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
LARGEST = 300  # exponent of ten that is told
MOST_LOST = 0.025  # share of draws without a lowest point, up to which there is an interval
# Student's t that leaves 2.5 % on each side, by degrees of freedom from 1 on
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run at a budget."""

    budget: float  # FLOPs
    depth: int
    params: float
    tokens: float
    bpb: float


def t_975(freedom: int) -> float:
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.5 / freedom


def fit(points: list[Point], at: tuple[float, ...] = (), seed: int = 0) -> dict:
    """What the points say of the best size. at: budgets to tell of beyond those that were run. Raises ValueError when
    there is nothing to fit.

    Values are {"value", "low", "high"}; without a measure of the scatter, low and high are None. A budget whose lowest
    point was not run round has a "problem" and does not go into the laws.
    """
    groups = defaultdict(list)
    for point in points:
        groups[point.budget].append(point)
    curves = [Curve(budget, sorted(groups[budget], key=lambda point: point.params)) for budget in sorted(groups)]
    scatter = scatter_of(curves)
    rng = np.random.default_rng(seed)
    scale = None
    if scatter["sigma"] is not None:  # that sigma itself is known from a few runs only, makes the tails heavy
        scale = scatter["sigma"] * np.sqrt(scatter["freedom"] / rng.chisquare(scatter["freedom"], DRAWS))
    for curve in curves:
        if not curve.problem:
            curve.draw(scale, rng)
    good = [curve for curve in curves if not curve.problem]
    if all(curve.parabola is None for curve in curves) or (at and len(good) < 2):
        needed = "two budgets with a best size are needed to tell of others" if at else "nothing to fit"
        raise ValueError(f"{needed}:\n" + "\n".join(f"  {c.budget:.3g}: {c.problem or 'it has one'}" for c in curves))
    found = {"scatter": scatter, "budgets": [curve.as_dict() for curve in curves], "laws": None, "predictions": []}
    if len(good) > 1:
        log_c = np.log10([curve.budget for curve in good])
        laws = {name: line(log_c, np.array([getattr(c, name) for c in good])) for name in ("params", "tokens")}
        drawn = (
            {name: line(log_c, np.array([c.drawn[name] for c in good])) for name in laws} if scale is not None else None
        )
        found["laws"] = {name: law(laws[name], drawn and drawn[name]) for name in laws}
        found["laws"]["ratio"] = law(laws["tokens"] - laws["params"], drawn and drawn["tokens"] - drawn["params"])
        middle = float(np.mean(log_c))
        depths = np.polyfit(np.log10([p.params for p in points]), np.log10([p.depth for p in points]), 1)
        found["ratio"] = told_at(middle, laws, drawn, depths)["ratio"] | {"budget": 10**middle}
        found["predictions"] = [told_at(math.log10(budget), laws, drawn, depths) for budget in at]
    return found


class Curve:
    """The runs of one budget, and the parabola through them."""

    def __init__(self, budget: float, points: list[Point]):
        self.budget, self.points, self.problem, self.drawn = budget, points, "", None
        self.x = np.log10([point.params for point in points])
        self.y = np.array([point.bpb for point in points])
        self.sizes = len(set(self.x))
        self.parabola = None
        if self.sizes < 3:
            self.problem = f"{self.sizes} sizes, three are needed"
            return
        self.parabola = np.polyfit(self.x, self.y, 2)
        self.tokens_curve = np.polyfit(self.x, np.log10([point.tokens for point in points]), 2)
        self.params, self.tokens, self.bpb = (float(value) for value in self.lowest(self.parabola))
        low, high = points[0], points[-1]
        if math.isnan(self.params) or not self.x[0] < self.params < self.x[-1]:
            falls = self.y[-1] < self.y[0]
            where = (
                f"deeper than {high.depth}, or fewer FLOPs" if falls else f"less deep than {low.depth}, or more FLOPs"
            )
            self.problem = f"the best size is not between those that were run; try models {where}"

    def lowest(self, parabola):
        """log10 N, log10 D and bits per byte at the lowest point, nan where there is none. parabola: (3,) or
        (3, draws)."""
        bend, slope, height = parabola
        bend = np.where(bend > 0, bend, np.nan)
        x = -slope / (2 * bend)
        return x, np.polyval(self.tokens_curve, x), height - slope**2 / (4 * bend)

    def draw(self, scale, rng) -> None:
        """scale: (draws,) of the scatter. The lowest points of as many parabolas, through runs that scatter anew."""
        if scale is None:
            return
        fitted = np.polyval(self.parabola, self.x)
        runs = fitted[:, None] + scale * rng.standard_normal((len(self.x), DRAWS))
        params, tokens, bpb = self.lowest(np.polyfit(self.x, runs, 2))
        self.drawn = {"params": params, "tokens": tokens, "bpb": bpb}

    def as_dict(self) -> dict:
        runs = [{"depth": p.depth, "params": p.params, "tokens": p.tokens, "bpb": p.bpb} for p in self.points]
        found = {"budget": self.budget, "runs": runs, "problem": self.problem}
        if self.parabola is not None:
            found["parabola"] = [float(number) for number in self.parabola]
        if not self.problem:
            drawn = self.drawn or {}
            found["params"] = told(self.params, drawn.get("params"), power=True)
            found["tokens"] = told(self.tokens, drawn.get("tokens"), power=True)
            ratios = drawn["tokens"] - drawn["params"] if drawn else None
            found["ratio"] = told(self.tokens - self.params, ratios, power=True)
            found["bpb"] = told(self.bpb, drawn.get("bpb"))
        return found


def scatter_of(curves: list[Curve]) -> dict:
    """Standard deviation of the runs about the parabolas, in bits per byte. same_way: whether they lie above and below
    them in the same places at every budget, so that it is the parabola that is wrong rather than the runs."""
    bent = [curve for curve in curves if curve.parabola is not None]
    left = [curve.y - np.polyval(curve.parabola, curve.x) for curve in bent]
    freedom = sum(len(curve.y) - 3 for curve in bent)
    signs = {tuple(np.sign(rest)) for rest in left}
    same_way = len(bent) > 1 and len(signs) == 1 and len(next(iter(signs))) > 3
    sigma = math.sqrt(sum(float((rest**2).sum()) for rest in left) / freedom) if freedom else None
    return {"sigma": sigma, "freedom": freedom, "same_way": same_way}


def line(x, ys):
    """Slope and height of the straight line through the points: (2,), or (2, draws) of ys (len(x), draws)."""
    if ys.ndim == 1:
        return np.polyfit(x, ys, 1)
    center = x - x.mean()
    slope = (center[:, None] * ys).sum(0) / (center**2).sum()
    return np.stack([slope, ys.mean(0) - slope * x.mean()])


def law(value, drawn) -> dict:
    """10^height * C^slope."""
    return {"exponent": told(value[0], None if drawn is None else drawn[0]), "coefficient": float(10 ** value[1])}


def told_at(log_c: float, laws: dict, drawn: dict | None, depths) -> dict:
    """What the laws say at a budget."""
    values = {name: float(np.polyval(laws[name], log_c)) for name in laws}
    spread = {name: drawn[name][0] * log_c + drawn[name][1] for name in laws} if drawn else {}
    ratios = spread["tokens"] - spread["params"] if drawn else None
    return {
        "budget": 10**log_c,
        "params": told(values["params"], spread.get("params"), power=True),
        "tokens": told(values["tokens"], spread.get("tokens"), power=True),
        "ratio": told(values["tokens"] - values["params"], ratios, power=True),
        "depth": float(10 ** np.polyval(depths, values["params"])),
    }


def told(value: float, drawn=None, power: bool = False) -> dict:
    """A value with its interval; power: all of them are exponents of ten. Draws that have no value count as beyond its
    ends, half of them at each."""
    low = high = None
    lost = 1.0 if drawn is None else float(np.isnan(drawn).mean())
    if lost <= MOST_LOST:
        tail = 100 * (0.025 - lost / 2) / (1 - lost)
        low, high = (float(bound) for bound in np.nanpercentile(drawn, (tail, 100 - tail)))
    values = [float(value), low, high]
    if power:
        values = [x if x is None else 10.0 ** min(x, LARGEST) for x in values]
    return dict(zip(("value", "low", "high"), values, strict=True))


# -- a series: one run of each depth


def straight(xs, ys) -> dict | None:
    """y = slope x + height by least squares, with what a prediction needs; None with fewer than three places."""
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    if len(set(xs)) < 3:
        return None
    slope, height = np.polyfit(xs, ys, 1)
    left = ys - (slope * xs + height)
    freedom = len(xs) - 2
    total = float(((ys - ys.mean()) ** 2).sum())
    return {
        "slope": float(slope),
        "height": float(height),
        "sigma": math.sqrt(float((left**2).sum()) / freedom),
        "r2": 1 - float((left**2).sum()) / total if total else 1.0,
        "n": len(xs),
        "mean_x": float(xs.mean()),
        "spread_x": float(((xs - xs.mean()) ** 2).sum()),
    }


def predicted(found: dict, x: float) -> dict:
    """What a straight line says of one more run at x."""
    value = found["slope"] * x + found["height"]
    around = 1 + 1 / found["n"] + (x - found["mean_x"]) ** 2 / found["spread_x"]
    wide = t_975(found["n"] - 2) * found["sigma"] * math.sqrt(around)
    return {"value": value, "low": value - wide, "high": value + wide}


def with_floor(flops, bpb) -> dict | None:
    """bpb = floor + A C^-alpha, by least squares; None with fewer than four points. The floor is 0 or more, and near 0
    where the runs show none."""
    x, y = np.log(np.asarray(flops, float)), np.asarray(bpb, float)
    if len(x) < 4:
        return None
    x = x - x.mean()
    best = None
    for alpha in np.geomspace(0.005, 1.0, 600):
        design = np.stack([np.ones_like(x), np.exp(-alpha * x)], axis=1)
        solved, *_ = np.linalg.lstsq(design, y, rcond=None)
        squares = float(((design @ solved - y) ** 2).sum())
        if solved[0] > 0 and (best is None or squares < best[0]):
            best = (squares, alpha, solved)
    if best is None:
        return None
    _, alpha, (floor, height) = best
    mean = float(np.log(np.asarray(flops, float)).mean())
    return {"floor": float(floor), "alpha": float(alpha), "A": float(height * math.exp(alpha * mean))}
