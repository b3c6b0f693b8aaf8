"""Query-key groups: the best logits of every rank."""

from __future__ import annotations

import pytest
import torch
from baselines import CASES, correlated, draw, heads_of, random_qk, svd_qk
from torch import Tensor

from slimdiff.gram import Gram
from slimdiff.linalg import RIDGE
from slimdiff.solve.qk import solve_qk

torch.set_num_threads(1)
H, D, N = 3, 8, 300


def by_head(x: Tensor) -> Tensor:
    """(n, h d) -> (h, n, d)."""
    return x.unflatten(1, (H, D)).transpose(0, 1)


def second(x: Tensor) -> Tensor:
    """Second moments of tokens by head, (h, n, d) -> (h, d, d)."""
    return x.mT @ x / x.shape[1]


def tokens(seed: int, case: str = "plain") -> tuple[Tensor, Tensor]:
    """Queries and centred keys by head, (h, n, d)."""
    queries, keys = CASES[case](correlated(N, H * D, seed)), CASES[case](correlated(N, H * D, seed + 10))
    return by_head(queries), by_head(keys - keys.mean(0))


def error(q: Tensor, k: Tensor, slim_q: Tensor, slim_k: Tensor) -> Tensor:
    """Relative squared error of the logits of all pairs of a query and a key."""
    logits = q @ k.mT
    return (slim_q @ slim_k.mT - logits).square().sum() / logits.square().sum()


@pytest.mark.parametrize("case", [name for name in CASES if name != "zero"])
def test_predicted_error_is_the_error_on_the_tokens_at_every_width(case):
    for seed in (0, 100):
        q, k = tokens(seed, case)
        solution = solve_qk(second(q), second(k))
        assert solution.error.shape == (D + 1,)
        assert solution.error[0] == 1
        assert solution.error[D] == 0
        assert (solution.error.diff() <= 0).all()
        for r in range(1, D + 1):
            map_q, map_k = solution.at(r).into
            assert map_q.shape == map_k.shape == (H, r, D)
            measured = error(q, k, q @ map_q.mT, k @ map_k.mT)
            assert abs(float(measured - solution.error[r])) < 20 * RIDGE


def test_nothing_to_attend_to_gives_finite_maps_and_errors():
    zero, keys = torch.zeros(H, D, D), second(tokens(0)[1])
    for a, b in ((zero, zero), (zero, keys), (keys, zero)):
        solution = solve_qk(a, b)
        assert all(torch.isfinite(m).all() for m in solution.at(3).into)
        assert (solution.error.diff() <= 0).all()
        assert solution.error[D] == 0


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("zero", "a dead head")])
def test_full_width_keeps_the_bilinear_form(case):
    q, k = tokens(1, case)
    map_q, map_k = solve_qk(second(q), second(k)).at(D).into
    identity = torch.eye(D, dtype=torch.float64).expand(H, D, D)
    torch.testing.assert_close(map_q.mT @ map_k, identity, rtol=0, atol=1e-6)


def test_widths_are_nested():
    q, k = tokens(2)
    solution = solve_qk(second(q), second(k))
    for narrow, full in zip(solution.at(3).into, solution.at(D).into, strict=True):
        assert torch.equal(narrow, full[:, :3])


def test_it_is_the_optimum_over_the_layers_inputs():
    """Eckart-Young on `C_x^½ W_qᵀ W_k C_y^½` in the layer's own space, which needs no head space at all."""
    x, y = correlated(N, 20, seed=3), correlated(N, 12, seed=4)
    y = y - y.mean(0)
    w_q, w_k = draw(H * D, 20, seed=5), draw(H * D, 12, seed=6)
    error = solve_qk(second(by_head(x @ w_q.mT)), second(by_head(y @ w_k.mT))).error
    left = torch.linalg.cholesky(x.mT @ x / N)
    right = torch.linalg.cholesky(y.mT @ y / N)
    energies = torch.linalg.svdvals(left.mT @ heads_of(w_q, H).mT @ heads_of(w_k, H) @ right).square()
    for r in range(D + 1):
        assert float(error[r]) == pytest.approx(float(energies[:, r:].sum() / energies.sum()), abs=5 * RIDGE)


def test_a_rotation_of_the_heads_dimensions_changes_nothing():
    q, k = tokens(7)
    turn, _ = torch.linalg.qr(draw(H, D, D, seed=8))
    plain, turned = solve_qk(second(q), second(k)), solve_qk(second(q @ turn.mT), second(k @ turn.mT))
    torch.testing.assert_close(turned.error, plain.error, rtol=1e-10, atol=1e-12)
    (a, b), (c, d) = plain.at(3).into, turned.at(3).into
    torch.testing.assert_close(turn.mT @ c.mT @ d @ turn, a.mT @ b, rtol=1e-8, atol=1e-10)


def test_a_shift_of_all_keys_of_an_image_is_free():
    """It moves no softmax, and with keys centred image by image it moves no solution either."""
    images = 4
    q = by_head(correlated(N, H * D, seed=9))
    k = by_head(correlated(N, H * D, seed=10)).unflatten(1, (images, -1))  # (h, images, n, d)
    shifted = k + 5 * draw(H, images, 1, D, seed=11)

    def softmax(keys: Tensor) -> Tensor:
        return (q[:, None, :50] @ keys.mT).softmax(-1)

    def solved(keys: Tensor) -> Tensor:
        map_q, map_k = solve_qk(second(q), second((keys - keys.mean(2, keepdim=True)).flatten(1, 2))).at(3).into
        return map_q.mT @ map_k

    torch.testing.assert_close(softmax(shifted), softmax(k), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solved(shifted), solved(k), rtol=1e-8, atol=1e-10)
    # Without centring, rank is spent on the shift and the softmax moves more.
    uncentred = solve_qk(second(q), second(shifted.flatten(1, 2))).at(3).into
    form = uncentred[0].mT @ uncentred[1]

    def moved(form: Tensor) -> float:
        return float(((q[:, None, :50] @ form[:, None] @ shifted.mT).softmax(-1) - softmax(shifted)).square().mean())

    assert moved(solved(shifted)) < moved(form)


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_closed_form_beats_plain_svd_beats_random(seed):
    x, y = correlated(N, 20, seed), correlated(N, 12, seed + 1)
    w_q, w_k = correlated(H * D, 20, seed + 2), correlated(H * D, 12, seed + 3)
    q, k = by_head(x @ w_q.mT), by_head(y @ w_k.mT)
    k = k - k.mean(1, keepdim=True)
    y = y - y.mean(0)
    solution = solve_qk(second(q), second(k))
    for r in (2, 4):
        map_q, map_k = solution.at(r).into
        ours = error(q, k, q @ map_q.mT, k @ map_k.mT)
        plain = error(q, k, *(t @ w.mT for t, w in zip((x, y), svd_qk(w_q, w_k, H, r), strict=True)))
        random = error(q, k, *(t @ w.mT for t, w in zip((x, y), random_qk(w_q, w_k, H, r, seed), strict=True)))
        assert ours < plain < random


def test_accumulated_single_precision_sums_are_good_enough_for_tokens_in_few_directions():
    q, k = tokens(12, "few directions")
    grams = [Gram(D, H), Gram(D, H)]
    for gram, x in zip(grams, (q, k), strict=True):
        rows = x.transpose(0, 1).flatten(1).float()
        for _ in range(300):
            for part in rows.split(50):
                gram.add(part)
    solution = solve_qk(*(gram.moments().second for gram in grams))
    for r in range(1, D + 1):
        map_q, map_k = (m.float().double() for m in solution.at(r).into)
        assert float(error(q, k, q @ map_q.mT, k @ map_k.mT)) == pytest.approx(float(solution.error[r]), abs=1e-4)
