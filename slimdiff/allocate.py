"""Sharing one budget out: (cost, error by width) of every item -> widths. Knows nothing of UNets."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from slimdiff.errors import BudgetError


@dataclass(frozen=True)
class Item:
    """Something with a width to choose. Options go from full width down: costs strictly fall, errors start at 0."""

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
    """Widths of least summed error among those that save at least `required`.

    Steps down each item's lower convex hull of error over saved cost are taken in the order of error per unit of cost
    (equal ones in the order of items) until enough is saved: the Lagrangian solution, optimal for the savings it
    reaches. The last step may save too much, so what can be given back is then given back, the most helpful first; no
    single step that still keeps the budget is left over. `bound` is the Lagrangian lower bound on any choice's error.

    Raises BudgetError if all items at their narrowest do not save enough.
    """
    most = sum(item.costs[0] - item.costs[-1] for item in items)
    if required > most:
        raise BudgetError(f"{required:,} were to be saved, but with every width at its minimum only {most:,} are.")
    chosen = [0] * len(items)
    hulls = [_hull(item) for item in items]
    heap = [(_slope(items[i], hull[0], hull[1]), i, 1) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    saved, error, bound = 0, 0.0, 0.0
    while saved < required:
        slope, i, position = heapq.heappop(heap)
        item, hull = items[i], hulls[i]
        step = item.costs[chosen[i]] - item.costs[hull[position]]
        bound = error + slope * (required - saved)
        saved += step
        error += slope * step
        chosen[i] = hull[position]
        if position + 1 < len(hull):
            heapq.heappush(heap, (_slope(item, hull[position], hull[position + 1]), i, position + 1))
    saved = _give_back(items, chosen, saved, required)
    return Allocation(
        {item.name: item.widths[c] for item, c in zip(items, chosen, strict=True)},
        saved,
        sum(item.errors[c] for item, c in zip(items, chosen, strict=True)),
        bound,
    )


def _slope(item: Item, wide: int, narrow: int) -> float:
    """Error gained per unit of cost saved by going from one option to another."""
    return (item.errors[narrow] - item.errors[wide]) / (item.costs[wide] - item.costs[narrow])


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull of error over saved cost, full width first."""
    hull: list[int] = []
    for option in range(len(item.widths)):
        while len(hull) > 1 and _slope(item, hull[-2], hull[-1]) >= _slope(item, hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _give_back(items: Sequence[Item], chosen: list[int], saved: int, required: int) -> int:
    """Widen items within the slack, in place, each time by the change that helps most; returns what is still saved."""
    while True:
        best = (0.0, 0, -1, -1)
        for i, item in enumerate(items):
            for option in range(chosen[i]):
                cost = item.costs[option] - item.costs[chosen[i]]
                gain = item.errors[chosen[i]] - item.errors[option]
                if cost <= saved - required and (gain, cost) > best[:2]:
                    best = (gain, cost, i, option)
        gain, cost, i, option = best
        if i < 0:
            return saved
        chosen[i] = option
        saved -= cost
