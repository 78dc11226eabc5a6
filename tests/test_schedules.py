"""Schedules, by hand."""

import math

import pytest

from nanochat.schedules import (
    learning_rate,
    learning_rate_by_progress,
    muon_momentum,
    sft_muon_momentum,
    weight_decay,
)


@pytest.mark.parametrize(
    "it, expected",
    [
        (0, 1 / 40),
        (1, 2 / 40),
        (19, 0.5),
        (39, 1.0),
        (40, 1.0),
        (350, 1.0),  # n - w, still in full
        (351, 649 / 650 + 1 / 650 * 0.05),
        (675, 0.5 + 0.5 * 0.05),
        (999, 1 / 650 + 649 / 650 * 0.05),
    ],
)
def test_learning_rate_goes_up_stays_and_goes_down(it, expected):
    """1,000 steps: 40 up, flat to 350, then 650 down to a twentieth."""
    assert learning_rate(it, 1000, 40, 0.65, 0.05) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warmup_or_warmdown():
    assert [learning_rate(it, 10, 0, 0.0, 0.0) for it in range(10)] == [1.0] * 10
    assert learning_rate(0, 10, 0, 1.0, 0.0) == 1.0
    assert learning_rate(9, 10, 0, 1.0, 0.0) == pytest.approx(0.1)


def test_length_of_the_warmdown_is_rounded():
    # 0.65 x 77 = 50.05 -> 50 steps, so step 27 is the last in full
    assert learning_rate(27, 77, 5, 0.65, 0.0) == 1.0
    assert learning_rate(28, 77, 5, 0.65, 0.0) == pytest.approx(49 / 50)
    # 0.65 x 9 = 5.85 -> 6
    assert learning_rate(3, 9, 0, 0.65, 0.0) == 1.0
    assert learning_rate(4, 9, 0, 0.65, 0.0) == pytest.approx(5 / 6)
    assert muon_momentum(4, 9, 0.65) == pytest.approx(0.90 + 0.07 * 5 / 6)


def test_warmup_has_precedence_over_warmdown():
    assert learning_rate(8, 10, 10, 1.0, 0.0) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "progress, expected", [(0.0, 1.0), (0.3, 1.0), (0.5, 1.0), (0.6, 0.8), (0.75, 0.5), (1.0, 0.0), (1.2, 0.0)]
)
def test_sft_learning_rate_goes_to_zero_over_the_last_half(progress, expected):
    assert learning_rate_by_progress(progress, 0.0, 0.5, 0.0) == pytest.approx(expected, abs=1e-9)


def test_sft_learning_rate_with_warmup_and_a_floor():
    assert learning_rate_by_progress(0.05, 0.1, 0.5, 0.2) == pytest.approx(0.5, abs=1e-6)
    assert learning_rate_by_progress(0.1, 0.1, 0.5, 0.2) == 1.0
    assert learning_rate_by_progress(1.0, 0.1, 0.5, 0.2) == pytest.approx(0.2)
    assert learning_rate_by_progress(0.75, 0.1, 0.5, 0.2) == pytest.approx(0.5 + 0.5 * 0.2)


@pytest.mark.parametrize(
    "it, expected",
    [
        (0, 0.85),
        (100, 0.88),
        (399, 0.85 + 0.12 * 399 / 400),
        (400, 0.97),
        (700, 0.97),  # n - w
        (701, 0.90 + 0.07 * 1299 / 1300),
        (1350, 0.935),
        (1999, 0.90 + 0.07 / 1300),
    ],
)
def test_muon_momentum_ramps_stays_and_goes_down(it, expected):
    """2,000 steps: 400 up, flat to 700, then 1,300 down."""
    assert muon_momentum(it, 2000, 0.65) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10, 77, 400, 1000, 1142, 1143, 5568])
def test_the_momentum_ramp_of_any_run_ends_before_its_warmdown(num_iterations):
    """A short run reaches the top too, and there is no jump on the way."""
    values = [muon_momentum(it, num_iterations, 0.65) for it in range(num_iterations)]
    assert all(0.85 <= value <= 0.97 for value in values)
    if num_iterations >= 10:
        top = max(range(num_iterations), key=values.__getitem__)
        assert values[top] == pytest.approx(0.97, abs=0.003)
        assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(values[top:], reverse=True)
        ramp = min(400, math.floor(0.35 * num_iterations))
        assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) <= 0.12 / ramp + 1e-9


def test_a_run_of_1143_steps_has_the_whole_ramp():
    assert muon_momentum(399, 1143, 0.65) == pytest.approx(0.85 + 0.12 * 399 / 400)
    assert muon_momentum(400, 1143, 0.65) == pytest.approx(0.97)


def test_a_profile_may_state_its_own_ramp():
    assert muon_momentum(10, 1000, 0.65, ramp_steps=20) == pytest.approx(0.91)


def test_sft_momentum():
    assert [sft_muon_momentum(it) for it in (0, 150, 300, 1000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert sft_muon_momentum(5, ramp_steps=10) == pytest.approx(0.90)


def test_weight_decay_is_a_half_cosine():
    assert weight_decay(0, 1000) == 1.0
    assert weight_decay(500, 1000) == pytest.approx(0.5)
    assert weight_decay(250, 1000) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert weight_decay(1000, 1000) == pytest.approx(0.0, abs=1e-12)
