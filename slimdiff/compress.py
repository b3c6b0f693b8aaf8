"""`slimdiff compress`: solve every group, measure its influence, share out the budget, cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff import __version__, probing
from slimdiff.allocate import Allocation, allocate, level_out
from slimdiff.errors import BudgetError
from slimdiff.groups import Group, find_groups
from slimdiff.latency import Table
from slimdiff.macs import count, token_counts
from slimdiff.methods import METHODS, Evidence, Method
from slimdiff.options import Options
from slimdiff.plan import Entry, Forecast, Plan
from slimdiff.profile import currency
from slimdiff.refine import Refit, refine, refit_output
from slimdiff.sequential import solve_in_turn
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.solve.resnet import ResnetSolution
from slimdiff.solve.solution import Solution
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build
from slimdiff.trials import try_widths
from slimdiff.widths import Currency, counted, item, required, units

__all__ = ["Options", "cut"]

Times = Callable[[Sequence[Sequence[Group]]], Table]
"""Units that share a width -> a table that knows how long their layers take."""


def cut(
    pipe: DiffusionPipeline, statistics: StatisticsFile, options: Options, times: Times | None = None
) -> tuple[SlimUNet2DConditionModel, Plan]:
    """The slim UNet and its plan; the pipeline's own UNet stays as it is. Runs on the pipeline's device.

    `times` finds the latency table that a budget of latency needs, for the units that may be cut.

    Raises BudgetError if the budget cannot be met, StatisticsError if the statistics are damaged, empty, not finite, or
    lack what the method needs.
    """
    return next(sweep(pipe, statistics, options, [options.budget], times))


def sweep(
    pipe: DiffusionPipeline,
    statistics: StatisticsFile,
    options: Options,
    budgets: Sequence[float],
    times: Times | None = None,
) -> Iterator[tuple[SlimUNet2DConditionModel, Plan]]:
    """What `cut` gives for each of several budgets, of which none is begun unless all can be met.

    Groups are solved once for all of them, and probed once. Raises what `cut` raises.
    """
    wanted = [replace(options, budget=budget) for budget in budgets]
    solved = solve(pipe, statistics, wanted, times)
    for one in wanted:
        yield _cut_one(pipe, statistics, one, solved)


def _cut_one(
    pipe: DiffusionPipeline, statistics: StatisticsFile, options: Options, solved: Solved
) -> tuple[SlimUNet2DConditionModel, Plan]:
    plan, solutions = make_plan(pipe, statistics, options, solved)
    method = METHODS[options.method]
    slim = build(pipe.unet, plan.ranks(), solutions, maps=options.lora_maps if method.adapters else 0)
    if not plan.ranks() or not (options.refine or method.refits_output):
        return slim, plan
    refits: list[Refit] = []
    seen = statistics.states(), statistics.recipe.guidance_scale
    if options.refine:
        cut = [group for group in find_groups(pipe.unet) if group.name in plan.ranks()]
        refits += refine(pipe.unet, slim, cut, *seen)
    if method.refits_output:
        refits.append(refit_output(pipe.unet, slim, *seen))
    return slim, replace(plan, refits={refit.name: refit.ratio for refit in refits})


@dataclass(frozen=True)
class Solved:
    """What does not depend on the budget: the groups to cut and their solutions, by name; of the UNet, the number of
    parameters and the MACs; what budgets are spent in, and the table of latencies where that is time."""

    groups: list[Group]
    solutions: dict[str, Solution]
    params: int
    macs: int
    spent_in: Currency
    table: Table | None


def solve(
    pipe: DiffusionPipeline, statistics: StatisticsFile, wanted: Sequence[Options], times: Times | None = None
) -> Solved:
    """Solve every group for options that differ in their budget only. See `cut` for what is raised."""
    unet, recipe, options = pipe.unet, statistics.recipe, wanted[0]
    method = METHODS[options.method]
    method.check(options.method, _kinds(method, options), recipe)
    size = recipe.height // pipe.vae_scale_factor, recipe.width // pipe.vae_scale_factor
    text_tokens = pipe.tokenizer.model_max_length
    groups = find_groups(unet, token_counts(unet, size, text_tokens), _kinds(method, options))
    params = sum(parameter.numel() for parameter in unet.parameters())
    together = units(groups, options)
    table = _table(together, options, times)
    spent_in = currency(pipe, together, table) if table else counted(params, groups, options.of)
    for one in wanted:
        required(groups, one, spent_in)
    moments = partial(statistics.moments, device=unet.device)
    patch_moments = partial(statistics.patch_moments, device=unet.device)
    solutions: dict[str, Solution] = {
        group.name: method.curve(Evidence(unet, group, moments, patch_moments))
        for group in tqdm(groups, unit="group", disable=None, desc="solve")
    }
    if (options.influence or method.influence) in ("sampler", "noise") and any(one.budget for one in wanted):
        probed = {g: probing.probing_widths(g, solutions[g.name], options.probe_shares) for g in groups}
        solutions |= _tried(unet, probed, solutions, statistics)
    return Solved(groups, solutions, params, count(unet, size, text_tokens).total, spent_in, table)


def make_plan(
    pipe: DiffusionPipeline, statistics: StatisticsFile, options: Options, solved: Solved | None = None
) -> tuple[Plan, dict[str, Solution]]:
    """The decision, and the solutions it picks widths of; `solved` is made unless it is given. See `cut`."""
    recipe, method = statistics.recipe, METHODS[options.method]
    solved = solved or solve(pipe, statistics, [options])
    groups, solutions, params, macs = solved.groups, solved.solutions, solved.params, solved.macs
    spent_in, table = solved.spent_in, solved.table
    options = replace(options, influence=options.influence or method.influence, kinds=_kinds(method, options))
    to_save = required(groups, options, spent_in)
    errors = _errors(pipe, groups, solutions, statistics, options)
    allocation = _allocate(groups, errors, to_save, options, spent_in)
    widths = {group.name: allocation.widths[unit[0].name] for unit in units(groups, options) for group in unit}
    cut = {group: [widths[group.name]] for group in groups if widths[group.name] < group.width}
    solutions = {**solutions, **_tried(pipe.unet, cut, solutions, statistics)}
    if method.sequential:
        solutions = solve_in_turn(pipe, groups, widths, recipe, lambda *seen: method.solve(Evidence(*seen)))
    is_final = options.influence in ("sampler", "noise")
    entries = tuple(_entry(g, widths[g.name], solutions[g.name], errors[g.name] if is_final else None) for g in groups)
    plan = Plan(
        budget=options.budget,
        of=options.of,
        achieved=allocation.saved / spent_in.whole,
        entries=entries,
        unet_params=(params, params - sum(e.params[0] - e.params[1] for e in entries)),
        unet_macs=(macs, macs - sum(e.macs[0] - e.macs[1] for e in entries)),
        predicted_error=allocation.error if options.influence == "sampler" else None,
        lower_bound=allocation.bound if options.influence == "sampler" else None,
        latency=_forecast(table, allocation) if table else None,
        provenance={
            "slimdiff": __version__,
            "model": statistics.model,
            "model_options": statistics.model_options,
            "fingerprint": statistics.fingerprint,
            "loras": statistics.loras,
            "statistics": statistics.digest(),
            "prompts": statistics.done,
            "recipe": {k: v for k, v in recipe.to_json().items() if k not in ("prompts", "negatives")},
            "options": asdict(options),
            "versions": {**statistics.metadata["versions"]},
        },
    )
    return plan, solutions


def _kinds(method: Method, options: Options) -> tuple[str, ...]:
    """The kinds of groups to cut. Raises BudgetError if the method cannot cut what was asked for."""
    if options.kinds is None:
        return method.kinds
    known = (*method.kinds, *method.more)
    if foreign := [kind for kind in options.kinds if kind not in known]:
        raise BudgetError(
            f"--method {options.method} cuts {', '.join(known)}, and --groups asks for {foreign[0]}. Leave "
            "--groups out for this method."
        )
    return options.kinds


def _tried(
    unet: nn.Module,
    widths: Mapping[Group, Sequence[int]],
    solutions: Mapping[str, Solution],
    statistics: StatisticsFile,
) -> dict[str, Solution]:
    """The solutions of ResNet groups, fitted anew at these widths."""
    of_blocks = {g: s for g in widths if isinstance(s := solutions[g.name], ResnetSolution)}
    if not of_blocks:
        return {}
    found = try_widths(unet, of_blocks, widths, statistics.states(), statistics.recipe.guidance_scale)
    return {group.name: solution for group, solution in found.items()}


def _errors(
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    solutions: Mapping[str, Solution],
    statistics: StatisticsFile,
    options: Options,
) -> dict[str, Tensor]:
    """What each group costs at every width, (width + 1,): its local error, or what that is expected to lead to."""
    if options.influence not in ("sampler", "noise") or options.budget == 0:
        return {name: solution.error for name, solution in solutions.items()}
    found = probing.probed(
        statistics.path.with_suffix(".influence.json"), pipe, groups, solutions, statistics.states(),
        statistics.recipe, statistics=statistics.digest(), method=options.method, kind=options.influence,
        shares=options.probe_shares, prompts=options.probe_prompts, steps=options.probe_steps,
    )  # fmt: skip
    return {group.name: found.final_errors(group, solutions[group.name]) for group in groups}


def _table(together: Sequence[Sequence[Group]], options: Options, times: Times | None) -> Table | None:
    if options.of != "latency":
        return None
    if times is None:
        raise BudgetError(
            "A budget of latency needs to know how long layers take: pass `times`, which gives a latency table as "
            "slimdiff.profile.profile makes it."
        )
    return times(together)


def _forecast(table: Table, allocation: Allocation) -> Forecast:
    return Forecast((table.call, table.call - 1e-9 * allocation.saved), asdict(table.conditions))


def _allocate(
    groups: Sequence[Group], errors: Mapping[str, Tensor], to_save: int, options: Options, spent_in: Currency
) -> Allocation:
    together = units(groups, options)
    items = [item(members, errors, options, spent_in) for members in together]
    if options.influence == "uniform":
        return level_out(items, to_save, [[cost / one.costs[0] for cost in one.costs] for one in items])
    if options.influence == "energy":
        members = [len(unit) for unit in together]
        kept = [[1 - error / n for error in one.errors] for one, n in zip(items, members, strict=True)]
        return level_out(items, to_save, kept)
    return allocate(items, to_save)


def _entry(group: Group, width: int, solution: Solution, final: Tensor | None) -> Entry:
    local = float(solution.error[width])
    return Entry(
        group=group.name, kind=group.kind, width=group.width, rank=width,
        params=(group.params, group.params_at(width)), macs=(group.macs_at(group.width), group.macs_at(width)),
        local_error=local, final_error=None if final is None else float(final[width]),
    )  # fmt: skip
