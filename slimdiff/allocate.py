"""Sharing one budget out: (cost, error by width) of every item -> widths. Knows nothing of UNets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from slimdiff.errors import BudgetError

TOLERANCE = 1e-6
"""Error above the least, relative to it, that `allocate` does not search on for."""

STATES = 10_000
"""Partial choices that `allocate` keeps at a time, seldom reached. A limit on time would make answers vary."""


@dataclass(frozen=True)
class Item:
    """Something with a width to choose. Options go from full width down: costs strictly fall, errors start at 0.

    All costs together stay below 2^53. Errors need not rise steadily; infinite ones, and NaN, are taken only where
    nothing else saves enough.
    """

    name: str
    widths: tuple[int, ...]
    costs: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """`widths` by item; `saved` cost, at least what was asked; the summed `error`; a lower `bound` on any."""

    widths: dict[str, int]
    saved: int
    error: float
    bound: float


def allocate(items: Sequence[Item], required: int) -> Allocation:
    """Widths of least summed error, up to TOLERANCE, among those that save at least `required`.

    This is the multiple-choice knapsack problem. Its relaxation gives a choice and a bound; options that the two rule
    out are dropped, and the others searched. Should the search outgrow STATES, the best it saw is returned, and `bound`
    tells how far off that may be. No single step that still keeps the budget is left to give back.

    Raises BudgetError if all items at their narrowest do not save enough.
    """
    _check(items, required)
    finite = _finite(items)
    relaxed = _relax(finite, required)
    chosen, bound = _trim(finite, relaxed.chosen, required), relaxed.bound
    best = _error(finite, chosen)
    if best - bound > TOLERANCE * abs(best):
        options = _promising(finite, relaxed, best)
        less = [_only(item, kept) for item, kept in zip(finite, options, strict=True)]
        dropped = sum(item.costs[0] - few.costs[0] for item, few in zip(finite, less, strict=True))
        found, bound = _search(less, required - dropped, best)
        if found:
            chosen = _trim(finite, [kept[c] for kept, c in zip(options, found, strict=True)], required)
    return _allocation(items, chosen, bound)


def level_out(items: Sequence[Item], required: int, levels: Sequence[Sequence[float]]) -> Allocation:
    """Widths that wear all items down alike, whatever their errors; `bound` is 0.

    `levels[i][o]` is how much option o of item i still keeps: 1 at full width, falling. Again and again, the item whose
    next option keeps the most takes it, equal ones in turns all over the list (`_spread`), until `required` is saved.
    Then the steps are gone through again, the latest first, and those that the budget can do without are undone.

    Raises BudgetError if all items at their narrowest do not save enough.
    """
    _check(items, required)
    turn = {i: turn for turn, i in enumerate(_spread(len(items)))}
    heap = [(-level[1], turn[i], i) for i, level in enumerate(levels) if len(level) > 1]
    heapq.heapify(heap)
    chosen, spare = [0] * len(items), -required
    taken: list[int] = []
    while spare < 0:
        _, _, i = heapq.heappop(heap)
        spare += items[i].costs[chosen[i]] - items[i].costs[chosen[i] + 1]
        chosen[i] += 1
        taken.append(i)
        if chosen[i] + 1 < len(levels[i]):
            heapq.heappush(heap, (-levels[i][chosen[i] + 1], turn[i], i))
    for i in reversed(taken):
        step = items[i].costs[chosen[i] - 1] - items[i].costs[chosen[i]]
        if step <= spare:
            spare -= step
            chosen[i] -= 1
    return _allocation(items, chosen, 0.0)


def _spread(n: int) -> list[int]:
    """0..n - 1 in an order of which every beginning is spread evenly: van der Corput's 1/2, 1/4, 3/4, 1/8, ... of n."""
    bits = n.bit_length()
    return list(dict.fromkeys(int(f"{k:0{bits}b}"[::-1], 2) * n >> bits for k in range(1, 2**bits)))


def _check(items: Sequence[Item], required: int) -> None:
    most = _saved(items, [-1] * len(items))
    if required > most:
        raise BudgetError(f"{required:,} were to be saved, but with every width at its minimum only {most:,} are.")


def _saved(items: Sequence[Item], chosen: Sequence[int]) -> int:
    return sum(item.costs[0] - item.costs[c] for item, c in zip(items, chosen, strict=True))


def _error(items: Sequence[Item], chosen: Sequence[int]) -> float:
    return math.fsum(item.errors[c] for item, c in zip(items, chosen, strict=True))


def _allocation(items: Sequence[Item], chosen: Sequence[int], bound: float) -> Allocation:
    widths = {item.name: item.widths[c] for item, c in zip(items, chosen, strict=True)}
    error = _error(items, chosen)
    return Allocation(widths, _saved(items, chosen), error, min(bound, error))


def _finite(items: Sequence[Item]) -> list[Item]:
    """The items with each error that is not finite replaced: by more than all others together, even per cost."""
    total = math.fsum(abs(e) for item in items for e in item.errors if math.isfinite(e)) or 1.0
    huge = 2 * total * max(1, _saved(items, [-1] * len(items)))
    return [replace(item, errors=tuple(e if math.isfinite(e) else huge for e in item.errors)) for item in items]


def _only(item: Item, options: Sequence[int]) -> Item:
    """The item with some of its options."""
    costs, errors = tuple(item.costs[o] for o in options), tuple(item.errors[o] for o in options)
    return Item(item.name, tuple(item.widths[o] for o in options), costs, errors)


STEP = np.dtype([("slope", "f8"), ("item", "i8"), ("option", "i8"), ("saved", "i8"), ("error", "f8")])
"""An item's step to an option: what it saves, the error it adds, and that per unit of cost saved."""


def _steps(items: Sequence[Item]) -> npt.NDArray[np.void]:
    """Every item's steps down its lower convex hull of error over saved cost, those of least slope first.

    However many of them are taken, they lead to a choice of least error among all that save as much (Sinha and Zoltners
    1979). Ahead of all, at slope -inf, each item steps from nothing to where its hull begins.
    """
    steps = []
    for i, item in enumerate(items):
        hull = _hull(item)
        steps.append((-math.inf, i, hull[0], item.costs[0] - item.costs[hull[0]], item.errors[hull[0]]))
        for wide, narrow in pairwise(hull):
            saved, error = item.costs[wide] - item.costs[narrow], item.errors[narrow] - item.errors[wide]
            steps.append((_slope(item, wide, narrow), i, narrow, saved, error))
    return np.array(sorted(steps), STEP)


def _slope(item: Item, wide: int, narrow: int) -> float:
    """Error gained per unit of cost saved by going from one option to another."""
    return (item.errors[narrow] - item.errors[wide]) / (item.costs[wide] - item.costs[narrow])


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull of error over saved cost, from the widest of least error down."""
    hull = [min(range(len(item.errors)), key=item.errors.__getitem__)]
    for option in range(hull[0] + 1, len(item.errors)):
        while len(hull) > 1 and _slope(item, hull[-2], hull[-1]) > _slope(item, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _frontier(steps: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What is saved, and at what error, by the first steps of all items and then by each that follows.

    These points are choices; the line through them is a lower bound on the error of any.
    """
    first = np.count_nonzero(steps["slope"] == -np.inf)
    saved, errors = np.cumsum(steps["saved"]), np.cumsum(steps["error"])
    return np.insert(saved, 0, 0)[first:], np.insert(errors, 0, 0.0)[first:]


def _options(steps: npt.NDArray[np.void]) -> dict[int, int]:
    """The options that steps lead to, by item."""
    return dict(zip(steps["item"].tolist(), steps["option"].tolist(), strict=True))


@dataclass(frozen=True)
class _Relaxed:
    """A choice that saves enough, the `base` one step before it, that step's `slope` λ, and a lower `bound` on errors.

    Choices hold an option for each item. Where the least error of all saves enough, there is no step, and λ is 0.
    """

    chosen: list[int]
    base: list[int]
    slope: float
    bound: float


def _relax(items: Sequence[Item], required: int) -> _Relaxed:
    """The Lagrangian relaxation, which is the linear one."""
    steps = _steps(items)
    saved, errors = _frontier(steps)
    more = int(np.searchsorted(saved, required))
    last = len(items) + more - 1
    chosen, base = _options(steps[: last + 1]), _options(steps[: last if more else last + 1])
    return _Relaxed(
        [chosen[i] for i in range(len(items))],
        [base[i] for i in range(len(items))],
        float(steps["slope"][last]) if more else 0.0,
        float(np.interp(required, saved, errors)),
    )


def _trim(items: Sequence[Item], chosen: Sequence[int], required: int) -> list[int]:
    """`chosen` with items widened within what it saves too much, each time by the change that helps most."""
    trimmed, spare = list(chosen), _saved(items, chosen) - required
    while True:
        best = (0.0, 0, -1, -1)
        for i, item in enumerate(items):
            for option in range(trimmed[i]):
                cost = item.costs[option] - item.costs[trimmed[i]]
                gain = item.errors[trimmed[i]] - item.errors[option]
                if cost <= spare and (gain, cost) > best[:2]:
                    best = (gain, cost, i, option)
        _, cost, i, option = best
        if i < 0:
            return trimmed
        trimmed[i] = option
        spare -= cost


def _promising(items: Sequence[Item], relaxed: _Relaxed, best: float) -> list[list[int]]:
    """Each item's base, and its options that choices of less error than `best` may have.

    The base has the least `error - λ saved`. What another option has more of that, it adds to the bound on all choices
    that have it (Pisinger 1995). Nor can its error, less the least errors of the other items, exceed the best.
    """
    spare = best - math.fsum(min(item.errors) for item in items)
    promising = []
    for item, base in zip(items, relaxed.base, strict=True):
        costs, errors = np.array(item.costs), np.array(item.errors)
        added = errors - errors[base] - relaxed.slope * (costs[base] - costs)
        kept = (added < best - relaxed.bound) & (errors - errors.min() < spare)
        kept[base] = True
        promising.append(np.flatnonzero(kept).tolist())
    return promising


def _search(items: Sequence[Item], required: int, best: float) -> tuple[list[int], float]:
    """A choice of least error, up to TOLERANCE, empty if that is not below `best`; and a lower bound on any's error.

    Dynamic programming over the items, those with most to save first. A state is a choice for the items so far, bounded
    from below by the relaxation of the items to come, and completed to a choice for all along their frontier. Kept are
    states that may lead below the best and that none beats in both error and savings (Dyer, Riha and Walker 1995).
    """
    order = sorted(range(len(items)), key=lambda i: items[i].costs[-1] - items[i].costs[0])
    items = [items[i] for i in order]
    steps = _steps(items)
    bound, found = best, dict[int, int]()
    saved, error, trail = np.zeros(1, np.int64), np.zeros(1), [np.zeros(1, np.int64)]
    for k, item in enumerate(items):
        saved = np.add.outer(saved, item.costs[0] - np.array(item.costs)).ravel()
        error = np.add.outer(error, np.array(item.errors)).ravel()
        later = steps[steps["item"] > k]
        points, errors = _frontier(later)
        least = error + np.interp(required - saved, points, errors, right=np.inf)
        more = np.searchsorted(points, required - saved)
        whole = error + np.append(errors, np.inf)[more]
        state = int(whole.argmin())
        if whole[state] < best:
            best = float(whole[state])
            found = _options(later[: len(items) - k - 1 + more[state]])
            for j in range(k, -1, -1):
                parent, found[j] = divmod(state, len(items[j].costs))
                state = int(trail[j][parent])
        hopeful = least < best - TOLERANCE * abs(best)
        states = np.flatnonzero(hopeful)
        states = states[np.lexsort((error[states], -saved[states]))]
        states = states[error[states] < np.minimum.accumulate(np.append(np.inf, error[states]))[:-1]]
        states = states[np.argsort(least[states], kind="stable")]
        states, dropped = states[:STATES], states[STATES:]
        bound = min(bound, *(float(least[gone].min(initial=np.inf)) for gone in (~hopeful, dropped)))
        if not len(states):
            break
        saved, error = saved[states], error[states]
        trail.append(states)
    return [found[order.index(i)] for i in range(len(items))] if found else [], bound
