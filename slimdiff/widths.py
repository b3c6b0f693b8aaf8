"""The widths that groups may take, what they cost, and how much of that a budget wants gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slimdiff.allocate import Item
from slimdiff.errors import BudgetError
from slimdiff.groups import Group
from slimdiff.options import Of, Options
from slimdiff.plan import short


def width_step(group: Group, round_to: int | None) -> int:
    """The step of a group's widths: 8 for heads and 64 for hidden units, as GPUs like it, and less in small layers.

    One more channel in each group of a ResNet block's norm is 32 channels in full-size models, so there it is 1.
    """
    if group.kind in ("heads", "resnet"):
        return 1
    if group.kind == "ffn":
        return 8 * round_to if round_to else min(64, _power_of_two(group.width / 32))
    return round_to or (8 if group.width >= 32 else _power_of_two(group.width / 8))


def _power_of_two(x: float) -> int:
    return 2 ** max(0, math.floor(math.log2(x)))


def allowed_widths(group: Group, options: Options) -> tuple[int, ...]:
    """Widths a group may take: full, then multiples of its step that cost less, down to the least."""
    step = width_step(group, options.round_to)
    least = max(1, math.ceil(options.min_width * group.width))
    below = range((group.width - 1) // step * step, 0, -step)
    return (group.width, *(w for w in below if w >= least and group.params_at(w) < group.params))


def units(groups: Sequence[Group], options: Options) -> list[list[Group]]:
    """Groups that share one width: query-key and value-output of an attention, unless they are independent."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.name if options.independent_ranks else group.module, []).append(group)
    return list(found.values())


def cost(group: Group, width: int, of: Of) -> int:
    """In parameters or MACs."""
    return group.macs_at(width) if of == "macs" else group.params_at(width)


@dataclass(frozen=True)
class Currency:
    """What a budget is spent in: the `cost` of a unit of groups at a width, and the `whole` that it is a share of.

    Costs are whole numbers, and what counts is how they differ from one width to the next. Messages name the whole with
    `owner`, as in "UNet's {} parameters", and amounts with `show`.
    """

    cost: Callable[[Sequence[Group], int], int]
    whole: int
    owner: str
    show: Callable[[int], str] = short


def counted(unet_params: int, groups: Sequence[Group], of: Of) -> Currency:
    """Budgets in parameters or MACs."""
    what = "MACs" if of == "macs" else "parameters"
    return Currency(
        lambda unit, width: sum(cost(group, width, of) for group in unit),
        denominator(unet_params, groups, of),
        ("UNet's" if of == "unet" else "groups'") + " {} " + what,
    )


def prices(unit: Sequence[Group], options: Options, currency: Currency) -> dict[int, int]:
    """The cost of a unit at each width it may take, without widths that cost no less than a wider one."""
    found: dict[int, int] = {}
    for width in allowed_widths(unit[0], options):
        price = currency.cost(unit, width)
        if not found or price < min(found.values()):
            found[width] = price
    return found


def item(unit: Sequence[Group], errors: Mapping[str, Tensor], options: Options, currency: Currency) -> Item:
    """One unit's choice of widths; `errors` are by group and width, (width + 1,)."""
    costs = prices(unit, options, currency)
    return Item(
        unit[0].name,
        tuple(costs),
        tuple(costs.values()),
        tuple(sum(float(errors[group.name][w]) for group in unit) for w in costs),
    )


def denominator(unet_params: int, groups: Sequence[Group], of: Of) -> int:
    """What a budget of parameters or MACs is a share of."""
    return unet_params if of == "unet" else sum(cost(group, group.width, of) for group in groups)


def required(groups: Sequence[Group], options: Options, currency: Currency) -> int:
    """What has to be saved. Raises BudgetError, with the arithmetic, if that is too much."""
    wanted = math.ceil(options.budget * currency.whole - 1e-9)
    costs = [list(prices(unit, options, currency).values()) for unit in units(groups, options)]
    held, most = sum(cost[0] for cost in costs), sum(cost[0] - cost[-1] for cost in costs)
    if wanted > most:
        share = most / currency.whole
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise BudgetError(
            f"{options.budget:.1%} of the {currency.owner.format(currency.show(currency.whole))} is "
            f"{currency.show(wanted)}. The groups {kinds} hold {currency.show(held)}, of which at most "
            f"{currency.show(most)} can go with --min-width {options.min_width:g}. The most for this model is "
            + (f"--speedup {math.floor(100 / (1 - share)) / 100:g}, which is " if options.of == "latency" else "")
            + f"--budget {math.floor(1000 * share) / 1000:g}."
        )
    return wanted
