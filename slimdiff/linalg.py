"""Numerics in one place, and the conventions of all the mathematics in this package.

* Tokens are rows: activations are `X: (n, d)`. Weights are as torch has them, `W: (d_out, d_in)`, and `y = x Wᵀ + b`.
* Sizes: `n` tokens, `d` features, `h` heads, `d_h` width of a head, `f` hidden units, `r` width kept, `C` channels.
* A Gram is `XᵀX`; a second moment is `XᵀX / n`; a covariance is `XᵀX / n - m mᵀ` with the mean `m`.
* Solves run in float64 whatever the model's dtype: they square condition numbers.
* Every moment is regularised once, as if each feature carried a little independent noise: `G + RIDGE * mean(diag G) I`.
  All formulas then use that same matrix, so full width stays exact and rank-deficient moments need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from slimdiff.errors import StatisticsError

FEW = 8
"""How many times fewer directions than there are count as few."""

RIDGE = 1e-6
"""Noise per feature relative to the mean energy: above the rounding of float32 sums, below what a picture shows."""


def regularised(moment: Tensor) -> Tensor:
    """`moment`, (..., d, d), in float64 with the ridge added; a moment of nothing but zeros becomes the identity.

    Where rounding has left it indefinite all the same, the ridge grows tenfold until it is positive definite.

    Raises StatisticsError if an entry is NaN or infinite.
    """
    moment = moment.double()
    if not torch.isfinite(moment).all():
        raise StatisticsError(
            "The statistics hold NaN or infinite entries: the model produced them during calibration. "
            "Calibrate again with --dtype float32 (half precision overflows in some models)."
        )
    moment = (moment + moment.mT) / 2
    energy = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    ridge = torch.full_like(energy, RIDGE)
    while True:
        result = torch.where(energy > 0, moment + ridge * energy * identity, identity)
        bad = torch.linalg.cholesky_ex(result).info > 0
        if not bad.any():
            return result
        ridge = torch.where(bad[..., None, None], 10 * ridge, ridge)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of a positive definite `moment`, (..., d, d)."""
    values, vectors = torch.linalg.eigh(moment)
    scale = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[..., None, :]
    return vectors * scale @ vectors.mT, vectors / scale @ vectors.mT


def tails(energies: Tensor) -> Tensor:
    """What is lost by keeping the first r of d energies, (d,) -> (d + 1,) for r = 0..d, relative to their sum."""
    lost = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return lost / lost[0] if lost[0] > 0 else torch.zeros_like(lost)


@dataclass(frozen=True)
class NestedLeastSquares:
    """Least squares on every leading subset of an ordered basis, from one Cholesky factor.

    For `min_V E|W x - V x_r|²`, where `x_r` are the first r coordinates of x and `G = E[x xᵀ]`, the solution is
    `V = W G[:, :r] G[:r, :r]⁻¹`. With `G = L Lᵀ` and `Y = W L`, it is `Y_r L_r⁻¹` on the leading blocks, and the error
    is the energy of the other columns of Y: one factorisation serves all r.
    """

    factor: Tensor  # L, (d, d)
    image: Tensor  # Y, (C, d)

    @staticmethod
    def of(weight: Tensor, moment: Tensor) -> NestedLeastSquares:
        """From W, (C, d), and G, (d, d), both in the order of the basis."""
        factor = torch.linalg.cholesky(moment)
        return NestedLeastSquares(factor, weight @ factor)

    def energies(self) -> Tensor:
        """What each coordinate in turn adds to the explained energy, (d,)."""
        return self.image.square().sum(0)

    def weight(self, r: int) -> Tensor:
        """V, (C, r)."""
        leading = self.factor[:r, :r]
        return torch.linalg.solve_triangular(leading, self.image[:, :r], upper=False, left=False)

    def others(self, r: int, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """What the first r coordinates tell of the others, as two thin factors, (d, s) and (s, r) with s <= `rank`.

        G is a covariance here, and `mean`, (d,), the mean of x. On the coordinates D beyond r the product M is the
        least-squares fit of x_D by x_r up to that rank, without a constant term. For the spread that is
        `N = G[D, :r] G[:r, :r]⁻¹ = L_Dr L_r⁻¹`, on the leading eigenvectors of what it explains, `L_Dr L_Drᵀ`.
        The mean that N misses, `c = m_D - N m_r`, takes one rank: it goes with the linear function of x_r nearest to 1,
        `w = G[:r, :r]⁻¹ m_r / (1 + m_rᵀ G[:r, :r]⁻¹ m_r)`. With all ranks, `M_D = N + c wᵀ` is the fit on the moment
        `G + m mᵀ` (Sherman-Morrison). Rows :r of M are zero.
        """
        leading, below = self.factor[:r, :r], self.factor[r:, :r]
        vectors = leading_directions(below, rank - 1)
        right = torch.linalg.solve_triangular(leading, vectors.mT @ below, upper=False, left=False)
        constant = torch.cholesky_solve(mean[:r, None], leading).mT
        constant = constant / (1 + constant @ mean[:r, None])
        left = torch.cat([vectors, (mean[r:] - vectors @ (right @ mean[:r]))[:, None]], 1)
        right = torch.cat([right, constant])
        return torch.cat([left.new_zeros(r, left.shape[1]), left]), right


def leading_directions(x: Tensor, count: int) -> Tensor:
    """The leading left singular vectors of x, (m, n), as columns, (m, min(count, m)).

    Few of many are found by subspace iteration from a fixed random start (Halko, Martinsson & Tropp, arXiv 0909.4061):
    orthonormal, and nearly the best where singular values fall off, for a small part of the time.
    """
    if count == 0:
        return x.new_empty(len(x), 0)
    if FEW * count > min(x.shape):
        return torch.linalg.eigh(x @ x.mT).eigenvectors[:, len(x) - min(count, len(x)) :]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(x, q=2 * count + 6, niter=4)[0][:, :count]


@contextmanager
def tensor_cores() -> Iterator[None]:
    """While inside, CUDA multiplies float32 matrices as TF32, which is many times as fast.

    Factors are rounded to 11 bits, sums are not: noise of 1e-7 of each feature's energy, below the ridge of the solves.
    """
    matmul = torch.backends.cuda.matmul
    # torch before 2.9 has the first name only; later ones refuse to read it where a user has set the second
    name, wanted = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def pack(symmetric: Tensor) -> Tensor:
    """The lower triangle of (..., d, d) as (..., d (d + 1) / 2), row by row."""
    return symmetric.flatten(-2).index_select(-1, _triangle(symmetric.shape[-1], symmetric.device))


def unpack(packed: Tensor, d: int) -> Tensor:
    """The inverse of `pack`."""
    full = packed.new_zeros(*packed.shape[:-1], d * d)
    full.index_copy_(-1, _triangle(d, packed.device), packed)
    full = full.unflatten(-1, (d, d))
    return full + full.tril(-1).mT


@lru_cache(maxsize=16)
def _triangle(d: int, device: torch.device) -> Tensor:
    """Where the lower triangle's entries are in a flat (d, d) matrix, row by row."""
    rows, columns = torch.tril_indices(d, d, device=device)
    return rows * d + columns
