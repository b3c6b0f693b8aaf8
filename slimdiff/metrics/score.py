"""What a metric finds out about the pictures of two models: plain records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimdiff.metrics.pictures import Pictures


@dataclass(frozen=True)
class Estimate:
    """A figure, and its standard error where it is a mean over prompts."""

    value: float
    error: float | None = None

    @staticmethod
    def mean(values: Tensor) -> Estimate:
        """Of one value per prompt, (n,); of a single one the error is not known."""
        found = values.double()
        error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else None
        return Estimate(float(found.mean()), error)


@dataclass(frozen=True)
class Score:
    """A metric's figures. `slim` alone is of the slim pictures against the dense ones; `difference` is slim - dense.

    `cautions` are sentences on what the figures cannot tell.
    """

    name: str
    meaning: str
    slim: Estimate
    dense: Estimate | None = None
    difference: Estimate | None = None
    cautions: tuple[str, ...] = ()

    @staticmethod
    def paired(name: str, meaning: str, dense: Tensor, slim: Tensor) -> Score:
        """Of one value per prompt of each model, (n,): what both have in common cancels from the difference's error."""
        sides = Estimate.mean(slim), Estimate.mean(dense)
        return Score(name, meaning, *sides, Estimate.mean(slim.double() - dense.double()))


class Metric(Protocol):
    """A metric with its weights loaded."""

    def check(self, prompts: int, size: tuple[int, int]) -> None:
        """Raises SlimdiffError if so many prompts, painted at (width, height) pixels, cannot be measured."""

    def measure(self, dense: Pictures, slim: Pictures, prompts: Sequence[str], device: torch.device) -> Score:
        """`slim[i]` and `dense[i]` are of `prompts[i]`; `device` is where to compute."""
