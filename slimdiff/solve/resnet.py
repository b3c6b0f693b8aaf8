"""ResNet groups: fewer channels between the two convolutions of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimdiff.linalg import NestedLeastSquares, regularised, tails
from slimdiff.patches import PatchMoments
from slimdiff.solve.ffn import elimination
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class Pictures:
    """The channels in front of the norm, picture by picture: mean, (n, C), and mean square, (n, C), over its pixels,
    float64; `eps` is the norm's."""

    mean: Tensor
    square: Tensor
    eps: float


@dataclass(frozen=True)
class Trial:
    """What a block of r channels makes of the dense block's own inputs: the moments of its `patches`, and of the dense
    outputs y without bias the `products` with them, `E[y p'ᵀ]`, (C_out, 9 r), and the `mean`, (C_out,)."""

    patches: PatchMoments
    products: Tensor
    mean: Tensor


Read = Callable[[], tuple[PatchMoments, Tensor]]
"""Reads what a second convolution sees in the dense block, C channels, and its weight, (C_out, C, 3, 3)."""


@dataclass(frozen=True)
class ResnetSolution:
    """Widths are channels in each of the g groups of the norm. What is large is read anew whenever a fit needs it."""

    error: Tensor  # (C / g + 1,)
    order: Tensor  # (C / g, g), channels, most useful first, one of every group in a row
    read: Read
    pictures: Pictures | None = None
    tried: Mapping[int, Factors] = field(default_factory=dict)  # by width

    def at(self, r: int) -> Factors:
        return self.tried.get(r) or self._fit(r)

    def unfitted(self, r: int) -> Factors:
        """The kept channels and what becomes of their norm; nothing outgoing yet."""
        kept = self.order[:r].flatten().sort().values
        norm = None if self.pictures is None else renormed(self.pictures, kept, self.order.shape[1])
        return Factors((kept,), norm=norm)

    def after(self, trials: Mapping[int, Trial]) -> ResnetSolution:
        """The solution with factors fitted to trials, by width."""
        return replace(self, tried={r: self._fit(r, trial) for r, trial in trials.items()})

    def _fit(self, r: int, trial: Trial | None = None) -> Factors:
        """Fitted to the dense block's patches and to a trial.

        What is known of the dense block counts beside a trial of n pixels like 9 r g more of them, as many as there are
        weights to fit for one output.
        """
        factors, (patches, weight) = self.unfitted(r), self.read()
        (kept,), weight = factors.into, weight.double().flatten(1)
        moment, products = _normal_equations(patches, weight, kept)
        lost, mean = weight @ patches.mean.mT.flatten(), patches.mean.mT[kept].flatten()
        if trial is not None:
            share, own = len(moment) / trial.patches.count, torch.arange(len(kept), device=kept.device)
            lost, mean = trial.mean, trial.patches.mean.mT.flatten()
            moment = trial.patches.covariance(own, own) + share * moment
            products = trial.products - lost[:, None] * mean + share * products
        out = torch.linalg.solve(moment, products, left=False)
        return replace(factors, out=out, bias=lost - out @ mean)


def solve_resnet(read: Read, groups: int) -> ResnetSolution:
    """Which channels to keep between the convolutions of a block, and the second convolution refitted on them.

    Before it lies a norm over `groups` groups of channels. Each of them keeps as many, chosen by `elimination` as if
    every tap were a linear layer of its own. The refit then sees all nine taps: with the covariance P of the patches,
    (9 C, 9 C), and the columns J of the kept channels, `W_2' = W_2 P[:, J] P[J, J]⁻¹`, the Nyström form of `solve_ffn`.
    The lost mean goes into the output bias.

    The error is that of this refit, as if the norm did not change with its groups; `renormed` and trials make good for
    that it does. Exact at full width.
    """
    patches, weight = read()
    weight = weight.double().flatten(1)
    taps = weight.unflatten(1, (-1, 9)).transpose(1, 2).flatten(0, 1)  # (9 C_out, C)
    order = elimination(regularised(patches.pixels.covariance[0]), taps, groups).flip(0)
    fit = NestedLeastSquares.of(_of(weight, order), regularised(patches.covariance(order, order)))
    return ResnetSolution(tails(fit.energies().view(-1, 9 * groups).sum(1)), order.view(-1, groups), read)


def _of(weight: Tensor, channels: Tensor) -> Tensor:
    """The columns of some channels, (C_out, 9 a), of a weight (C_out, 9 C)."""
    return weight.unflatten(1, (-1, 9))[:, channels].flatten(1)


def _normal_equations(patches: PatchMoments, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of the kept channels' patches, (9 a, 9 a), and of the outputs of `weight` with them, (C_out, 9 a)."""
    everything = torch.arange(weight.shape[1] // 9, device=kept.device)
    covariance = patches.covariance(kept, kept)
    moment = regularised(covariance)
    ridge = (moment - covariance).diagonal().mean()
    return moment, weight @ patches.covariance(everything, kept) + ridge * _of(weight, kept)


def renormed(pictures: Pictures, kept: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What the outputs of a norm over the kept channels, (r g,), have to be scaled by, (r g,), and moved by, (r g,).

    A group of fewer channels has another mean and another spread, different ones in every picture. Scale and shift
    bring each channel as near as they can, in least squares over all pixels, to what the norm over all channels makes
    of it.
    """

    def of_groups(channels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of each kept channel's group, (n, r g)."""
        mean, square = (x[:, channels].unflatten(1, (groups, -1)).mean(2) for x in (pictures.mean, pictures.square))
        scale = (square - mean.square() + pictures.eps).rsqrt()
        each = len(kept) // groups
        return mean.repeat_interleave(each, 1), scale.repeat_interleave(each, 1)

    x, xx = pictures.mean[:, kept], pictures.square[:, kept]
    dense, dense_scale = of_groups(torch.arange(pictures.mean.shape[1], device=kept.device))
    slim, slim_scale = of_groups(kept)
    target, source = ((x - dense) * dense_scale).mean(0), ((x - slim) * slim_scale).mean(0)
    energy = ((xx - 2 * x * slim + slim.square()) * slim_scale.square()).mean(0) - source.square()
    shared = ((xx - x * (dense + slim) + dense * slim) * dense_scale * slim_scale).mean(0) - target * source
    scale = shared / energy.clamp_min(pictures.eps)
    return scale, target - scale * source
