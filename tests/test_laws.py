"""Fits of scaling laws: what was put in comes out, with intervals that hold it, and nothing is made up."""

import math

import numpy as np
import pytest

from nanochat import laws

BUDGETS = (1e18, 2e18, 5e18, 1e19)
DEPTHS = (8, 10, 12, 14, 16, 18)
A, B = 0.52, 0.48  # the exponents of the best size and of its tokens


def best_size(budget):
    return 1.2e8 * (budget / 3e18) ** A


def points(noise=0.0, seed=0, budgets=BUDGETS, depths=DEPTHS, seeds=1):
    """Runs of a world in which bits per byte are a parabola of log N, lowest at N = best_size, and D = C / 6N."""
    rng = np.random.default_rng(seed)
    found = []
    for budget in budgets:
        for depth in depths:
            size = 5e4 * depth**3
            bpb = 0.9 - 0.04 * math.log10(budget / 1e18) + 0.1 * (math.log10(size) - math.log10(best_size(budget))) ** 2
            for _ in range(seeds):
                run = laws.Point(budget, depth, size, budget / (6 * size), bpb + noise * rng.standard_normal())
                found.append(run)
    return found


def exponents(found):
    return [found["laws"][key]["exponent"] for key in ("params", "tokens", "ratio")]


def test_the_law_that_was_put_in_comes_out():
    found = laws.fit(points(), at=(1e20,))
    assert [one["value"] for one in exponents(found)] == pytest.approx([A, B, B - A], abs=1e-6)
    for curve in found["budgets"]:
        size = best_size(curve["budget"])
        assert curve["params"]["value"] == pytest.approx(size, rel=1e-6)
        assert curve["tokens"]["value"] == pytest.approx(curve["budget"] / (6 * size), rel=1e-6)
        assert curve["ratio"]["value"] == pytest.approx(curve["tokens"]["value"] / curve["params"]["value"])
    (far,) = found["predictions"]
    assert far["params"]["value"] == pytest.approx(best_size(1e20), rel=1e-5)
    assert far["depth"] == pytest.approx((best_size(1e20) / 5e4) ** (1 / 3), rel=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 95 % intervals over 80 worlds, each with its own noise, at least 85 % hold what was put in, and they are not
    so wide that they say nothing."""
    held, widths = 0, []
    for seed in range(80):
        found = laws.fit(points(noise=0.0015, seed=seed))
        one = found["laws"]["params"]["exponent"]
        held += one["low"] <= A <= one["high"]
        widths.append(one["high"] - one["low"])
    assert 68 <= held <= 80 and np.median(widths) < 0.4


def test_scatter_is_the_runs_distance_from_the_parabolas():
    found = laws.fit(points(noise=0.002, seeds=3))
    assert found["scatter"]["freedom"] == len(BUDGETS) * (3 * len(DEPTHS) - 3)
    assert found["scatter"]["sigma"] == pytest.approx(0.002, rel=0.25) and not found["scatter"]["same_way"]


def test_a_world_that_is_no_parabola_is_noticed_however_little_noise_there_is():
    """A skewed curve: the runs lie about the parabolas in the same places, and the intervals are wide for it."""
    skewed = [
        laws.Point(
            p.budget, p.depth, p.params, p.tokens, p.bpb + 0.05 * math.log10(p.params / best_size(p.budget)) ** 3
        )
        for p in points(depths=(8, 10, 13, 18), budgets=(2e18, 3e18))
    ]
    scatter = laws.fit(skewed)["scatter"]
    assert scatter["same_way"] and scatter["sigma"] > 1e-4


def test_without_a_measure_of_the_scatter_there_are_no_intervals():
    found = laws.fit(points(noise=0.001, depths=(8, 12, 18)))
    assert found["scatter"]["sigma"] is None
    assert exponents(found)[0]["low"] is None and exponents(found)[0]["value"] > 0


def test_a_best_size_that_was_not_run_round_is_named_and_left_out():
    found = laws.fit(points(budgets=(*BUDGETS, 1e24)))
    assert "deeper than 18" in found["budgets"][-1]["problem"] and "params" not in found["budgets"][-1]
    assert exponents(found)[0]["value"] == pytest.approx(A, abs=1e-6)
    found = laws.fit(points(budgets=(1e13, 2e13)))  # the runs are there to be looked at all the same
    assert found["laws"] is None and "less deep than 8, or more FLOPs" in found["budgets"][0]["problem"]
    with pytest.raises(ValueError, match="2 sizes, three are needed"):
        laws.fit(points(depths=(8, 18)))


def test_a_hill_has_no_best_size():
    upside_down = [laws.Point(p.budget, p.depth, p.params, p.tokens, -p.bpb) for p in points()]
    assert laws.fit(upside_down)["laws"] is None
    assert all(curve["problem"] for curve in laws.fit(upside_down)["budgets"])


def test_one_budget_gives_a_best_size_and_no_law():
    found = laws.fit(points(budgets=(2e18,)))
    assert found["laws"] is None and found["budgets"][0]["params"]["value"] == pytest.approx(best_size(2e18), rel=1e-6)
    with pytest.raises(ValueError, match="two budgets with a best size are needed to tell of others"):
        laws.fit(points(budgets=(2e18,)), at=(1e20,))


def test_an_interval_too_wide_to_be_drawn_is_none():
    drawn = np.array([1.0] * 90 + [math.nan] * 10)  # one world in ten has no lowest point
    assert laws.told(1.0, drawn) == {"value": 1.0, "low": None, "high": None}


def test_draws_without_a_lowest_point_count_as_beyond_the_interval():
    drawn = np.concatenate([np.linspace(0, 1, 1960), [math.nan] * 40])
    found = laws.told(0.5, drawn)
    inside = np.mean((drawn >= found["low"]) & (drawn <= found["high"]))
    assert inside == pytest.approx(0.95, abs=0.002)
    assert laws.told(400.0, power=True)["value"] == 1e300


def test_a_straight_line_and_what_it_says_of_one_more_run():
    xs = np.arange(8.0)
    exact = laws.straight(xs, 2 * xs + 1)
    assert exact["slope"] == pytest.approx(2) and exact["r2"] == pytest.approx(1)
    assert laws.straight(xs[:2], xs[:2]) is None
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        line = laws.straight(xs, 2 * xs + 1 + rng.standard_normal(8))
        one = laws.predicted(line, 10.0)
        held += one["low"] <= 21 + rng.standard_normal() <= one["high"]
    assert 270 <= held <= 297  # 95 % of 300 are 285


def test_a_power_law_with_a_floor():
    flops = np.geomspace(1e17, 1e20, 8)
    found = laws.with_floor(flops, 0.55 + 30 * flops**-0.1)
    assert found["floor"] == pytest.approx(0.55, abs=0.01) and found["alpha"] == pytest.approx(0.1, rel=0.05)
    assert found["floor"] + found["A"] * 1e21 ** -found["alpha"] == pytest.approx(0.55 + 30 * 1e21**-0.1, abs=0.005)
    assert laws.with_floor(flops[:3], flops[:3]) is None


def test_students_t():
    assert laws.t_975(1) == 12.706 and laws.t_975(30) == 2.042
    assert laws.t_975(31) == pytest.approx(2.040, abs=0.002) and laws.t_975(1000) == pytest.approx(1.9623, abs=0.001)
