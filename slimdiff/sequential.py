"""Solving groups one package after the other, each on what the packages that were cut before it really feed it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from slimdiff.batches import automatic_batch_size
from slimdiff.capture import captured
from slimdiff.gram import Gram, Moments
from slimdiff.groups import Group
from slimdiff.inpainting import canvases
from slimdiff.pipeline import paint, use_scheduler
from slimdiff.recipe import Recipe
from slimdiff.solve.solution import Solution
from slimdiff.surgery import slim_weights
from slimdiff.timesteps import Clock, weights

PACKAGES = 4
"""Parts of the network, in the order of the data, that are calibrated and cut together."""

PROMPTS = 50
"""Of the recipe, for the calibration of each package."""


def solve_in_turn(
    pipe: DiffusionPipeline,
    groups: Sequence[Group],
    widths: Mapping[str, int],
    recipe: Recipe,
    solve: Callable[[nn.Module, Group, Callable[[str], Moments]], Solution],
) -> dict[str, Solution]:
    """A solution of every group, which is in the order of the data, made to be used at its width in `widths`.

    For each package the pipeline paints `PROMPTS` of the recipe's pictures anew, all packages before it already cut,
    with timesteps weighted as in OBS-Diff. The pipeline's own UNet is not changed.

    Raises SlimdiffError if not even one picture fits into a GPU's memory.
    """
    dense, solutions = pipe.unet, {}
    unet = copy.deepcopy(dense)
    size = -(-len(groups) // PACKAGES)
    packages = [groups[i : i + size] for i in range(0, len(groups), size)]
    own_scheduler = pipe.scheduler
    use_scheduler(pipe, recipe.scheduler)
    pipe.unet = unet
    try:
        for package in tqdm(packages, unit="package", disable=None, desc="prune"):
            moments = _moments(pipe, package, recipe)
            for group in package:
                solution = solve(unet, group, moments)
                solutions[group.name] = solution
                if widths[group.name] < group.width:
                    factors = solution.at(widths[group.name])
                    unet.load_state_dict(slim_weights(unet, group, factors, padded=True), strict=False)
    finally:
        pipe.unet, pipe.scheduler = dense, own_scheduler
    return solutions


def _moments(pipe: DiffusionPipeline, groups: Sequence[Group], recipe: Recipe) -> Callable[[str], Moments]:
    size, prompts = automatic_batch_size(pipe, groups, recipe), min(PROMPTS, len(recipe.prompts))
    pipe.scheduler.set_timesteps(recipe.steps)
    shares = weights("decreasing", pipe.scheduler)
    grams: dict[str, Gram] = {}
    for start in range(0, prompts, size):
        chosen = range(start, min(start + size, prompts))
        clock = Clock(shares)
        canvas = canvases(pipe, recipe, chosen)
        with captured(pipe.unet, groups, grams, clock):
            paint(pipe, recipe, chosen, clock.tick, canvas=canvas)
    return lambda key: grams[key].moments()
