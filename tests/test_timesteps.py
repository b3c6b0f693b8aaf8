"""Weights of timesteps: what they stress, and that the sums take them as repeated tokens."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from slimdiff.gram import Gram
from slimdiff.timesteps import WEIGHTINGS, Clock, weights

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(kind, steps):
    scheduler = kind(**SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_weight_a_step_and_their_mean_is_one(kind, steps, weighting):
    found = weights(weighting, made(kind, steps))
    assert len(found) == steps and sum(found) == pytest.approx(steps)
    assert all(weight > 0 for weight in found)


def test_early_steps_count_more():
    scheduler = made(DDIMScheduler, 20)
    assert weights("uniform", scheduler) == [1.0] * 20
    for weighting in ("decreasing", "sigma"):
        found = weights(weighting, scheduler)
        assert found[:10] == sorted(found[:10], reverse=True) and sum(found[:10]) > 10 > sum(found[10:])
    falling = weights("decreasing", scheduler)
    assert falling[0] / falling[-1] == pytest.approx(1.2 / 0.8)


def test_the_clock_tells_the_weight_of_the_call_at_hand():
    clock = Clock([3.0, 2.0, 1.0])
    seen = []
    for index in range(3):
        seen.append(clock.weight())
        clock.tick(index)
    assert seen == [3.0, 2.0, 1.0]


def test_a_weight_is_a_number_of_copies():
    x, y = torch.randn(7, 4), torch.randn(5, 4) + 3
    weighted, repeated = Gram(2, 2), Gram(2, 2)
    weighted.add(x)
    weighted.add(y, 3.0)
    for part in (x, y, y, y):
        repeated.add(part)
    ours, theirs = weighted.moments(), repeated.moments()
    assert ours.count == theirs.count == 22
    assert torch.allclose(ours.mean, theirs.mean) and torch.allclose(ours.covariance, theirs.covariance)
