"""Value-output groups: narrower head outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimdiff.gram import Moments
from slimdiff.linalg import NestedLeastSquares, regularised, roots, tails
from slimdiff.solve.solution import Factors

SWEEPS = 2
"""How often each head's subspace is chosen anew beside those of the others; a third time hardly changes it."""


@dataclass(frozen=True)
class VOSolution:
    """`error` is that of subspaces that each head chose alone, an upper bound: at the width that is asked for, the
    heads choose `sweeps` times more, each knowing what the others keep."""

    error: Tensor  # (d_h + 1,)
    alone: Tensor  # R, (h, d_h, d_h): orthonormal rows, best first
    moment: Tensor  # Z, (h d_h, h d_h)
    weight: Tensor  # W_o, (C, h d_h)
    mean: Tensor  # (h d_h,), zero where there is no bias to absorb it
    sweeps: int
    _found: dict[int, tuple[Tensor, NestedLeastSquares]] = field(default_factory=dict, init=False)

    def at(self, r: int) -> Factors:
        h, d, _ = self.alone.shape
        whole, fit = self._chosen(r)
        maps = whole[:, :r]
        out = fit.weight(h * r).unflatten(1, (r, h)).transpose(1, 2).flatten(1)
        kept_mean = (maps @ self.mean.view(h, d, 1)).flatten()
        return Factors((maps,), out, self.weight @ self.mean - out @ kept_mean)

    def dropped(self, r: int, rank: int) -> tuple[Tensor, Tensor]:
        h, d, _ = self.alone.shape
        maps, fit = self._chosen(r)
        mean = (maps @ self.mean.view(h, d, 1)).view(h, d).mT.flatten()
        left, right = fit.others(h * r, mean, rank)
        left = maps.mT @ left.view(d, h, -1).transpose(0, 1)
        return left.flatten(0, 1), right.unflatten(1, (r, h)).transpose(1, 2).flatten(1)

    def _chosen(self, r: int) -> tuple[Tensor, NestedLeastSquares]:
        """R for this width, (h, d_h, d_h): orthonormal rows, of which the first r of each head are kept; and the fit on
        them. Both are found once, since factors and maps for adapters ask for them in turn."""
        if r not in self._found:
            maps = self.alone
            if self.sweeps and r < maps.shape[1]:
                maps = choose_together(self.weight, self.moment, maps[:, :r], self.sweeps)
            self._found[r] = maps, fit_rows(self.weight, self.moment, maps)
        return self._found[r]


def solve_vo(outputs: Moments, weight: Tensor, heads: int, has_bias: bool = True, sweeps: int = SWEEPS) -> VOSolution:
    """The best r dimensions of every head's output, and the output projection that makes the most of all of them.

    `outputs` are the moments of z, the concatenated head outputs, (h d_h, h d_h); `weight` is W_o, (C, h d_h). Three
    steps. Per head, the r directions that carry most of its own contribution: with `Z = E[z_h z_hᵀ]`, the SVD
    `W_o,h Z^½ = U S Vᵀ` and the row space of `V_rᵀ Z^-½`, orthonormalised (R_h). Then, head by head and `sweeps` times
    over, the r directions that add most to what all other heads keep (`choose_together`). Then one least-squares fit
    over all heads: `W_o' = W_o Z Rᵀ (R Z Rᵀ)⁻¹` with block-diagonal R, which also uses what the kept directions of one
    head know about the dropped ones of another. Attention mixes values over tokens but not over dimensions, so R moves
    into the value projection: `W_v' = R W_v`.

    With `has_bias`, everything is done on the covariance and the lost mean goes into the output bias. Exact at full
    width. The first step's rows are nested, so that one fit gives the error at every r; the second only lowers it.
    """
    weight = weight.double()
    h, d = heads, weight.shape[1] // heads
    mean = outputs.mean.double() if has_bias else torch.zeros(h * d, dtype=weight.dtype, device=weight.device)
    moment = regularised(outputs.covariance if has_bias else outputs.second)
    own = torch.stack([moment[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(h)])
    root, _ = roots(own)
    by_head = weight.view(-1, h, d).transpose(0, 1)  # (h, C, d)
    inner = by_head.mT @ by_head  # W_o,hᵀ W_o,h, (h, d, d)
    _, v = torch.linalg.eigh(root @ inner @ root)
    # V_rᵀ Z^-½ and (inner Z^½ V_r)ᵀ span the same rows; the latter needs no inverse. QR keeps the nesting.
    basis, _ = torch.linalg.qr(inner @ root @ v.flip(-1))
    maps = basis.mT.contiguous()
    energies = fit_rows(weight, moment, maps).energies().view(d, h).sum(1)
    return VOSolution(tails(energies), maps, moment, weight, mean, sweeps)


def fit_rows(weight: Tensor, moment: Tensor, maps: Tensor) -> NestedLeastSquares:
    """The fit in the order: first row of every head's map, second row of every head's map, ..."""
    h, d, _ = maps.shape
    rotation = torch.zeros(d, h, h, d, dtype=weight.dtype, device=weight.device)
    for i in range(h):
        rotation[:, i, i] = maps[i]
    rotation = rotation.view(h * d, h * d)  # row (j, i): j-th direction of head i
    return NestedLeastSquares.of(weight @ rotation.mT, rotation @ moment @ rotation.mT)


def choose_together(weight: Tensor, moment: Tensor, maps: Tensor, sweeps: int) -> Tensor:
    """Maps of r rows for every head, (h, r, d), improved and completed to (h, d, d), orthonormal.

    Let y be what the other heads keep, and `S = Cov(z_h | y)`, `T = Cov(W_o z, z_h | y)` what y leaves of the head and
    of its part in the output. Adding rows R_h to y then explains `|T R_hᵀ (R_h S R_hᵀ)^-½|²` more, which is most for
    `R_h = V_rᵀ L⁻¹` with `S = L Lᵀ` and the SVD `T L⁻ᵀ = U S Vᵀ`. So the error never rises (block coordinate descent).
    """
    (h, r, d), n = maps.shape, len(moment)
    whole = maps.new_zeros(h, d, d)
    whole[:, :r] = maps
    by_head = moment.view(h, d, n)
    passed = (weight @ moment).view(-1, h, d).transpose(0, 1)  # Cov(W_o z, z), (h, C, d)
    for i in list(range(h)) * sweeps:
        others = torch.arange(h, device=maps.device) != i
        rows, own = whole[others, :r], slice(i * d, (i + 1) * d)
        seen = rows @ by_head[others]  # Cov(y, z), (h - 1, r, h d)
        inside = torch.einsum("ardk,dsk->ards", seen.unflatten(2, (h, d))[:, :, others], rows)  # Cov(y)
        seen = seen.flatten(0, 1)[:, own]
        across = torch.linalg.solve(inside.reshape(len(seen), len(seen)), seen)
        left = moment[own, own] - seen.mT @ across
        part = passed[i] - (passed[others] @ rows.mT).transpose(0, 1).flatten(1) @ across
        factor = torch.linalg.cholesky(left)
        whitened = torch.linalg.solve_triangular(factor, part.mT, upper=False)  # (T L⁻ᵀ)ᵀ
        _, vectors = torch.linalg.eigh(whitened @ whitened.mT)
        best = torch.linalg.solve_triangular(factor.mT, vectors.flip(1), upper=True)  # (Vᵀ L⁻¹)ᵀ
        whole[i] = torch.linalg.qr(best).Q.mT
    return whole
