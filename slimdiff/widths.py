"""The widths that groups may take, what they cost, and how much of that a budget wants gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from slimdiff.allocate import Item
from slimdiff.errors import BudgetError
from slimdiff.groups import Group
from slimdiff.options import Of, Options
from slimdiff.plan import short


def width_step(group: Group, round_to: int | None) -> int:
    """The step of a group's widths: 8 for heads and 64 for hidden units, as GPUs like it, and less in small layers."""
    if group.kind == "heads":
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
    return group.macs_at(width) if of == "macs" else group.params_at(width)


def item(members: Sequence[Group], errors: Mapping[str, Tensor], options: Options) -> Item:
    """One unit's choice of widths; `errors` are by group and width, (width + 1,)."""
    widths = allowed_widths(members[0], options)
    return Item(
        members[0].name,
        widths,
        tuple(sum(cost(group, w, options.of) for group in members) for w in widths),
        tuple(sum(float(errors[group.name][w]) for group in members) for w in widths),
    )


def denominator(unet_params: int, groups: Sequence[Group], of: Of) -> int:
    """What a budget is a share of."""
    return unet_params if of == "unet" else sum(cost(group, group.width, of) for group in groups)


def required(unet_params: int, groups: Sequence[Group], options: Options) -> int:
    """What has to be saved, in parameters or MACs. Raises BudgetError, with the arithmetic, if that is too much."""
    whole = denominator(unet_params, groups, options.of)
    wanted = math.ceil(options.budget * whole - 1e-9)
    held = sum(cost(group, group.width, options.of) for group in groups)
    most = held - sum(cost(group, allowed_widths(group, options)[-1], options.of) for group in groups)
    if wanted > most:
        what = "MACs" if options.of == "macs" else "parameters"
        owner = "UNet's" if options.of == "unet" else "groups'"
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise BudgetError(
            f"{options.budget:.1%} of the {owner} {short(whole)} {what} is {short(wanted)}. The groups {kinds} "
            f"hold {short(held)}, of which at most {short(most)} can go with --min-width {options.min_width:g}. "
            f"The most for this model is --budget {math.floor(1000 * most / whole) / 1000:g}."
        )
    return wanted
