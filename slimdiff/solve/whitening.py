"""Value-output groups the plain way: every head truncated on its own, nothing refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import regularised, roots, tails
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class WhitenedVOSolution:
    error: Tensor  # (d_h + 1,)
    maps: Tensor  # R, (h, d_h, d_h), rows best first
    out: Tensor  # what W_o becomes, (h, C, d_h), columns in that order

    def at(self, r: int) -> Factors:
        return Factors((self.maps[:, :r],), self.out[..., :r].transpose(0, 1).flatten(1))


def whiten_vo(values: Tensor, weight: Tensor) -> WhitenedVOSolution:
    """The best rank-r approximation of every head's `W_o,h W_v,h` on its own, for all r at once.

    `values` are the second moments `Z = E[v vᵀ]` of each head's values, (h, d_h, d_h); `weight` is W_o, (C, h d_h).
    With the SVD `W_o,h Z^½ = U S Vᵀ` the head becomes `W_o,h' R_h`, where `W_o,h' = U_r S_r` and `R_h = V_rᵀ Z^-½`. No
    other map of rank r has less error on the values: it is the energy of S beyond r (Eckart-Young). This is the
    value-output step of MoDeGPT (arXiv 2408.09632, type III), and the whitening of SVD-LLM (arXiv 2403.07378) applied
    to the pair.
    With `Z = W_v,h W_v,hᵀ` it is the plain SVD of the product `W_o,h W_v,h`.

    The error sums those of the heads, as if they were uncorrelated and attention passed single tokens on. There is no
    joint fit over heads and nothing for the bias, unlike in `solve_vo`. Exact at full width.
    """
    h, d, _ = values.shape
    by_head = weight.double().unflatten(1, (h, d)).transpose(0, 1)  # (h, C, d)
    root, inverse = roots(regularised(values))
    energies, vectors = torch.linalg.eigh(root @ (by_head.mT @ by_head) @ root)  # S² and V, worst first
    vectors = vectors.flip(-1)
    alive = values.any((-2, -1))  # a dead head passes nothing on
    energies = energies.flip(-1).clamp_min(0) * alive[:, None]
    return WhitenedVOSolution(tails(energies.sum(0)), vectors.mT @ inverse, by_head @ root @ vectors)
