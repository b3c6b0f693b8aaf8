"""Sharing a budget out, against brute force."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence

import pytest

from slimdiff import allocate as module
from slimdiff.allocate import TOLERANCE, Allocation, Item, allocate, level_out
from slimdiff.errors import BudgetError

Errors = Callable[[random.Random, int], list[float]]


SIZES = (10**3, 10**6, 10**9, 10**12)


def make_items(
    rng: random.Random, errors: Errors, count: int = 4, options: int = 4, tops: Sequence[int] = (60,), factor: int = 1
) -> list[Item]:
    """Falling costs, each item's below one of `tops`, all times `factor`."""
    items = []
    for i in range(count):
        costs = sorted((factor * c for c in rng.sample(range(1, rng.choice(tops)), options)), reverse=True)
        items.append(Item(f"item {i}", tuple(range(options, 0, -1)), tuple(costs), (0.0, *errors(rng, options - 1))))
    return items


def rising(rng: random.Random, count: int) -> list[float]:
    """Convex or not."""
    return sorted(rng.choice([rng.random(), rng.random() ** 4]) for _ in range(count))


def noisy(rng: random.Random, count: int) -> list[float]:
    """Up and down, and with a few below the dense model's, as measured errors are."""
    return [rng.uniform(-0.1, 1.0) for _ in range(count)]


def wild(rng: random.Random, count: int) -> list[float]:
    return sorted(10 ** rng.uniform(-12, 3) for _ in range(count))


def exponential(rng: random.Random, count: int) -> list[float]:
    """As solves give them: steeper and steeper, of weights that differ by six decades."""
    weight, rate = 10 ** rng.uniform(-6, 0), rng.uniform(2, 9)
    return [weight * (math.exp(rate * (o + 1) / count) - 1) / math.exp(rate) for o in range(count)]


def proportional(rng: random.Random, count: int) -> list[float]:
    """All slopes nearly alike, so that the relaxation decides nothing."""
    return [(o + 1) * rng.uniform(0.99, 1.01) for o in range(count)]


def tied(rng: random.Random, count: int) -> list[float]:
    """Few different ones, and nothing lost at first."""
    return sorted(rng.choice([0.0, 0.1, 0.25]) for _ in range(count))


KINDS = (rising, noisy, wild, exponential, proportional, tied)


def random_items(rng: random.Random) -> list[Item]:
    return make_items(rng, rising)


def level_items(count: int, options: int = 5, step: int = 10) -> tuple[list[Item], list[tuple[float, ...]]]:
    """Equal items, and the share of cost that each option keeps."""
    costs = tuple(step * (options - o) for o in range(options))
    item = Item("", tuple(range(options, 0, -1)), costs, tuple(float(o) for o in range(options)))
    items = [Item(f"item {i}", item.widths, item.costs, item.errors) for i in range(count)]
    return items, [tuple(cost / costs[0] for cost in costs)] * count


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


def check(items: list[Item], found: Allocation, required: int) -> None:
    """What holds for every allocation."""
    options = chosen(items, found)
    assert found.saved == sum(item.costs[0] - item.costs[o] for item, o in zip(items, options, strict=True)) >= required
    assert found.error == pytest.approx(math.fsum(i.errors[o] for i, o in zip(items, options, strict=True)), rel=1e-12)
    assert found.bound <= found.error


@pytest.mark.parametrize("factor", [1, 7, 10**9 + 1])
@pytest.mark.parametrize("errors", KINDS)
def test_the_error_is_the_least_of_all(errors: Errors, factor: int):
    rng = random.Random(0)
    for _ in range(60):
        items = make_items(rng, errors, options=rng.choice([2, 4, 6]), factor=factor)
        required = rng.randint(1, most(items))
        found, best = allocate(items, required), brute_force(items, required)
        check(items, found, required)
        assert found.error <= best + TOLERANCE * abs(best)
        assert found.bound <= best + 1e-12 * abs(best)
        assert found.bound >= found.error - TOLERANCE * abs(found.error)


@pytest.mark.parametrize("errors", KINDS)
def test_costs_of_all_sizes_in_one_problem(errors: Errors):
    rng = random.Random(1)
    for _ in range(30):
        items = make_items(rng, errors, 5, tops=SIZES)
        required = rng.choice([rng.randint(1, most(items)), rng.randint(1, 10**3)])
        found, best = allocate(items, required), brute_force(items, required)
        check(items, found, required)
        assert found.bound - 1e-12 * abs(best) <= best
        assert found.error <= best + TOLERANCE * abs(best)


@pytest.mark.parametrize("tops", [SIZES[-1:], SIZES])
@pytest.mark.parametrize("errors", KINDS)
def test_the_bound_of_large_problems_is_tight(errors: Errors, tops: Sequence[int]):
    for seed, share in enumerate([0.05, 0.35, 0.8]):
        items = make_items(random.Random(seed), errors, 200, 20, tops)
        required = int(share * most(items))
        found = allocate(items, required)
        check(items, found, required)
        assert found.error - found.bound <= 1e-5 * abs(found.error)
        assert allocate(items, required) == found


@pytest.mark.parametrize("errors", KINDS)
def test_the_search_needs_no_trimming(errors: Errors, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_trim", lambda items, chosen, required: list(chosen))
    rng = random.Random(2)
    for _ in range(30):
        items = make_items(rng, errors, 30, 8, SIZES)
        found = allocate(items, rng.randint(1, most(items)))
        assert found.error - found.bound <= 1e-5 * abs(found.error)


@pytest.mark.parametrize("tops", [(100,), SIZES[-1:], SIZES])
@pytest.mark.parametrize("errors", KINDS)
def test_the_largest_problems_take_a_moment(errors: Errors, tops: Sequence[int]):
    items = make_items(random.Random(3), errors, 420, 40, tops)
    begin = time.process_time()
    allocate(items, int(0.35 * most(items)))
    assert time.process_time() - begin < 5  # it takes 0.05


def test_a_search_cut_short_gives_a_feasible_choice_and_a_true_bound(monkeypatch: pytest.MonkeyPatch):
    rng, short = random.Random(4), 0
    monkeypatch.setattr(module, "STATES", 1)
    for _ in range(100):
        items = make_items(rng, proportional, 5, 5)
        required = rng.randint(1, most(items))
        found, best = allocate(items, required), brute_force(items, required)
        check(items, found, required)
        assert found.bound - 1e-12 <= best <= found.error + 1e-12
        short += found.error - found.bound > TOLERANCE * found.error
    assert short > 5


def test_errors_that_are_not_finite_are_taken_only_where_nothing_else_saves_enough():
    rng = random.Random(5)
    for _ in range(100):
        items = make_items(rng, lambda r, n: [r.choice([e, math.inf, math.nan]) for e in rising(r, n)])
        known = [[o for o, e in enumerate(item.errors) if math.isfinite(e)] for item in items]
        finite = sum(item.costs[0] - item.costs[options[-1]] for item, options in zip(items, known, strict=True))
        few = [
            Item(i.name, k, [i.costs[o] for o in k], [i.errors[o] for o in k])
            for i, k in zip(items, known, strict=True)
        ]
        required = rng.randint(0, finite)
        found = allocate(items, required)
        check(items, found, required)
        assert found.error <= brute_force(few, required) * (1 + TOLERANCE)
        if finite < most(items):
            beyond = allocate(items, finite + 1)
            assert beyond.saved > finite
            assert not math.isfinite(beyond.error)


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


@pytest.mark.parametrize("errors", [rising, tied, wild])
def test_no_step_is_left_that_could_be_given_back(errors: Errors):
    rng = random.Random(2)
    for _ in range(150):
        items = make_items(rng, errors, 8, 8)
        required = rng.randint(1, most(items))
        found = allocate(items, required)
        for item, option in zip(items, chosen(items, found), strict=True):
            for wider in range(option):
                back = item.costs[wider] - item.costs[option]
                assert item.errors[wider] > item.errors[option] or found.saved - back < required


def test_what_an_overshooting_last_step_makes_needless_is_given_back():
    """The small step is the cheaper one per cost and comes first; the big one that has to follow is enough alone."""
    small, big = Item("small", (2, 1), (20, 10), (0.0, 0.05)), Item("big", (2, 1), (1000, 0), (0.0, 10.0))
    found = allocate([small, big], 1000)
    assert (found.widths, found.saved, found.error) == ({"small": 2, "big": 1}, 1000, 10.0)
    assert found.bound == pytest.approx(10.0)  # the relaxation's is 0.05 + 0.01 * 990
    assert allocate([small, big], 1001).widths == {"small": 1, "big": 1}


def test_a_budget_beyond_the_narrowest_widths_is_refused_with_the_arithmetic():
    items = random_items(random.Random(3))
    levels = [tuple(cost / item.costs[0] for cost in item.costs) for item in items]
    for share_out in (allocate, lambda items, required: level_out(items, required, levels)):
        assert share_out(items, most(items)).saved == most(items)
        with pytest.raises(BudgetError, match=rf"{most(items) + 1:,}.*{most(items):,}"):
            share_out(items, most(items) + 1)


def test_nothing_required_keeps_every_width():
    items = random_items(random.Random(4))
    found = allocate(items, 0)
    assert found == Allocation({item.name: item.widths[0] for item in items}, 0, 0.0, 0.0)


def test_equal_items_are_cut_in_their_order():
    items = [Item(name, (2, 1), (10, 5), (0.0, 1.0)) for name in "abcd"]
    for _ in range(3):
        assert allocate(items, 10).widths == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert allocate(items[::-1], 10).widths == {"d": 1, "c": 1, "b": 2, "a": 2}


def test_what_costs_no_error_and_is_not_needed_stays():
    small, big = Item("small", (2, 1), (20, 10), (0.0, 0.0)), Item("big", (2, 1), (200, 100), (0.0, 0.0))
    assert allocate([small, big], 100) == Allocation({"small": 2, "big": 1}, 100, 0.0, 0.0)


def test_items_that_cost_no_error_go_first():
    free, dear = Item("free", (3, 2, 1), (30, 20, 10), (0.0, 0.0, 0.0)), Item("dear", (2, 1), (30, 10), (0.0, 1e-9))
    found = allocate([dear, free], 20)
    assert (found.widths, found.error) == ({"dear": 2, "free": 1}, 0.0)


def test_an_option_that_saves_more_at_less_error_is_preferred():
    item = Item("dip", (4, 3, 2, 1), (40, 30, 20, 10), (0.0, 5.0, 1.0, 9.0))
    assert allocate([item], 5).widths == {"dip": 2}
    assert allocate([item], 25).widths == {"dip": 1}


def test_no_items_save_nothing():
    assert allocate([], 0) == level_out([], 0, []) == Allocation({}, 0, 0.0, 0.0)


def random_levels(rng: random.Random, items: Sequence[Item]) -> list[tuple[float, ...]]:
    return [(1.0, *sorted((rng.random() for _ in item.costs[1:]), reverse=True)) for item in items]


def test_levelling_out_meets_the_budget_and_leaves_no_step_to_undo():
    rng = random.Random(6)
    for _ in range(200):
        items = make_items(rng, rising, 6, 5, factor=rng.choice([1, 8]))
        required = rng.randint(0, most(items))
        found = level_out(items, required, random_levels(rng, items))
        check(items, found, required)
        assert found.bound == 0.0
        for item, option in zip(items, chosen(items, found), strict=True):
            assert option == 0 or found.saved - (item.costs[option - 1] - item.costs[option]) < required


def test_levelling_out_takes_what_keeps_the_most():
    """Steps save alike, so that there is nothing to undo: what is taken keeps more than what is left."""
    rng = random.Random(7)
    for _ in range(100):
        items = convex_items(rng)
        levels = random_levels(rng, items)
        options = chosen(items, level_out(items, rng.randint(1, most(items)), levels))
        taken = [level[o] for level, o in zip(levels, options, strict=True)]
        left = [level[o + 1] for level, o in zip(levels, options, strict=True) if o + 1 < len(level)]
        assert min(taken) >= max(left, default=0.0)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
def test_equal_items_end_within_one_option_of_each_other(count: int):
    items, levels = level_items(count)
    for required in range(0, most(items) + 1, 5):
        options = chosen(items, level_out(items, required, levels))
        assert max(options) - min(options) <= 1
        assert sum(options) == math.ceil(required / 10)


@pytest.mark.parametrize("count", [5, 16, 33, 100])
def test_equal_items_are_visited_spread_over_the_list(count: int):
    """Of any first few, about as many lie in every part of the list as its share."""
    items, levels = level_items(count, 2)
    for visited in range(1, count + 1):
        options = chosen(items, level_out(items, 10 * visited, levels))
        for part in range(1, count):
            assert abs(sum(options[:part]) - visited * part / count) < 2.5
        middle = sum(i + 0.5 for i, option in enumerate(options) if option) / visited
        assert abs(middle / count - 0.5) <= 0.13


def test_a_last_step_that_saves_too_much_undoes_the_steps_before_it_the_latest_first():
    small = [Item(f"small {i}", (3, 2, 1), (30, 20, 10), (0.0, 1.0, 2.0)) for i in range(3)]
    big = Item("big", (2, 1), (1000, 0), (0.0, 7.0))
    levels = [(1.0, 0.9, 0.6), (1.0, 0.9, 0.7), (1.0, 0.9, 0.8), (1.0, 0.5)]
    found = level_out([*small, big], 1040, levels)
    assert found == Allocation({"small 0": 2, "small 1": 2, "small 2": 1, "big": 1}, 1040, 11.0, 0.0)
    assert level_out([*small, big], 60, levels).widths["big"] == 2


def test_items_of_one_width_stay_as_they_are():
    fixed, free = Item("fixed", (1,), (10,), (0.0,)), Item("free", (2, 1), (10, 5), (0.0, 1.0))
    expected = Allocation({"fixed": 1, "free": 1}, 5, 1.0, 0.0)
    assert level_out([fixed, free], 3, [(1.0,), (1.0, 0.5)]) == expected
    assert allocate([fixed, free], 3).widths == expected.widths
