"""How much of a group's local error reaches the end of the sampler, or the noise prediction, measured by cutting it.

The dense UNet runs with one group at a time cut to a few widths; what that changes gives the group's final error at
every width. No gradients.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.errors import StatisticsError
from slimdiff.files import write_json
from slimdiff.groups import Group
from slimdiff.guidance import guided
from slimdiff.inpainting import canvases
from slimdiff.pipeline import sample, use_scheduler
from slimdiff.recipe import Recipe
from slimdiff.solve.solution import Solution
from slimdiff.states import States
from slimdiff.surgery import truncated

Kind = Literal["sampler", "noise"]
"""What is compared: the final latents of a short sampler, or the guided noise prediction on the calibration states."""

FLOOR = 1e-6
"""Local error below which a truncation is lost in rounding and a narrower width is probed instead."""

LOST = 1e-12
"""Final error that is nothing but rounding: what a change of basis at full width leaves in float32."""

BROKEN = 1e6
"""Final error of a prompt whose outputs are not finite."""

CHANGED = 1e-3
"""Relative change of a local error from which on it is that of another solution."""

KEEP_EVERY = 10.0
"""Seconds between two writes of the cache."""

FORMAT = 2


@dataclass(frozen=True)
class Point:
    """One group at one width: its `local` error there, and each probing prompt's relative squared final error."""

    local: float
    errors: tuple[float, ...]

    def final(self, quantile: float = 0.75) -> float:
        """Over prompts (of two values the lower): below the highest, so that one prompt that flips does not decide, and
        above the median, so that sensitive prompts count."""
        errors = torch.tensor(self.errors, dtype=torch.float64)
        return float(errors.quantile(quantile, interpolation="lower"))


Points = dict[str, dict[int, Point]]
"""By group and width."""


@dataclass(frozen=True)
class Influence:
    """What probing found: the `points` of every group. `statistics` is the digest of the file it belongs to."""

    statistics: str
    kind: Kind
    points: Points

    def final_errors(self, group: Group, solution: Solution, quantile: float = 0.75) -> Tensor:
        """Predicted final error at every width 0..d, (d + 1,), float64: 0 at full width, never falling with less width.

        Over prompts the `quantile` is taken (see `Point.final`). As a function of the local error, the final error is a
        power law between two probed points (log against log) and proportional outside. Points lost in rounding do not
        count; without any, the group has no influence.
        """
        known: dict[float, float] = {}
        for point in self.points[group.name].values():
            final = point.final(quantile)
            if point.local >= FLOOR and final > LOST:
                known[point.local] = max(final, known.get(point.local, 0.0))
        local = solution.error.double().cpu()
        if not known:
            return torch.zeros_like(local)
        x, y = np.log(sorted(known.items())).T
        wanted = local.clamp(min=0).log().numpy()
        inside = wanted.clip(x[0], x[-1])
        curve = torch.from_numpy(np.exp(np.interp(inside, x, y) + wanted - inside))
        curve[-1] = 0
        return curve.flip(0).cummax(0).values.flip(0)


def relative_error(changed: Tensor, reference: Tensor) -> Tensor:
    """Squared error relative to the reference's energy, per sample: (B, ...) -> (B,), in float64."""
    difference = (changed.double() - reference.double()).flatten(1).square().sum(1)
    return difference / reference.double().flatten(1).square().sum(1)


def evaluations(groups: Sequence[Group], shares: Sequence[float], prompts: int, steps: int) -> int:
    """UNet rows that probing runs: two for each prompt and step, for the dense UNet and for every width of every group.

    `steps` are those of the sampler, or the states of each prompt. A scheduler that calls the UNet more than once a
    step runs more, and widths that meet (see `probing_widths`) run once.
    """
    return 2 * prompts * steps * (1 + sum(len(_rounded(group, shares)) for group in groups))


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
    steps: int = 10,
    points: Points | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> Influence:
    """Truncate one group at a time to `shares` of its width, and measure what that does.

    The first `prompts` prompts of the calibration are used. For the kind "sampler", `steps` steps run with guidance
    from each prompt's own seed, and the final latents are compared; for "noise", the guided predictions on all stored
    states, the mean over each prompt's.

    `points` holds what is known already and gets what is measured; `on_point` is called after every measurement.

    Raises StatisticsError if there are no calibration states.
    """
    points = {} if points is None else points
    prompts = _available(states, prompts)
    asked = {group.name: probing_widths(group, solutions[group.name], shares) for group in groups}

    def known(group: Group, width: int) -> bool:
        point, local = points.get(group.name, {}).get(width), float(solutions[group.name].error[width])
        return point is not None and len(point.errors) == prompts and abs(point.local - local) <= CHANGED * local

    missing = [(group, width) for group in groups for width in asked[group.name] if not known(group, width)]
    if missing:
        with _measuring(pipe, states, recipe, kind, prompts, steps) as measure:
            for group, width in tqdm(missing, unit="width", disable=None, desc="probe"):
                solution = solutions[group.name]
                with truncated(pipe.unet, group, solution.at(width)):
                    errors = measure().nan_to_num(nan=BROKEN, posinf=BROKEN)
                points.setdefault(group.name, {})[width] = Point(float(solution.error[width]), tuple(errors.tolist()))
                on_point()
    return Influence(
        statistics, kind, {name: {width: points[name][width] for width in widths} for name, widths in asked.items()}
    )


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
    conditioning = states.for_pipeline(prompts, pipe.unet.device, pipe.unet.dtype)
    conditioning |= canvases(pipe, recipe, range(prompts))
    seeds = [recipe.seed + i for i in range(prompts)]

    def run() -> Tensor:
        latents: Tensor = sample(
            pipe, conditioning, seeds, steps=steps, guidance_scale=recipe.guidance_scale, height=recipe.height,
            width=recipe.width,
        )  # fmt: skip
        return latents

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
    steps: int = 10,
) -> Influence:
    """`probe`, but for what the cache at `path` knows; what is new is kept there, also when probing is interrupted.

    `method` names the way of solving. The cache holds the points of every kind and method that were probed on the same
    statistics; one that is damaged or belongs to others is replaced.

    Raises StatisticsError if there are no calibration states, OutputError if the cache cannot be written.
    """
    settings = f"{kind} {method}, {_available(states, prompts)} prompts"
    settings += f", {steps} steps" if kind == "sampler" else ""
    points = read_cache(path, statistics).get(settings, {})
    kept, new = time.monotonic(), False

    def write() -> None:
        nonlocal kept, new
        _write(path, statistics, settings, points)
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


def read_cache(path: Path, statistics: str) -> dict[str, Points]:
    """The points in a cache, by settings: none if it is missing, damaged, or of other statistics."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["statistics"]) != (FORMAT, statistics):
            return {}
        return {
            settings: {
                group: {int(width): _point(**point) for width, point in widths.items()}
                for group, widths in groups.items()
            }
            for settings, groups in found["runs"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _point(local: float, errors: list[float]) -> Point:
    return Point(float(local), tuple(map(float, errors)))


def _write(path: Path, statistics: str, settings: str, points: Points) -> None:
    """Put the points of one run into the cache, beside those of other runs."""
    runs = {**read_cache(path, statistics), settings: points}
    data = {
        name: {group: {width: asdict(point) for width, point in widths.items()} for group, widths in run.items()}
        for name, run in runs.items()
    }
    write_json(path, {"format": FORMAT, "statistics": statistics, "runs": data})
