"""The accumulator: moments of tokens that no batching, order or merging changes."""

from __future__ import annotations

import torch
from baselines import correlated, draw

from slimdiff.gram import Gram, Moments
from slimdiff.linalg import RIDGE

torch.set_num_threads(1)
N, HEADS, D = 360, 3, 5


def added(*parts: torch.Tensor) -> Gram:
    gram = Gram(D, HEADS)
    for part in parts:
        gram.add(part)
    return gram


def exact(x: torch.Tensor) -> Moments:
    """Moments by head of tokens, (n, h d), in float64 and by another route."""
    heads = x.double().unflatten(-1, (HEADS, D)).flatten(0, -3)
    covariance = torch.stack([torch.cov(heads[:, h].mT, correction=0) for h in range(HEADS)])
    return Moments(covariance, heads.mean(0), len(heads))


def assert_same(found: Moments, wanted: Moments, tolerance: float = 1e-6) -> None:
    assert found.count == wanted.count
    for name in ("covariance", "mean", "second"):
        a, b = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_moments_are_those_of_float64_for_every_head():
    x = correlated(N, HEADS * D, seed=0).float()
    found = added(x).moments()
    assert_same(found, exact(x))
    heads = x.double().view(N, HEADS, D)
    torch.testing.assert_close(found.second, torch.einsum("nhd,nhe->hde", heads, heads) / N, rtol=0, atol=1e-6)


def test_batching_order_and_merging_change_only_rounding():
    x = correlated(N, HEADS * D, seed=1).float()
    wanted, parts = exact(x), x.split([7, 100, 1, 252])
    assert_same(added(*parts).moments(), wanted)
    assert_same(added(*reversed(parts)).moments(), wanted)
    assert_same(added(x[torch.randperm(N, generator=torch.Generator().manual_seed(2))]).moments(), wanted)
    assert_same(added(x.view(4, N // 4, -1)).moments(), wanted)
    for cut in (0, 2, 4):  # merging with an empty one on either side changes nothing
        merged = added(*parts[:cut])
        merged.merge(added(*parts[cut:]))
        assert_same(merged.moments(), wanted)


def test_a_mean_far_from_zero_does_not_drown_the_spread():
    x = (correlated(N, HEADS * D, seed=3) + 300).float()
    found = added(*x.split(40)).moments()
    assert_same(found, exact(x), 1e-5)
    torch.testing.assert_close(found.covariance, exact(x).covariance, rtol=0, atol=1e-5)


def test_half_precision_tokens_whose_products_overflow_are_summed_right():
    x = (300 * draw(N, HEADS * D, seed=3)).half()
    assert x.isfinite().all()
    assert not (x.mT @ x).isfinite().all()
    assert_same(added(*x.split(90)).moments(), exact(x))


def test_the_same_tokens_again_and_again_change_only_the_count():
    """Keys of the same text come again in every step; the rounding of their sum has to stay below the ridge."""
    x = correlated(16, D * HEADS, seed=4).float()
    gram = Gram(D, HEADS)
    for _ in range(5000):
        gram.add(x)
    found, wanted = gram.moments(), exact(x)
    assert found.count == 5000 * 16
    assert (found.second - wanted.second).abs().max() < RIDGE * wanted.second.diagonal(dim1=-2, dim2=-1).mean()
    assert (found.covariance - wanted.covariance).abs().max() < RIDGE * wanted.covariance.diagonal(0, -2, -1).mean()


def test_a_long_calibration_keeps_moments_positive_after_the_ridge():
    """Tokens in few directions leave eigenvalues at zero; rounding must not push them below by more than the ridge."""
    d, mix = 64, draw(16, 64, seed=5).float()
    gram, generator = Gram(d), torch.Generator().manual_seed(6)
    for _ in range(1500):
        gram.add(torch.randn(64, 16, generator=generator) @ mix + 3)
    covariance = gram.moments().covariance[0]
    assert float(torch.linalg.eigvalsh(covariance)[0]) > -RIDGE * float(covariance.diagonal().mean())


def test_an_empty_accumulator_is_zero_not_nan():
    seen = Gram(D, HEADS).moments()
    assert seen.count == 0
    assert not seen.second.any()
    assert not seen.mean.any()
