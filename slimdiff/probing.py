"""Probing: the dense UNet runs with one group at a time cut to a few widths, and what that changes is measured.

No gradients. What is measured is kept beside the statistics, so that every later budget is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.errors import StatisticsError
from slimdiff.groups import Group
from slimdiff.guidance import guided
from slimdiff.influence import FLOOR, SURE, Influence, Kind, Point, Points, read_cache, relative_error, write_cache
from slimdiff.inpainting import canvases
from slimdiff.pipeline import prompts_at_once, sample, use_scheduler
from slimdiff.progress import Log
from slimdiff.recipe import Recipe
from slimdiff.solve.solution import Solution
from slimdiff.states import States
from slimdiff.surgery import truncated

NARROW = 8
"""What is lost in rounding is probed again at this part of the full width."""

BROKEN = 1e6
"""Final error of a prompt whose outputs are not finite."""

CHANGED = 1e-3
"""Relative change of a local error from which on it is that of another solution."""

KEEP_EVERY = 10.0
"""Seconds between two writes of the cache."""


def evaluations(groups: Sequence[Group], shares: Sequence[float], prompts: int, steps: int) -> int:
    """UNet rows that probing runs: two for each prompt and step, for the dense UNet, for what tells rounding, and for
    every width of every group.

    `steps` are those of the sampler, or the states of each prompt. A scheduler that calls the UNet more than once a
    step runs more, widths that meet (see `probing_widths`) run once, and what is lost in rounding runs again, narrower.
    """
    runs = 1 + len(_references(groups)) + sum(len(_rounded(group, shares)) for group in groups)
    return 2 * prompts * steps * runs


def _references(groups: Sequence[Group]) -> list[Group]:
    """Three groups, early, in the middle and late, that at full width change nothing but their basis."""
    turned = [group for group in groups if group.kind in ("qk", "vo")] or list(groups)
    return list(dict.fromkeys((turned[0], turned[len(turned) // 2], turned[-1])))


def _rounded(group: Group, shares: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(max(1, min(round(share * group.width), group.width - 1)) for share in shares))


def probing_widths(group: Group, solution: Solution, shares: Sequence[float]) -> list[int]:
    """The widths to probe, at least one for each group: `shares` of the full one, or less where that loses nothing."""
    found = []
    for width in _rounded(group, shares):
        while width > 1 and solution.error[width] < FLOOR:
            width //= 2
        found.append(width)
    return list(dict.fromkeys(found))


def probe(
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    solutions: Mapping[str, Solution],
    states: States,
    recipe: Recipe,
    *,
    statistics: str,
    kind: Kind = "sampler",
    shares: Sequence[float] = (0.5,),
    prompts: int = 8,
    steps: int = 7,
    points: Points | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> Influence:
    """Truncate one group at a time to `shares` of its width, and measure what that does.

    The first `prompts` prompts of the calibration are used. For the kind "sampler", `steps` steps run with guidance
    from each prompt's own seed, and the final latents are compared; for "noise", the guided predictions on all stored
    states, the mean over each prompt's.

    `points` holds what is known already and gets what is measured; `on_point` is called after every measurement.

    A measurement that is no more than rounding is repeated with less width; how much rounding makes is what a mere
    change of basis does, in the precision of the pipeline.

    Raises StatisticsError if there are no calibration states.
    """
    points = {} if points is None else points
    prompts, steps = _available(states, prompts), min(steps, recipe.steps)
    asked = {group: probing_widths(group, solutions[group.name], shares) for group in groups}
    references = _references(groups)
    found: Points = {group.name: {} for group in groups}

    def known(group: Group, width: int) -> bool:
        point, local = points.get(group.name, {}).get(width), float(solutions[group.name].error[width])
        if point is None or len(point.errors) != prompts:
            return False
        return abs(point.local - local) <= CHANGED * max(local, FLOOR)

    with ExitStack() as stack:
        measuring = cache(lambda: stack.enter_context(_measuring(pipe, states, recipe, kind, prompts, steps)))
        runs = len(references) + sum(map(len, asked.values()))
        bar = stack.enter_context(tqdm(total=runs, unit="width", disable=None, desc="probe"))
        log, done = Log("probe", "width", runs), count(1)

        def point(group: Group, width: int) -> Point:
            if not known(group, width):
                measure, solution = measuring(), solutions[group.name]
                with truncated(pipe.unet, group, solution.at(width)):
                    errors = measure().nan_to_num(nan=BROKEN, posinf=BROKEN)
                points.setdefault(group.name, {})[width] = Point(float(solution.error[width]), tuple(errors.tolist()))
                on_point()
            bar.update()
            log(next(done))
            return points[group.name][width]

        rounding = max(point(group, group.width).final() for group in references)
        for group, widths in asked.items():
            least, own = max(1, group.width // NARROW), found[group.name]
            for width in widths:
                own[width] = point(group, width)
                if own[width].final() <= SURE * rounding and width > least:
                    bar.total, log.total = bar.total + 1, log.total + 1
                    own[least] = point(group, least)
    return Influence(statistics, kind, found, rounding)


def _available(states: States, prompts: int) -> int:
    prompts = min(prompts, len(next(iter(states.conditioning.values()), ())))
    if prompts == 0:
        raise StatisticsError("The statistics hold no calibration states, which probing needs; calibrate again.")
    return prompts


@contextmanager
def _measuring(
    pipe: DiffusionPipeline, states: States, recipe: Recipe, kind: Kind, prompts: int, steps: int
) -> Iterator[Callable[[], Tensor]]:
    """A function that measures each prompt's error, (prompts,), of the UNet as it is when called against as it is now.

    Afterwards the pipeline has its own scheduler back.
    """
    own_scheduler = pipe.scheduler
    try:
        if kind == "sampler":
            use_scheduler(pipe, recipe.scheduler)
            run, owners = _sampler(pipe, states, recipe, prompts, steps), list(range(prompts))
        else:
            chosen = [i for i, prompt in enumerate(states.prompts) if prompt < prompts]
            run, owners = _predictor(pipe.unet, states, recipe, chosen), [states.prompts[i] for i in chosen]
        dense, rows = run(), torch.tensor(owners, device=pipe.unet.device)

        def measure() -> Tensor:
            error = relative_error(run(), dense)
            return torch.stack([error[rows == prompt].mean() for prompt in range(prompts)])

        yield measure
    finally:
        pipe.scheduler = own_scheduler


def _sampler(pipe: DiffusionPipeline, states: States, recipe: Recipe, prompts: int, steps: int) -> Callable[[], Tensor]:
    """Runs the first prompts through the pipeline: final latents (prompts, C, H, W)."""
    size = prompts_at_once(pipe, recipe.height, recipe.width)
    parts = [range(first, min(first + size, prompts)) for first in range(0, prompts, size)]
    given = [
        states.for_pipeline(part, pipe.unet.device, pipe.unet.dtype) | canvases(pipe, recipe, part) for part in parts
    ]

    def run() -> Tensor:
        latents = [
            sample(
                pipe, conditioning, [recipe.seed + i for i in part], steps=steps,
                guidance_scale=recipe.guidance_scale, height=recipe.height, width=recipe.width,
            )
            for part, conditioning in zip(parts, given, strict=True)
        ]  # fmt: skip
        return torch.cat(latents)

    return run


def _predictor(unet: nn.Module, states: States, recipe: Recipe, chosen: Sequence[int]) -> Callable[[], Tensor]:
    """Runs the UNet on the chosen states: guided predictions (chosen, C, H, W)."""
    parameter = next(unet.parameters())
    batches = list(states.batches(chosen, parameter.device, parameter.dtype))

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([guided(unet(**batch)[0], size, recipe.guidance_scale) for size, batch in batches])

    return run


def probed(
    path: Path,
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    solutions: Mapping[str, Solution],
    states: States,
    recipe: Recipe,
    *,
    statistics: str,
    method: str,
    kind: Kind = "sampler",
    shares: Sequence[float] = (0.5,),
    prompts: int = 8,
    steps: int = 7,
) -> Influence:
    """`probe`, but for what the cache at `path` knows; what is new is kept there, also when probing is interrupted.

    `method` names the way of solving. The cache holds the points of every kind and method that were probed on the same
    statistics; one that is damaged or belongs to others is replaced.

    Raises StatisticsError if there are no calibration states, OutputError if the cache cannot be written.
    """
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    settings = f"{kind} {method}, {_available(states, prompts)} prompts, {dtype}"
    if kind == "sampler":
        settings += f", {min(steps, recipe.steps)} steps of {recipe.scheduler or type(pipe.scheduler).__name__}"
    points = read_cache(path, statistics).get(settings, {})
    kept, new = time.monotonic(), False

    def write() -> None:
        nonlocal kept, new
        write_cache(path, statistics, settings, points)
        kept, new = time.monotonic(), False

    def on_point() -> None:
        nonlocal new
        new = True
        if time.monotonic() - kept > KEEP_EVERY:
            write()

    try:
        return probe(
            pipe, groups, solutions, states, recipe, statistics=statistics, kind=kind, shares=shares, prompts=prompts,
            steps=steps, points=points, on_point=on_point,
        )  # fmt: skip
    finally:
        if new:
            write()
