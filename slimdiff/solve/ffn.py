"""Feed-forward groups: fewer hidden units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.gram import Moments
from slimdiff.linalg import NestedLeastSquares, regularised, tails
from slimdiff.solve.solution import Factors

PANEL = 64
"""Eliminations between two full updates of the inverse: large enough for matrix products to do the work."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""From the moment of the units, (f, f), and W_2, (C, f), to the units in the order in which they are dropped, (f,)."""


def elimination(moment: Tensor, weight: Tensor) -> Tensor:
    """Columns of `weight`, (C, f), in the order in which backward elimination drops them, (f,).

    Dropping unit j and refitting the rest adds `|w_j|² / P_jj` to the error, where P is the inverse of the moment of
    the units still there and w_j the refitted column: optimal brain surgery (Hassibi & Stork, 1993) on a linear layer.
    With `v = P_:j / √P_jj` and `t = w_j / √P_jj`, the drop updates `P -= v vᵀ` and `W -= t vᵀ`. Updates are collected
    in panels (V, T), so that most of the work is in matrix products; units are picked exactly as if applied one by one.
    """
    f = weight.shape[1]
    alive = torch.arange(f, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    dropped = []
    while len(alive):
        size = min(PANEL, len(alive))
        v = inverse.new_zeros(len(alive), size)
        t = weight.new_zeros(weight.shape[0], size)
        diagonal, energy = inverse.diagonal().clone(), weight.square().sum(0)
        gone = torch.zeros(len(alive), dtype=torch.bool, device=weight.device)
        for step in range(size):
            j = int((energy / diagonal).masked_fill(gone, torch.inf).argmin())
            gone[j] = True
            dropped.append(alive[j])
            column = inverse[:, j] - v[:, :step] @ v[j, :step]
            root = column[j].clamp_min(torch.finfo(column.dtype).tiny).sqrt()
            v[:, step] = column / root
            t[:, step] = (weight[:, j] - t[:, :step] @ v[j, :step]) / root
            overlap = weight.mT @ t[:, step] - v[:, :step] @ (t[:, :step].mT @ t[:, step])
            energy += v[:, step] * (v[:, step] * t[:, step].square().sum() - 2 * overlap)
            energy.clamp_min_(0)
            diagonal -= v[:, step].square()
            diagonal.clamp_min_(torch.finfo(column.dtype).tiny)
        keep = ~gone
        inverse = (inverse - v @ v.mT)[keep][:, keep]
        weight = (weight - t @ v.mT)[:, keep]
        alive = alive[keep]
    return torch.stack(dropped)


def leverage(moment: Tensor, weight: Tensor) -> Tensor:
    """Units by ascending ridge leverage score `diag(U (U + λ I)⁻¹)`, (f,): the order in which MoDeGPT drops them.

    The scores of all units are taken once (arXiv 2408.09632, type I), so they do not know which units stand in for each
    other once some are gone, nor what reads them: `weight` plays no part. λ is the mean of diag U: scale plays none.
    """
    ridge = moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + ridge))
    return inverse.diagonal().argsort(descending=True, stable=True)  # U (U + λ I)⁻¹ = I - λ (U + λ I)⁻¹


@dataclass(frozen=True)
class FFNSolution:
    error: Tensor  # (f + 1,)
    order: Tensor  # (f,), hidden units, most useful first
    fit: NestedLeastSquares  # in that order
    weight: Tensor  # W_2, (C, f)
    mean: Tensor  # (f,), zero where there is no bias to absorb it

    def at(self, r: int) -> Factors:
        kept, back = self.order[:r].sort()
        out = self.fit.weight(r)[:, back]
        return Factors((kept,), out, self.weight @ self.mean - out @ self.mean[kept])


def solve_ffn(hidden: Moments, weight: Tensor, has_bias: bool = True, choose: Rule = elimination) -> FFNSolution:
    """Which hidden units to keep, and the down-projection refitted on them.

    `hidden` are the moments of u = a * gelu(g), (f, f); `weight` is W_2, (C, f). Keeping the units J, the best
    down-projection is the Nyström form `W_2' = W_2 U[:, J] U[J, J]⁻¹` (MoDeGPT, arXiv 2408.09632, type I). J is
    what `choose` drops last: by default greedy elimination, where the unit is dropped whose loss, after refitting all
    others, costs least (see `elimination`); MoDeGPT itself goes by `leverage`.

    With `has_bias`, everything is done on the covariance and the lost mean goes into the output bias. Exact at full
    width.
    """
    weight = weight.double()
    mean = hidden.mean.double() if has_bias else torch.zeros_like(hidden.mean, dtype=torch.float64)
    moment = regularised(hidden.covariance if has_bias else hidden.second)
    order = choose(moment, weight).flip(0)
    fit = NestedLeastSquares.of(weight[:, order], moment[order][:, order])
    return FFNSolution(tails(fit.energies()), order, fit, weight, mean)
