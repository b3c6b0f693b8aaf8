"""Whole heads of an attention layer: which to keep, and the output projection refitted on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import NestedLeastSquares, regularised, tails
from slimdiff.solve.solution import Factors


@dataclass(frozen=True)
class HeadsSolution:
    error: Tensor  # (h + 1,)
    order: Tensor  # (h,), heads, most useful first
    fit: NestedLeastSquares  # head by head in that order

    def at(self, r: int) -> Factors:
        kept, back = self.order[:r].sort()
        width = self.fit.image.shape[1] // len(self.order)
        return Factors((kept,), self.fit.weight(r * width).unflatten(1, (r, width))[:, back].flatten(1))


def solve_heads(outputs: Tensor, weight: Tensor, heads: int) -> HeadsSolution:
    """Which whole heads to keep, and the output projection refitted on them.

    `outputs` is the second moment of z, the concatenated head outputs, (h d_h, h d_h); `weight` is W_o, (C, h d_h).
    Heads go one after another, each time the one whose loss, after refitting all others, costs least (see
    `head_elimination`): structured optimal brain surgery, as in OBS-Diff (arXiv 2510.06751). A width is a number of
    heads. Exact with all of them.
    """
    weight, moment = weight.double(), regularised(outputs)
    order = head_elimination(moment, weight, heads).flip(0)
    columns = torch.arange(weight.shape[1], device=weight.device).view(heads, -1)[order].flatten()
    fit = NestedLeastSquares.of(weight[:, columns], moment[columns][:, columns])
    return HeadsSolution(tails(fit.energies().view(heads, -1).sum(1)), order, fit)


def head_elimination(moment: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Heads in the order in which backward elimination drops them, (h,).

    Dropping head b and refitting the rest adds `tr(W_b P_bb⁻¹ W_bᵀ)` to the error, where P is the inverse of the moment
    of the heads still there and W their refitted weight (Hassibi & Stork, 1993, with blocks for single weights; Frantar
    & Alistarh, OBC, arXiv 2208.11580). The drop updates `W -= W_b P_bb⁻¹ P_b:` and `P -= P_:b P_bb⁻¹ P_b:`.
    """
    alive = torch.arange(heads, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    dropped = []
    while len(alive):
        n = len(alive)
        own = inverse.view(n, -1, n, weight.shape[1] // n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # P_bb
        by_head = weight.unflatten(1, (n, -1)).permute(1, 2, 0)  # W_bᵀ, (n, d_h, C)
        b = int((by_head * torch.linalg.solve(own, by_head)).sum((1, 2)).argmin())
        gone = torch.arange(n, device=weight.device) == b
        columns = gone.repeat_interleave(weight.shape[1] // n)
        across = torch.linalg.solve(own[b], inverse[columns][:, ~columns])  # P_bb⁻¹ P_b:
        weight = weight[:, ~columns] - weight[:, columns] @ across
        inverse = inverse[~columns][:, ~columns] - inverse[~columns][:, columns] @ across
        dropped.append(alive[b])
        alive = alive[~gone]
    return torch.stack(dropped)
