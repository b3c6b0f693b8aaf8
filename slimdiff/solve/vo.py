"""Value-output groups: narrower head outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.gram import Moments
from slimdiff.linalg import NestedLeastSquares, regularised, roots, tails
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class VOSolution:
    error: Tensor  # (d_h + 1,)
    maps: Tensor  # R, (h, d_h, d_h): orthonormal rows, best first
    fit: NestedLeastSquares  # in the order: best row of every head, second row of every head, ...
    weight: Tensor  # W_o, (C, h d_h)
    mean: Tensor  # (h d_h,), zero where there is no bias to absorb it

    def at(self, r: int) -> Factors:
        h, d, _ = self.maps.shape
        maps = self.maps[:, :r]
        out = self.fit.weight(h * r).unflatten(1, (r, h)).transpose(1, 2).flatten(1)
        kept_mean = (maps @ self.mean.view(h, d, 1)).flatten()
        return Factors((maps,), out, self.weight @ self.mean - out @ kept_mean)

    def dropped(self, r: int, rank: int) -> tuple[Tensor, Tensor]:
        h, d, _ = self.maps.shape
        mean = (self.maps @ self.mean.view(h, d, 1)).view(h, d).mT.flatten()
        left, right = self.fit.others(h * r, mean, rank)
        left = self.maps.mT @ left.view(d, h, -1).transpose(0, 1)
        return left.flatten(0, 1), right.unflatten(1, (r, h)).transpose(1, 2).flatten(1)


def solve_vo(outputs: Moments, weight: Tensor, heads: int, has_bias: bool = True) -> VOSolution:
    """The best r dimensions of every head's output, and the output projection that makes the most of all of them.

    `outputs` are the moments of z, the concatenated head outputs, (h d_h, h d_h); `weight` is W_o, (C, h d_h). Two
    steps. Per head, the r directions that carry most of its own contribution: with `Z = E[z_h z_hᵀ]`, the SVD
    `W_o,h Z^½ = U S Vᵀ` and the row space of `V_rᵀ Z^-½`, orthonormalised (R_h). Then one least-squares fit over all
    heads together: `W_o' = W_o Z Rᵀ (R Z Rᵀ)⁻¹` with block-diagonal R, which also uses what the kept directions of one
    head know about the dropped ones of another. Attention mixes values over tokens but not over dimensions, so R moves
    into the value projection: `W_v' = R W_v`.

    With `has_bias`, everything is done on the covariance and the lost mean goes into the output bias. Exact at full
    width, and the error at every r is that of the joint fit.
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
    rotation = torch.zeros(d, h, h, d, dtype=weight.dtype, device=weight.device)
    for i in range(h):
        rotation[:, i, i] = maps[i]
    rotation = rotation.view(h * d, h * d)  # row (j, i): j-th direction of head i
    fit = NestedLeastSquares.of(weight @ rotation.mT, rotation @ moment @ rotation.mT)
    return VOSolution(tails(fit.energies().view(d, h).sum(1)), maps, fit, weight, mean)
