"""Classifier-free guidance: how the two halves of a batch become one prediction."""

from __future__ import annotations

from torch import Tensor


def guided(x: Tensor, prompts: int, guidance_scale: float) -> Tensor:
    """Both halves, (2 prompts, ...), negative first, or (prompts, ...) without guidance -> (prompts, ...), float32.

    `negative + scale * (positive - negative)` (Ho & Salimans, arXiv 2207.12598). It is linear, so it also says what
    errors anywhere in the UNet become in the guided prediction, as far as the way there is linear.
    """
    if x.shape[0] == prompts:
        return x.float()
    negative, positive = x.float().chunk(2)
    return negative + guidance_scale * (positive - negative)


def rows_per_prompt(guidance_scale: float, is_told: bool) -> int:
    """Rows of a UNet batch that one prompt takes: two with guidance, which a scale of at most 1 switches off.

    A UNet that `is_told` the scale (see `families.is_told_guidance`) needs only one.
    """
    return 2 if guidance_scale > 1 and not is_told else 1
