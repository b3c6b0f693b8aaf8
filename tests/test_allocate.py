"""Sharing a budget out, against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from slimdiff.allocate import Allocation, Item, allocate
from slimdiff.errors import BudgetError


def random_items(rng: random.Random, count: int = 4, options: int = 4) -> list[Item]:
    """Falling costs and rising errors, convex or not."""
    items = []
    for i in range(count):
        costs = sorted(rng.sample(range(1, 60), options), reverse=True)
        errors = sorted(rng.choice([rng.random(), rng.random() ** 4]) for _ in range(options - 1))
        items.append(Item(f"item {i}", tuple(range(options, 0, -1)), tuple(costs), (0.0, *errors)))
    return items


def convex_items(rng: random.Random, count: int = 4, options: int = 4) -> list[Item]:
    """Every step saves 5 and costs more error than the one before it."""
    items = []
    for i in range(count):
        steps = sorted(rng.random() for _ in range(options - 1))
        errors = tuple(itertools.accumulate(steps, initial=0.0))
        items.append(Item(f"item {i}", tuple(range(options, 0, -1)), tuple(range(5 * options, 0, -5)), errors))
    return items


def most(items: list[Item]) -> int:
    return sum(item.costs[0] - item.costs[-1] for item in items)


def brute_force(items: list[Item], required: int) -> float:
    """The least error of all choices that save enough."""
    return min(
        sum(item.errors[o] for item, o in zip(items, choice, strict=True))
        for choice in itertools.product(*(range(len(item.costs)) for item in items))
        if sum(item.costs[0] - item.costs[o] for item, o in zip(items, choice, strict=True)) >= required
    )


def chosen(items: list[Item], allocation: Allocation) -> list[int]:
    return [item.widths.index(allocation.widths[item.name]) for item in items]


def test_budget_is_met_and_the_error_lies_between_optimum_and_a_little_more():
    rng, gaps = random.Random(0), []
    for _ in range(150):
        items = random_items(rng)
        required = rng.randint(1, most(items))
        found = allocate(items, required)
        options = chosen(items, found)
        saved = sum(item.costs[0] - item.costs[o] for item, o in zip(items, options, strict=True))
        assert found.saved == saved >= required
        assert found.error == pytest.approx(sum(i.errors[o] for i, o in zip(items, options, strict=True)))
        best = brute_force(items, required)
        assert found.bound - 1e-12 <= best <= found.error + 1e-12
        gaps.append(found.error - best)
    assert sum(gap < 1e-12 for gap in gaps) > 75  # most are the optimum
    assert sum(gaps) / len(gaps) < 0.1


def test_convex_curves_of_equal_steps_are_shared_out_optimally():
    rng = random.Random(1)
    for _ in range(60):
        items = convex_items(rng)
        required = rng.randint(0, most(items))
        found = allocate(items, required)
        assert found.error == pytest.approx(brute_force(items, required), abs=1e-12)
        assert found.saved - required < 5
        if required % 5 == 0:
            assert found.bound == pytest.approx(found.error, abs=1e-12)


def test_no_step_is_left_that_could_be_given_back():
    rng = random.Random(2)
    for _ in range(150):
        items = random_items(rng)
        required = rng.randint(1, most(items))
        found = allocate(items, required)
        for item, option in zip(items, chosen(items, found), strict=True):
            for wider in range(option):
                back = item.costs[wider] - item.costs[option]
                assert item.errors[wider] >= item.errors[option] or found.saved - back < required


def test_what_an_overshooting_last_step_makes_needless_is_given_back():
    """The small step is the cheaper one per cost and comes first; the big one that has to follow is enough alone."""
    small, big = Item("small", (2, 1), (20, 10), (0.0, 0.05)), Item("big", (2, 1), (1000, 0), (0.0, 10.0))
    found = allocate([small, big], 1000)
    assert (found.widths, found.saved, found.error) == ({"small": 2, "big": 1}, 1000, 10.0)
    assert found.bound == pytest.approx(0.05 + 0.01 * 990)
    assert allocate([small, big], 1001).widths == {"small": 1, "big": 1}


def test_a_budget_beyond_the_narrowest_widths_is_refused_with_the_arithmetic():
    items = random_items(random.Random(3))
    allocate(items, most(items))
    with pytest.raises(BudgetError, match=rf"{most(items) + 1:,}.*{most(items):,}"):
        allocate(items, most(items) + 1)


def test_nothing_required_keeps_every_width():
    items = random_items(random.Random(4))
    found = allocate(items, 0)
    assert found == Allocation({item.name: item.widths[0] for item in items}, 0, 0.0, 0.0)


def test_equal_items_are_cut_in_their_order():
    items = [Item(name, (2, 1), (10, 5), (0.0, 1.0)) for name in "abcd"]
    for _ in range(3):
        assert allocate(items, 10).widths == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert allocate(items[::-1], 10).widths == {"d": 1, "c": 1, "b": 2, "a": 2}


def test_items_that_cost_no_error_go_first():
    free, dear = Item("free", (3, 2, 1), (30, 20, 10), (0.0, 0.0, 0.0)), Item("dear", (2, 1), (30, 10), (0.0, 1e-9))
    found = allocate([dear, free], 20)
    assert (found.widths, found.error) == ({"dear": 2, "free": 1}, 0.0)
