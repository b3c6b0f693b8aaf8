"""Sums over patches: against patches unfolded one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from slimdiff.patches import SHIFTS, Patches

torch.set_num_threads(1)


def pictures(n: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width, generator=generator) + 0.5


def unfolded(x: Tensor, border: int = 1) -> Tensor:
    """All patches, (pixels, 9 C), float64; with a `border` of 2 also those whose centre lies around the picture."""
    return unfold(x.double(), 3, padding=border).transpose(1, 2).flatten(0, 1)


def added(*parts: Tensor, weight: float = 1.0) -> Patches:
    patches = Patches(parts[0].shape[1])
    for part in parts:
        patches.add(part, weight)
    return patches


@pytest.mark.parametrize("shape", [(5, 7), (3, 3), (2, 4), (1, 1), (1, 6)])
def test_covariance_is_that_of_the_patches_and_those_on_the_border(shape):
    x = pictures(3, 4, *shape)
    every = torch.arange(4)
    inner, outer = unfolded(x), unfolded(x, border=2)
    expected = outer.mT @ outer / len(inner) - inner.mean(0)[:, None] * inner.mean(0)
    found = added(x).moments().covariance(every, every)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = torch.cov(inner.mT, correction=0)
    assert torch.linalg.eigvalsh(found - exact).min() > -1e-5, "the border adds energy, it takes none"


def test_without_anything_at_the_border_it_is_the_exact_covariance():
    x = pad(pictures(4, 3, 5, 5), (1, 1, 1, 1))
    found, every = added(x).moments(), torch.arange(3)
    torch.testing.assert_close(
        found.covariance(every, every), torch.cov(unfolded(x).mT, correction=0), rtol=1e-5, atol=1e-5
    )


def test_mean_and_centre_are_exact():
    x = pictures(3, 4, 4, 6)
    moments = added(x).moments()
    torch.testing.assert_close(moments.mean.mT.flatten(), unfolded(x).mean(0), rtol=1e-5, atol=1e-6)
    pixels = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.pixels.covariance[0], torch.cov(pixels, correction=0), rtol=1e-5, atol=1e-6)


def test_any_rows_and_columns_are_those_of_the_whole():
    moments, every = added(pictures(2, 5, 4, 4)).moments(), torch.arange(5)
    rows, columns = torch.tensor([3, 0]), torch.tensor([1, 4, 2])
    whole = moments.covariance(every, every).view(5, 9, 5, 9)
    expected = whole[rows][:, :, columns].reshape(18, 27)
    torch.testing.assert_close(moments.covariance(rows, columns), expected, rtol=0, atol=1e-12)


def test_batches_and_weights_change_nothing_but_rounding():
    a, b = pictures(3, 4, 5, 5, seed=1), pictures(2, 4, 5, 5, seed=2)
    whole, parts = added(torch.cat([a, b])).moments(), added(b, a).moments()
    assert whole.count == parts.count == 5 * 25
    doubled, twice = added(a, weight=2.0).moments(), added(a, a).moments()
    assert doubled.count == twice.count
    for x, y in ((whole, parts), (doubled, twice)):
        torch.testing.assert_close(x.shifted, y.shifted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.mean, y.mean, rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_overflow():
    patches = added(100 * torch.ones(2, 1, 40, 40, dtype=torch.float16))
    assert torch.isfinite(patches.products).all()
    assert patches.products[0].item() == 2 * 1600 * 1e4


def test_thirteen_matrices_are_enough():
    assert len(SHIFTS) == len(Patches(3).products) == 13
