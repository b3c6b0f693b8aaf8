"""How much each timestep's tokens count in the statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Weighting = Literal["uniform", "decreasing", "sigma"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


TENTHS = 10
"""Parts of a sampler's run whose energies are told apart."""


@dataclass
class Clock:
    """Which of a batch's UNet calls is running, and how much its tokens count."""

    weights: list[float]
    call: int = 0

    def tick(self, index: int) -> None:
        """The call of this index is over."""
        self.call = index + 1

    def weight(self) -> float:
        return self.weights[self.call]

    def tenth(self) -> int:
        """Of all calls, first to last, the tenth that this one belongs to: 0..9."""
        return TENTHS * self.call // len(self.weights)


def weights(weighting: str, scheduler: Any) -> list[float]:
    """A weight for each of the scheduler's timesteps, which have been set, first (noisiest) to last; their mean is 1.

    `decreasing` falls with the logarithm of the step from 1.2 to 0.8, so that early steps, whose errors have the
    longest way to go, count more (OBS-Diff). `sigma` is the length of the sampler's step in the noise level
    `σ = √(1/ᾱ - 1)`: what a unit of error in the predicted noise moves the latents by in that step.
    """
    calls = len(scheduler.timesteps)
    if weighting == "decreasing":
        found = [1.2 - 0.4 * math.log1p(i) / math.log(calls) if calls > 1 else 1.0 for i in range(calls)]
    elif weighting == "sigma":
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()].double()
        sigma = torch.cat([(1 / alphas - 1).sqrt(), torch.zeros(1)])
        found = (sigma[:-1] - sigma[1:]).abs().tolist()
    else:
        found = [1.0] * calls
    mean = sum(found) / calls
    return [value / mean for value in found]
