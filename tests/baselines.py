"""Synthetic tokens that are correlated as real ones are, and the simpler methods that the closed forms have to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimdiff.gram import Gram, Moments


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, d: int, seed: int) -> Tensor:
    """Tokens, (n, d), float64, whose covariance has a falling spectrum in a random basis, and a modest mean."""
    basis, _ = torch.linalg.qr(draw(d, d, seed=seed))
    scales = torch.linspace(0, -2.5, d, dtype=torch.float64).exp()
    return draw(n, d, seed=seed + 1) * scales @ basis + 0.3 * draw(d, seed=seed + 2)


def _few_directions(x: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(draw(x.shape[1], x.shape[1] // 2, seed=99))
    return x @ basis @ basis.mT


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "few directions": _few_directions,
    "dead units": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
    "a dead head": lambda x: x * (torch.arange(x.shape[1]) >= x.shape[1] // 3),
    "tiny": lambda x: 1e-6 * x,
    "huge": lambda x: 1e4 * x,
    "far from zero": lambda x: x + 10 * draw(x.shape[1], seed=98),
    "zero": lambda x: 0 * x,
}
"""Well- and ill-conditioned tokens, as changes to `correlated` ones."""


def moments(x: Tensor) -> Moments:
    """What an ideal accumulator says about tokens, (n, d)."""
    centred = x - x.mean(0)
    return Moments(centred.mT @ centred / len(x), x.mean(0), len(x))


def accumulated(x: Tensor, batch: int = 100) -> Moments:
    """What the accumulator of calibration says about tokens, (n, d), as one head."""
    gram = Gram(x.shape[1])
    for part in x.split(batch):
        gram.add(part.float())
    seen = gram.moments()
    return Moments(seen.covariance[0], seen.mean[0], seen.count)


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """Rows by head: (h d, C) -> (h, d, C)."""
    return weight.unflatten(0, (heads, -1))


def svd_qk(w_q: Tensor, w_k: Tensor, heads: int, r: int) -> tuple[Tensor, Tensor]:
    """Plain truncated SVD of `W_qᵀ W_k` of every head: new weights, (h, r, C) each."""
    u, s, vh = torch.linalg.svd(heads_of(w_q, heads).mT @ heads_of(w_k, heads), full_matrices=False)
    scale = s[:, :r, None].sqrt()
    return scale * u.mT[:, :r], scale * vh[:, :r]


def random_qk(w_q: Tensor, w_k: Tensor, heads: int, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys projected onto the same random directions of every head."""
    rows = random_rows(heads, w_q.shape[0] // heads, r, seed)
    return rows @ heads_of(w_q, heads), rows @ heads_of(w_k, heads)


def random_rows(heads: int, d: int, r: int, seed: int) -> Tensor:
    """Orthonormal rows, (h, r, d)."""
    return torch.linalg.qr(draw(heads, d, r, seed=seed))[0].mT


def svd_vo(w_v: Tensor, w_o: Tensor, heads: int, r: int) -> Tensor:
    """Plain truncated SVD of `W_o W_v` of every head, as one output weight on the dense heads, (C, h d).

    With `W_o,h W_v,h = U S Vᵀ` the truncation is `U_r U_rᵀ W_o,h W_v,h`.
    """
    by_head = heads_of(w_o.mT, heads).mT  # (h, C, d)
    u, _, _ = torch.linalg.svd(by_head @ heads_of(w_v, heads), full_matrices=False)
    return (u[..., :r] @ u[..., :r].mT @ by_head).transpose(0, 1).flatten(1)


def random_vo(w_o: Tensor, heads: int, r: int, seed: int) -> Tensor:
    """Head outputs projected onto random directions, as one output weight on the dense heads, (C, h d)."""
    rows = random_rows(heads, w_o.shape[1] // heads, r, seed)
    return (heads_of(w_o.mT, heads).mT @ rows.mT @ rows).transpose(0, 1).flatten(1)


def whitened_vo(w_o: Tensor, moment: Tensor, heads: int, r: int) -> Tensor:
    """Each head truncated on its own for its own outputs, nothing refitted, as one output weight, (C, h d)."""
    d = w_o.shape[1] // heads
    parts = []
    for i in range(heads):
        rows = slice(i * d, (i + 1) * d)
        root = torch.linalg.cholesky(moment[rows, rows])
        u, _, _ = torch.linalg.svd(w_o[:, rows] @ root, full_matrices=False)
        parts.append(u[:, :r] @ u[:, :r].mT @ w_o[:, rows])
    return torch.cat(parts, 1)


def magnitude_ffn(w_in: Tensor, w_out: Tensor, r: int) -> Tensor:
    """The hidden units of largest weights: `|value row| |gate row| |output column|`; indices, (r,)."""
    values, gates = w_in.chunk(2)
    return (values.norm(dim=1) * gates.norm(dim=1) * w_out.norm(dim=0)).topk(r).indices


def random_ffn(f: int, r: int, seed: int) -> Tensor:
    return torch.randperm(f, generator=torch.Generator().manual_seed(seed))[:r]
