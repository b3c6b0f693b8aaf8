"""How many prompts to paint at once while sums are collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from accelerate.utils import find_executable_batch_size
from diffusers import DiffusionPipeline

from slimdiff.capture import captured, footprint
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group
from slimdiff.guidance import guided
from slimdiff.inpainting import canvases
from slimdiff.pipeline import paint, prompts_at_once
from slimdiff.recipe import Recipe


def automatic_batch_size(pipe: DiffusionPipeline, groups: Sequence[Group], recipe: Recipe) -> int:
    """Prompts at once: as many as keep the device busy and fit into a GPU's memory, fewer the larger the picture.

    Raises as `fitting_batch_size`.
    """
    size = min(len(recipe.prompts), prompts_at_once(pipe, recipe.height, recipe.width))
    return fitting_batch_size(pipe, groups, recipe, size) if pipe.unet.device.type == "cuda" else size


def fitting_batch_size(pipe: DiffusionPipeline, groups: Sequence[Group], recipe: Recipe, most: int) -> int:
    """`most` prompts at once, or as many as memory allows: one step with throw-away sums is tried.

    Raises SlimdiffError if not even one prompt fits.
    """

    def attempt(size: int) -> int:
        job = replace(recipe, steps=1)
        canvas = canvases(pipe, job, range(size))
        guide = partial(guided, prompts=size, guidance_scale=recipe.guidance_scale)
        with captured(pipe.unet, groups, {}, guide=guide):
            paint(pipe, job, range(size), canvas=canvas)
        return size

    try:
        return int(find_executable_batch_size(attempt, starting_batch_size=most)())
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise SlimdiffError(
            f"Not even one prompt at {recipe.width}x{recipe.height} px fits into the memory of {pipe.unet.device} "
            f"beside the model in {str(pipe.unet.dtype).removeprefix('torch.')} and the sums, which take "
            f"{footprint(pipe.unet, groups) / 1e9:.1f} GB. Use --dtype float16, a smaller --height and --width, no "
            "--baselines and --resnets, or --device cpu."
        ) from error
