"""Query-key groups: fewer dimensions for the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import regularised, roots, tails
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class QKSolution:
    error: Tensor  # (d_h + 1,)
    maps_q: Tensor  # (h, d_h, d_h), rows best first
    maps_k: Tensor  # (h, d_h, d_h)

    def at(self, r: int) -> Factors:
        return Factors((self.maps_q[:, :r], self.maps_k[:, :r]))


def solve_qk(queries: Tensor, keys: Tensor) -> QKSolution:
    """The best rank-r logits of every head, for all r at once.

    Per head the logit is `q·k`. With `A = E[q qᵀ]` and `B = E[k kᵀ]`, each (h, d_h, d_h), the maps P, Q of rank r that
    minimise `E[(q·k - Pq·Qk)²]` over independent q and k come from the SVD `A^½ B^½ = U S Vᵀ`:
    `P = S_r^½ U_rᵀ A^-½`, `Q = S_r^½ V_rᵀ B^-½`, and the error is the energy of S beyond r (Eckart-Young). It is the
    same optimum as whitening both projections by their input covariances (MoDeGPT, arXiv 2408.09632, type II; SVD-LLM,
    arXiv 2403.07378), found in the head's own space instead of the layer's.

    The softmax ignores a constant added to all logits of one query, hence a constant added to all keys of one image:
    `keys` should be centred over each image's tokens, which frees the rank that would be spent on their mean.

    Maps act on weights and biases alike. Exact at full width.
    """
    a_root, a_inverse = roots(regularised(queries))
    b_root, b_inverse = roots(regularised(keys))
    u, s, vh = torch.linalg.svd(a_root @ b_root)
    alive = queries.any((-2, -1)) & keys.any((-2, -1))  # a dead head has no logits to lose
    s = s * alive[:, None]
    scale = s.sqrt()[..., None]
    return QKSolution(tails(s.square().sum(0)), scale * (u.mT @ a_inverse), scale * (vh @ b_inverse))
