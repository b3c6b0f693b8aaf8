"""Keeping some dimensions as they are, nothing refitted: the scores that choose them, and what that really costs.

Dropping the dimensions D of a layer loses `Σ_{i∈D} c_i`, where c_i is what dimension i contributes: the term `q_i k_i`
of a logit, the term `W_:i z_i` of an output. With `M_ij = E[c_i·c_j]` the expected squared error is `Σ_{i,j∈D} M_ij`,
cross terms included. These are the errors given here. They are true ones, so they need not fall with the width: of two
dimensions that cancel each other, keeping one is worse than keeping none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import regularised, tails
from slimdiff.solve.solution import Factors


def wanda(second: Tensor, weight: Tensor) -> Tensor:
    """`|W_:j| √E[x_j²]`, (d,), from E[x xᵀ], (d, d), and W, (C, d) (Sun et al., arXiv 2306.11695, summed over outputs).

    It is √M_jj: the dimensions are ranked by what each would cost if it alone were dropped.
    """
    return weight.double().norm(dim=0) * second.double().diagonal().sqrt()


def wanda_qk(queries: Tensor, keys: Tensor) -> Tensor:
    """`√(E[q_j²] E[k_j²])`, (h, d_h), from E[q qᵀ] and E[k kᵀ], (h, d_h, d_h): √M_jj again.

    It is also the score of the CR decomposition of MoDeGPT (arXiv 2408.09632, type II).
    """
    return (queries.double().diagonal(dim1=1, dim2=2) * keys.double().diagonal(dim1=1, dim2=2)).sqrt()


def magnitude(*sides: Tensor) -> Tensor:
    """The product of the norms of all weights around each dimension, (d,), from sides with a row each, (d, ...).

    Sides are `W_q, W_k` for query-key groups, `W_v, W_oᵀ` for value-output groups, and for feed-forward groups W_2ᵀ and
    `[W_a W_g]`, a hidden unit's rows in both halves of the GEGLU side by side.
    """
    return torch.stack([side.double().flatten(1).norm(dim=1) for side in sides]).prod(0)


def random(*shape: int, seed: int) -> Tensor:
    """Scores that mean nothing, the same for the same seed on every device."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class HeadSelection:
    """The best dimensions of every head, in their old order."""

    error: Tensor  # (d_h + 1,)
    order: Tensor  # (h, d_h), dimensions of each head, best first
    weight: Tensor | None = None  # W_o, (C, h d_h); none for query-key groups

    def at(self, r: int) -> Factors:
        d = self.order.shape[1]
        kept = self.order[:, :r].sort(1).values
        maps = torch.eye(d, dtype=torch.float64, device=kept.device)[kept]  # (h, r, d_h)
        if self.weight is None:
            return Factors((maps, maps))
        return Factors((maps,), self.weight[:, _columns(kept, d).flatten()])


@dataclass(frozen=True)
class UnitSelection:
    """The best hidden units, in their old order."""

    error: Tensor  # (f + 1,)
    order: Tensor  # (f,), best first
    weight: Tensor  # W_2, (C, f)

    def at(self, r: int) -> Factors:
        kept = self.order[:r].sort().values
        return Factors((kept,), self.weight[:, kept])


def select_qk(scores: Tensor, queries: Tensor, keys: Tensor) -> HeadSelection:
    """The dimensions of highest score, (h, d_h), of every head's queries and keys.

    `queries` and `keys` are E[q qᵀ] and E[k kᵀ], (h, d_h, d_h). A head loses `Σ_{i∈D} q_i k_i`, so with q and k
    independent `M = E[q qᵀ] ∘ E[k kᵀ]`. Exact at full width.
    """
    alive = queries.any((-2, -1)) & keys.any((-2, -1))  # a dead head has no logits to lose
    shared = regularised(queries) * regularised(keys) * alive[:, None, None]
    order = _best_first(scores, shared)
    return HeadSelection(tails(_energies(shared, order).sum(0)), order)


def select_vo(scores: Tensor, outputs: Tensor, weight: Tensor) -> HeadSelection:
    """The dimensions of highest score, (h, d_h), of every head's output.

    `outputs` is `Z = E[z zᵀ]` of the concatenated head outputs, (h d_h, h d_h); `weight` is W_o, (C, h d_h). All heads
    drop theirs at once: `M = W_oᵀ W_o ∘ Z` over all of them. Exact at full width.
    """
    h, d = scores.shape
    weight = weight.double()
    shared = weight.mT @ weight * regularised(outputs)
    order = _best_first(scores, shared)
    columns = _columns(order, d).mT.flatten()  # best of every head, second of every head, ...
    return HeadSelection(tails(_energies(shared, columns).view(d, h).sum(1)), order, weight)


def select_ffn(scores: Tensor, hidden: Tensor, weight: Tensor) -> UnitSelection:
    """The hidden units of highest score, (f,).

    `hidden` is `U = E[u uᵀ]`, (f, f); `weight` is W_2, (C, f); `M = W_2ᵀ W_2 ∘ U`. Exact at full width.
    """
    weight = weight.double()
    shared = weight.mT @ weight * regularised(hidden)
    order = _best_first(scores, shared)
    return UnitSelection(tails(_energies(shared, order)), order, weight)


def _best_first(scores: Tensor, like: Tensor) -> Tensor:
    return scores.to(like.device).argsort(dim=-1, descending=True, stable=True)


def _columns(dimensions: Tensor, d: int) -> Tensor:
    """Dimensions of each head, (h, ...), as columns of the concatenated heads."""
    return dimensions + d * torch.arange(len(dimensions), device=dimensions.device)[:, None]


def _energies(shared: Tensor, order: Tensor) -> Tensor:
    """What dropping each dimension adds once all after it in `order`, (..., d), are gone; M is `shared`, (..., d, d).

    `e_i = M_ii + 2 Σ_{j>i} M_ij`, so that the tail sums of e are the sums of M over its trailing blocks.
    """
    ordered = shared.take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1)
    return 2 * ordered.triu().sum(-1) - ordered.diagonal(dim1=-2, dim2=-1)
