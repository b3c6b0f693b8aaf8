"""One matrix on its own: two thin ones in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import regularised, tails
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class LinearSolution:
    error: Tensor  # (min(d_out, d_in) + 1,)
    inner: Tensor  # (min(d_out, d_in), d_in), rows best first
    out: Tensor  # (d_out, min(d_out, d_in)), columns in that order

    def at(self, r: int) -> Factors:
        return Factors((self.inner[:r],), self.out[:, :r])


def solve_linear(second: Tensor, weight: Tensor) -> LinearSolution:
    """The best rank-r approximation of one matrix for its inputs, for all r at once.

    `second` is `E[x xᵀ]`, (d_in, d_in); `weight` is W, (d_out, d_in). With the Cholesky factor `S Sᵀ = E[x xᵀ]` and the
    SVD `W S = U Σ Vᵀ`, the matrix becomes `W' = (U_r Σ_r^½) (Σ_r^½ V_rᵀ S⁻¹)`, and `E|W x - W' x|²` is the energy of Σ
    beyond r (SVD-LLM, arXiv 2403.07378: truncation-aware whitening). With the identity as `second` it is the plain SVD
    of W.

    A width is a rank, and parameters are saved below `d_out d_in / (d_out + d_in)` only. Exact at `min(d_out, d_in)`.
    """
    factor = torch.linalg.cholesky(regularised(second))
    u, s, vh = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    inner = torch.linalg.solve_triangular(factor, s.sqrt()[:, None] * vh, upper=False, left=False)
    return LinearSolution(tails(s.square()), inner, u * s.sqrt())
