"""What a statistics file says of its own tokens: how many directions they take, and how unevenly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.gram import Gram, Moments
from slimdiff.linalg import regularised
from slimdiff.statistics import StatisticsFile

SLACK = 1e-3
"""Relative difference of two sums of the same energies that rounding explains."""


@dataclass(frozen=True)
class Spectrum:
    """Of one statistic's centred tokens, with the ridge that every solve adds.

    `values` are the eigenvalues of the covariances, largest first and summed over heads place by place, relative to
    their sum, (width,): all 0 for tokens that never vary. `effective_rank` is the participation ratio `(Σλ)² / Σλ²` of
    a head's eigenvalues, their mean over heads: 1 for tokens on one line, the width for tokens spread evenly (Gao et
    al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement"). `condition` is the largest over
    the smallest eigenvalue of the worst head. `energy` is the share of `Σ |x|²` in each tenth of the sampler's calls,
    (10,), None where the file does not hold it.
    """

    key: str
    heads: int
    width: int
    tokens: float
    values: Tensor
    effective_rank: float
    condition: float
    energy: Tensor | None

    @property
    def kept(self) -> Tensor:
        """Share of the energy in the leading r directions of every head, (width + 1,): no r others hold more."""
        return torch.cat([self.values.new_zeros(1), self.values.cumsum(0)]).clamp(max=1)

    def width_for(self, share: float) -> int:
        """The least width that keeps this share of the energy."""
        return int((self.kept < share - 1e-12).sum().clamp(max=self.width)) if self.values.any() else 0


def spectrum(statistics: StatisticsFile, key: str) -> Spectrum:
    """Of one statistic, named as in the file. Raises StatisticsError if it is missing, damaged or not finite."""
    sums = statistics.sums(key)
    found = sums.moments() if isinstance(sums, Gram) else sums.moments().pixels
    ridged = torch.linalg.eigvalsh(regularised(found.covariance)).flip(-1)
    values = ridged * found.covariance.any(-1).any(-1)[:, None]  # a head that is constant has no energy to lose
    total, squares = values.sum(-1), values.square().sum(-1)
    tiny = torch.finfo(values.dtype).tiny
    heads, width = values.shape
    return Spectrum(
        key,
        heads,
        width,
        found.count,
        values=values.sum(0) / total.sum().clamp(min=tiny),
        effective_rank=float((total.square() / squares.clamp(min=tiny)).mean()),
        condition=float((ridged[:, 0] / ridged[:, -1]).max()),
        energy=_shares(sums.energy, found),
    )


def _shares(energy: Tensor, found: Moments) -> Tensor | None:
    """Of each tenth, None where there is no energy, or where earlier versions summed tokens without it."""
    whole = found.count * found.second.diagonal(dim1=1, dim2=2).sum()
    known = whole > 0 and (energy.sum() - whole).abs() < SLACK * whole
    return energy / energy.sum() if known else None
