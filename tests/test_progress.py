"""What a run remembers between two steps."""

import pytest
import torch
from helpers import CPU, optimizer_of, random_model, small_config

from nanochat import progress
from nanochat.memory import DeviceBatch
from nanochat.progress import Progress
from nanochat.training_step import optimizer_step


def test_the_scale_is_halved_by_an_overflow_and_doubles_after_a_thousand_good_steps():
    one = Progress()
    one.saw_scaled_step(False)
    assert one.loss_scale == 2.0**14
    for _ in range(progress.SCALE_DOUBLES_AFTER - 1):
        one.saw_scaled_step(True)
    assert one.loss_scale == 2.0**14
    one.saw_scaled_step(True)
    assert (one.loss_scale, one.scaled_steps) == (2.0**15, 0)


def test_a_scaled_loss_makes_the_same_step():
    config = small_config(64)
    idx = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))
    weights = []
    for scale in (1.0, 2.0**15):
        model = random_model(config)
        optimizer = optimizer_of(model)
        outcome = optimizer_step(model, optimizer, (idx[:, :-1], idx[:, 1:]), DeviceBatch(2, CPU), CPU, scale)
        assert outcome.finite and 1 < outcome.loss < 30
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7)


def test_the_average_is_that_of_the_losses_seen():
    one = Progress()
    assert one.smooth_loss != one.smooth_loss  # nothing seen: no number
    for loss in (3.0, 1.0):
        one.saw_loss(loss)
    assert one.smooth_loss == pytest.approx((0.9 * 0.1 * 3 + 0.1 * 1) / (1 - 0.81))


def test_due_every_so_many_steps_and_at_the_end():
    assert [step for step in range(10) if progress.is_due(step, 4, step == 9)] == [4, 8, 9]
    assert not progress.is_due(8, -1, True)
