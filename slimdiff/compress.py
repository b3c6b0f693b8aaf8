"""`slimdiff compress`: solve every group, measure its influence, share out the budget, cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from diffusers import DiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

from slimdiff import __version__, influence
from slimdiff.allocate import Allocation, Item, allocate
from slimdiff.errors import BudgetError
from slimdiff.gram import Moments
from slimdiff.groups import KINDS, Group, find_groups, names
from slimdiff.macs import count, token_counts
from slimdiff.plan import Entry, Plan, short
from slimdiff.refine import refine
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.solve.ffn import solve_ffn
from slimdiff.solve.qk import solve_qk
from slimdiff.solve.solution import Solution
from slimdiff.solve.vo import solve_vo
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build

Of = Literal["groups", "unet", "macs"]


@dataclass(frozen=True)
class Options:
    """How to compress.

    `budget` is the share to remove, in [0, 1), `of` the groups' parameters, the whole UNet's parameters, or the groups'
    MACs (without the zeros that pad unequal widths at run time). `round_to` is the step of head widths (feed-forward
    widths take eight times that); None picks it by layer. `min_width` is the least share of its width a group keeps.
    `independent_ranks` lets the query-key and value-output widths of one attention differ. `influence` weighs local
    errors by what they do to the final latents ("sampler", by probing with `probe_prompts` and `probe_steps`) or not at
    all ("local"). `refine` refits output projections on the calibration states afterwards.
    """

    budget: float
    of: Of = "groups"
    kinds: tuple[str, ...] = KINDS
    round_to: int | None = None
    min_width: float = 0.125
    independent_ranks: bool = False
    influence: Literal["sampler", "local"] = "sampler"
    probe_prompts: int = 8
    probe_steps: int = 10
    refine: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise BudgetError(
                f"A budget of {self.budget:g} was asked for; it is the share to remove, at least 0 "
                "(which changes nothing) and below 1. Try --budget 0.35."
            )
        if not 0 < self.min_width <= 1:
            raise BudgetError(f"--min-width {self.min_width:g} is not a share of the width: above 0, at most 1.")


def compress(
    pipe: DiffusionPipeline, statistics: StatisticsFile, options: Options
) -> tuple[SlimUNet2DConditionModel, Plan]:
    """The slim UNet and its plan; the pipeline's own UNet stays as it is. Runs on the pipeline's device.

    Raises BudgetError if the budget cannot be met, StatisticsError if the statistics are damaged, empty or not finite.
    """
    plan, solutions = make_plan(pipe, statistics, options)
    slim = build(pipe.unet, plan.ranks(), solutions)
    if options.refine and plan.ranks():
        cut = [group for group in find_groups(pipe.unet) if group.name in plan.ranks()]
        refits = refine(pipe.unet, slim, cut, statistics.states())
        plan = replace(plan, refits={refit.group: refit.ratio for refit in refits})
    return slim, plan


def make_plan(
    pipe: DiffusionPipeline, statistics: StatisticsFile, options: Options
) -> tuple[Plan, dict[str, Solution]]:
    """The decision, and the solutions it picks widths of. See `compress`."""
    unet, recipe = pipe.unet, statistics.recipe
    size = recipe.height // pipe.vae_scale_factor, recipe.width // pipe.vae_scale_factor
    text_tokens = pipe.tokenizer.model_max_length
    tokens = token_counts(unet, size, text_tokens)
    groups = find_groups(unet, tokens, options.kinds)
    required = _required(unet, groups, options)
    solutions = {
        group.name: solve(unet, group, statistics) for group in tqdm(groups, unit="group", disable=None, desc="solve")
    }
    weights = _weights(pipe, groups, solutions, statistics, options)
    items = [_item(members, solutions, weights, options) for members in _units(groups, options)]
    allocation = allocate(items, required)
    slim_ranks = _ranks(groups, allocation, options)
    return _plan(
        unet, groups, solutions, weights, slim_ranks, allocation, statistics, options, size, text_tokens
    ), solutions


def solve(unet: UNet2DConditionModel, group: Group, statistics: StatisticsFile) -> Solution:
    """A group's solution for all widths, from its statistics and its weights, on the UNet's device."""
    device, state = unet.device, unet.state_dict()

    def moments(statistic: str) -> Moments:
        return statistics.moments(f"{group.name}:{statistic}", device)

    if group.kind == "qk":
        return solve_qk(moments("q").second, moments("k").second)
    where = names(unet, group)
    assert where.out is not None
    weight, bias = where.out
    seen = moments("z" if group.kind == "vo" else "u")
    flat = Moments(seen.covariance[0], seen.mean[0], seen.count)
    if group.kind == "vo":
        return solve_vo(flat, state[weight], group.heads, has_bias=bias is not None)
    return solve_ffn(flat, state[weight], has_bias=bias is not None)


def _weights(
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    solutions: dict[str, Solution],
    statistics: StatisticsFile,
    options: Options,
) -> dict[str, float]:
    if options.influence == "local" or options.budget == 0:
        return dict.fromkeys(solutions, 1.0)
    path = statistics.path.with_suffix(".influence.json")
    digest, prompts, steps = statistics.digest(), options.probe_prompts, options.probe_steps
    found = influence.cached(path, digest, prompts, steps, groups)
    if found is None:
        found = influence.probe(
            pipe, groups, solutions, statistics.states(), statistics.recipe,
            statistics=digest, prompts=prompts, steps=steps,
        )  # fmt: skip
        influence.write(path, found)
    return {group.name: found.weight(group.name, solutions[group.name]) for group in groups}


def width_step(group: Group, round_to: int | None) -> int:
    """The step of a group's widths: 8 for heads and 64 for hidden units where the layer is wide enough for it."""
    if group.kind == "ffn":
        return 8 * round_to if round_to else min(64, _power_of_two(group.width / 16))
    return round_to or min(8, _power_of_two(group.width / 4))


def _power_of_two(x: float) -> int:
    return 2 ** max(0, math.floor(math.log2(x)))


def allowed_widths(group: Group, options: Options) -> tuple[int, ...]:
    """Widths a group may take: full, then multiples of its step down to the least."""
    step = width_step(group, options.round_to)
    least = max(1, math.ceil(options.min_width * group.width))
    below = range((group.width - 1) // step * step, 0, -step)
    return (group.width, *(w for w in below if w >= least))


def _units(groups: Sequence[Group], options: Options) -> list[list[Group]]:
    """Groups that share one width: query-key and value-output of an attention, unless they are independent."""
    units: dict[str, list[Group]] = {}
    for group in groups:
        units.setdefault(group.name if options.independent_ranks else group.module, []).append(group)
    return list(units.values())


def _cost(group: Group, of: Of) -> int:
    return group.macs_per_width if of == "macs" else group.params_per_width


def _item(
    members: Sequence[Group], solutions: dict[str, Solution], weights: dict[str, float], options: Options
) -> Item:
    widths = allowed_widths(members[0], options)
    per_width = sum(_cost(group, options.of) for group in members)
    errors = tuple(sum(weights[g.name] * float(solutions[g.name].error[w]) for g in members) for w in widths)
    name = members[0].name if len(members) == 1 else members[0].module
    return Item(name, widths, tuple(w * per_width for w in widths), errors)


def _ranks(groups: Sequence[Group], allocation: Allocation, options: Options) -> dict[str, int]:
    widths = allocation.widths
    return {group.name: widths[group.name if group.name in widths else group.module] for group in groups}


def _unet_params(unet: UNet2DConditionModel) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def _denominator(unet: UNet2DConditionModel, groups: Sequence[Group], of: Of) -> int:
    return _unet_params(unet) if of == "unet" else sum(_cost(group, of) * group.width for group in groups)


def _required(unet: UNet2DConditionModel, groups: Sequence[Group], options: Options) -> int:
    """What has to be saved, in parameters or MACs. Raises BudgetError, with the arithmetic, if that is too much."""
    whole = _denominator(unet, groups, options.of)
    required = math.ceil(options.budget * whole - 1e-9)
    most = sum(
        (min(g.width, widths[0]) - widths[-1]) * _cost(g, options.of)
        for g in groups
        for widths in [allowed_widths(g, options)]
    )
    if required > most:
        what = "MACs" if options.of == "macs" else "parameters"
        held = sum(_cost(g, options.of) * g.width for g in groups)
        owner = "UNet" if options.of == "unet" else "groups"
        kinds = ", ".join(options.kinds)
        raise BudgetError(
            f"{options.budget:.1%} of the {owner}'s {short(whole)} {what} is {short(required)}. The groups {kinds} "
            f"hold {short(held)}, of which at most {short(most)} can go with --min-width {options.min_width:g}. "
            f"The most for this model is --budget {math.floor(1000 * most / whole) / 1000:g}."
        )
    return required


def _plan(
    unet: UNet2DConditionModel,
    groups: Sequence[Group],
    solutions: dict[str, Solution],
    weights: dict[str, float],
    ranks: dict[str, int],
    allocation: Allocation,
    statistics: StatisticsFile,
    options: Options,
    latent_size: tuple[int, int],
    text_tokens: int,
) -> Plan:
    entries = tuple(
        Entry(
            group=g.name, kind=g.kind, width=g.width, rank=ranks[g.name],
            params=(g.params, ranks[g.name] * g.params_per_width),
            macs=(g.width * g.macs_per_width, ranks[g.name] * g.macs_per_width),
            local_error=(local := float(solutions[g.name].error[ranks[g.name]])),
            influence=weights[g.name], final_error=weights[g.name] * local,
        )
        for g in groups
    )  # fmt: skip
    params, macs = _unet_params(unet), count(unet, latent_size, text_tokens).total
    return Plan(
        budget=options.budget,
        of=options.of,
        achieved=allocation.saved / _denominator(unet, groups, options.of),
        entries=entries,
        unet_params=(params, params - sum(e.params[0] - e.params[1] for e in entries)),
        unet_macs=(macs, macs - sum(e.macs[0] - e.macs[1] for e in entries)),
        predicted_error=allocation.error,
        lower_bound=allocation.bound,
        provenance={
            "slimdiff": __version__,
            "model": statistics.model,
            "variant": statistics.variant,
            "fingerprint": statistics.fingerprint,
            "statistics": statistics.digest(),
            "prompts": statistics.done,
            "recipe": {k: v for k, v in statistics.recipe.to_json().items() if k not in ("prompts", "negatives")},
            "options": asdict(options),
            "versions": {**statistics.metadata["versions"]},
        },
    )
