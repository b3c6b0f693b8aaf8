"""What an inpainting model paints on: pictures and masks, made without any data.

Such a UNet sees the noisy latents, a mask and the latents of the picture around it. For half of the prompts everything
is masked, as when painting from the prompt alone; the others fill a rectangle in a picture that the model itself has
painted, all masked, for another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from slimdiff.families import inpaints
from slimdiff.measured import Settings
from slimdiff.pipeline import Conditioning, paint
from slimdiff.recipe import Recipe

SIDES = (0.25, 0.75)
"""Least and greatest side of a rectangle, as a share of the picture's."""


def canvases(pipe: DiffusionPipeline, job: Recipe | Settings, chosen: Sequence[int]) -> Conditioning:
    """What the job's prompts of these numbers are painted on: nothing, unless the UNet inpaints.

    `image`, (B, 3, H, W) in [0, 1], and `mask_image`, (B, 1, H, W), 1 where to paint, are arguments of a call of the
    pipeline. Prompts 0, 1, 4, 5, 8, ... get an empty picture; each depends on the prompt's number and the job only.
    """
    if not inpaints(pipe.unet.config):
        return {}
    canvas = _empty(len(chosen), job)
    rows = [row for row, number in enumerate(chosen) if number // 2 % 2]
    if rows:
        others = [(chosen[row] + 1) % len(job.prompts) for row in rows]
        pictures = paint(pipe, job, others, canvas=_empty(len(rows), job), output="pt")
        canvas["image"][rows] = pictures.to(canvas["image"])
        for row in rows:
            canvas["mask_image"][row] = rectangle(job.height, job.width, job.seed + chosen[row])
    return canvas


def _empty(count: int, job: Recipe | Settings) -> Conditioning:
    """Grey, which is 0 to the VAE, and all masked."""
    shape = job.height, job.width
    return {"image": torch.full((count, 3, *shape), 0.5), "mask_image": torch.ones(count, 1, *shape)}


def rectangle(height: int, width: int, seed: int) -> Tensor:
    """A mask, (1, height, width): 1 in a rectangle of random sides and place, 0 around it."""
    generator = torch.Generator().manual_seed(seed)
    least, greatest = SIDES
    place = []
    for side in (height, width):
        share, start = torch.rand(2, generator=generator).tolist()
        length = round(side * (least + (greatest - least) * share))
        first = round(start * (side - length))
        place.append(slice(first, first + length))
    mask = torch.zeros(1, height, width)
    mask[:, place[0], place[1]] = 1
    return mask
