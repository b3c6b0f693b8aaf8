"""Feed-forward groups: fewer hidden units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.gram import Moments
from slimdiff.linalg import NestedLeastSquares, regularised, tails
from slimdiff.solve.solution import Factors

PANEL = 128
"""Eliminations between two full updates of the matrices: large enough for matrix products to do the work."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""From the moment of the units, (f, f), and W_2, (C, f), to the units in the order in which they are dropped, (f,)."""


def elimination(moment: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
    """Columns of `weight`, (C, f), in the order in which backward elimination drops them, (f,).

    They lie in `parts` of equal size, each of which loses one before any loses another.

    Dropping unit j and refitting the rest adds `|w_j|² / P_jj` to the error, where P is the inverse of the moment of
    the units still there and w_j the refitted column: optimal brain surgery (Hassibi & Stork, 1993) on a linear layer.
    Of W only the products `K = Wᵀ W` are needed. With `v = P_:j / √P_jj` and `a = K_:j / √P_jj - (K_jj / P_jj) v / 2`,
    the drop updates `P -= v vᵀ` and `K -= a vᵀ + v aᵀ`. Updates are collected in panels (V, A), so that matrix products
    do most of the work; units are picked exactly as if they were applied one by one.
    """
    tiny = torch.finfo(moment.dtype).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    products = weight.mT @ weight
    alive = torch.arange(len(inverse), device=inverse.device)
    dropped: list[Tensor] = []
    paused = torch.zeros(parts, dtype=torch.bool, device=inverse.device)
    while n := len(alive):
        size = min(PANEL, n)
        v, a = inverse.new_zeros(n, size), inverse.new_zeros(n, size)
        diagonal, energy = inverse.diagonal(), products.diagonal()
        gone = torch.zeros(n, dtype=torch.bool, device=inverse.device)
        part = alive * parts // weight.shape[1]
        for step in range(size):
            barred = gone | paused[part]
            j = (energy / diagonal).masked_fill(barred, torch.inf).argmin()[None]  # a tensor: the GPU need not wait
            gone.index_fill_(0, j, True)
            dropped.append(alive[j])
            paused.index_fill_(0, part[j], True)
            if len(dropped) % parts == 0:
                paused.zero_()
            before_v, before_a = v[:, :step], a[:, :step]
            own_v, own_a = before_v[j][0], before_a[j][0]
            p = inverse[j][0] - before_v @ own_v
            k = products[j][0] - before_a @ own_v - before_v @ own_a
            root = p[j].clamp_min(tiny).sqrt()
            v[:, step] = p / root
            a[:, step] = k / root - (k[j] / root.square() / 2) * v[:, step]
            diagonal = (diagonal - v[:, step].square()).clamp_min(tiny)
            energy = (energy - 2 * a[:, step] * v[:, step]).clamp_min(0)
        keep = ~gone
        inverse = inverse.addmm_(v, v.mT, alpha=-1)[keep][:, keep]
        products = products.addmm_(a, v.mT, alpha=-1).addmm_(v, a.mT, alpha=-1)[keep][:, keep]
        alive = alive[keep]
    return torch.cat(dropped)


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

    def dropped(self, r: int, rank: int) -> tuple[Tensor, Tensor]:
        _, back = self.order[:r].sort()
        left, right = self.fit.others(r, self.mean[self.order], rank)
        return left[self.order.argsort()], right[:, back]


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
