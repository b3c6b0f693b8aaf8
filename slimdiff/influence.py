"""How much of a group's local error reaches the picture, measured without gradients at the end of the sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from slimdiff.errors import StatisticsError
from slimdiff.files import write_json
from slimdiff.groups import Group
from slimdiff.pipeline import sample, use_scheduler
from slimdiff.recipe import Recipe
from slimdiff.solve.solution import Solution
from slimdiff.states import States
from slimdiff.surgery import truncated

FLOOR = 1e-6
"""Local error below which a truncation is lost in rounding and a narrower width is probed instead."""


@dataclass(frozen=True)
class Influence:
    """Per group: the width it was probed at, and each probing prompt's relative squared error of the final latents.

    `statistics` is the digest of the statistics file it belongs to.
    """

    statistics: str
    prompts: int
    steps: int
    widths: dict[str, int]
    errors: dict[str, list[float]]

    def weight(self, group: str, solution: Solution) -> float:
        """Final error per unit of local error: the median over prompts, so that one that flips does not decide."""
        local = float(solution.error[self.widths[group]])
        return float(torch.tensor(self.errors[group], dtype=torch.float64).median()) / local if local > 0 else 0.0


def relative_error(changed: Tensor, reference: Tensor) -> Tensor:
    """Squared error relative to the reference's energy, per sample: (B, ...) -> (B,), in float64."""
    difference = (changed.double() - reference.double()).flatten(1).square().sum(1)
    return difference / reference.double().flatten(1).square().sum(1)


def probe(
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    solutions: Mapping[str, Solution],
    states: States,
    recipe: Recipe,
    *,
    statistics: str,
    prompts: int,
    steps: int,
) -> Influence:
    """Truncate one group at a time, run a short sampler with guidance from fixed noise, and compare the final latents.

    Each group is cut to half its width, or to less where that loses nothing. The first `prompts` prompts of the
    calibration are used, with their own seeds.
    """
    prompts = min(prompts, len(next(iter(states.conditioning.values()), ())))
    if prompts == 0:
        raise StatisticsError("The statistics hold no calibration states, which probing needs; calibrate again.")
    conditioning = states.for_pipeline(prompts, pipe.unet.device, pipe.unet.dtype)
    seeds = [recipe.seed + i for i in range(prompts)]

    def latents() -> Tensor:
        result: Tensor = sample(
            pipe, conditioning, seeds, steps=steps, guidance_scale=recipe.guidance_scale, height=recipe.height,
            width=recipe.width,
        )  # fmt: skip
        return result

    own_scheduler = pipe.scheduler
    use_scheduler(pipe, recipe.scheduler)
    dense = latents()
    widths: dict[str, int] = {}
    errors: dict[str, list[float]] = {}
    for group in tqdm(groups, unit="group", disable=None, desc="probe"):
        solution = solutions[group.name]
        width = max(1, group.width // 2)
        while width > 1 and solution.error[width] < FLOOR:
            width //= 2
        with truncated(pipe.unet, group, solution.at(width)):
            error = relative_error(latents(), dense)
        widths[group.name], errors[group.name] = width, error.nan_to_num(nan=1e6, posinf=1e6).tolist()
    pipe.scheduler = own_scheduler
    return Influence(statistics, prompts, steps, widths, errors)


def cached(path: Path, statistics: str, prompts: int, steps: int, groups: Sequence[Group]) -> Influence | None:
    """A probing result written before for the same statistics and settings, if there is one."""
    try:
        found = Influence(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = (found.statistics, found.prompts, found.steps) == (statistics, prompts, steps)
    return found if same and all(group.name in found.errors for group in groups) else None


def write(path: Path, influence: Influence) -> None:
    write_json(path, asdict(influence))
