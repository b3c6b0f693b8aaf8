"""Numerics: roots, the ridge, energy tails, least squares on nested bases, packing."""

from __future__ import annotations

import pytest
import torch
from baselines import correlated, draw

from slimdiff.errors import StatisticsError
from slimdiff.linalg import (
    RIDGE,
    NestedLeastSquares,
    leading_directions,
    pack,
    regularised,
    roots,
    tails,
    tensor_cores,
    unpack,
)

torch.set_num_threads(1)


def positive(values: list[float], seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return basis * torch.tensor(values, dtype=torch.float64) @ basis.mT


MOMENTS = {
    "well conditioned": positive([3.0, 2.0, 1.0, 0.5]),
    "ill conditioned": positive([1e4, 1.0, 1e-2, 1e-4]),
    "tiny": 1e-12 * positive([3.0, 2.0, 1.0, 0.5]),
    "of one feature": torch.tensor([[4.0]], dtype=torch.float64),
    "per head": torch.stack([positive([3.0, 2.0, 1.0], seed) for seed in range(4)]),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_roots_are_symmetric_square_roots_and_their_inverses(moment):
    root, inverse = roots(moment)
    identity = torch.eye(moment.shape[-1], dtype=torch.float64).expand_as(moment)
    scale = moment.abs().max()
    torch.testing.assert_close(root @ root / scale, moment / scale, rtol=0, atol=1e-13)
    torch.testing.assert_close(root @ inverse, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse @ moment @ inverse, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(root / scale.sqrt(), root.mT / scale.sqrt(), rtol=0, atol=1e-14)
    assert (torch.linalg.eigvalsh(root) > 0).all()


def test_the_ridge_is_a_share_of_the_mean_energy_at_any_scale():
    for scale in (1e-12, 1.0, 1e8):
        moment = scale * positive([3.0, 2.0, 0.0, 0.0])
        found = regularised(moment)
        expected = moment + RIDGE * scale * 5 / 4 * torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-14)
        torch.linalg.cholesky(found)


def test_regularised_is_float64_and_symmetric_whatever_comes_in():
    skewed = (positive([3.0, 2.0, 1.0]) + 0.1 * draw(3, 3, seed=1)).float()
    found = regularised(skewed)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    assert found[0, 1] == (skewed[0, 1].double() + skewed[1, 0].double()) / 2


def test_a_head_without_energy_becomes_the_identity_and_leaves_the_others_alone():
    living = positive([3.0, 2.0, 1.0])
    found = regularised(torch.stack([living, torch.zeros_like(living)]))
    assert torch.equal(found[1], torch.eye(3, dtype=torch.float64))
    assert torch.equal(found[0], regularised(living))


def test_a_moment_that_rounding_left_indefinite_becomes_definite_and_the_others_keep_their_ridge():
    sound = positive([3.0, 2.0, 1.0])
    found = regularised(torch.stack([positive([3.0, 1.0, -1e-4]), sound]))
    values = torch.linalg.eigvalsh(found[0])
    assert (values > 0).all()
    assert float(values[-1]) == pytest.approx(3.0, rel=2e-3)
    assert torch.equal(found[1], regularised(sound))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_refused_with_a_remedy(bad):
    moment = torch.eye(3).repeat(2, 1, 1)
    moment[1, 2, 0] = bad
    with pytest.raises(StatisticsError, match="float32"):
        regularised(moment)


def test_tails_are_the_energy_not_yet_kept():
    found = tails(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    assert found.tolist() == [1.0, 0.5, 0.25, 0.125, 0.0]
    assert tails(torch.zeros(3, dtype=torch.float64)).tolist() == [0.0] * 4
    energies = draw(40, seed=3).square()
    found = tails(energies)
    assert (found.diff() < 0).all()
    torch.testing.assert_close(found[7] * energies.sum(), energies[7:].sum())


@pytest.mark.parametrize(("n", "d"), [(200, 7), (60, 1)])
def test_nested_least_squares_solves_every_leading_subset(n, d):
    x, weight = correlated(n, d, seed=4), draw(5, d, seed=5)
    y = x @ weight.mT
    fit = NestedLeastSquares.of(weight, x.mT @ x / n)
    lost = torch.cat([fit.energies().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(lost[0], y.square().sum() / n)
    for r in range(1, d + 1):
        direct = torch.linalg.lstsq(x[:, :r], y).solution.mT
        normal = torch.linalg.solve(x[:, :r].mT @ x[:, :r], x[:, :r].mT @ y).mT
        torch.testing.assert_close(fit.weight(r), direct, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fit.weight(r), normal, rtol=1e-9, atol=1e-9)
        true = (y - x[:, :r] @ fit.weight(r).mT).square().sum() / n
        torch.testing.assert_close(lost[r], true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fit.weight(d), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [0, 1, 5, 15, 100, 200, 300])
def test_leading_directions_hold_nearly_the_most_energy(count):
    """Few of them come from a random start: the same every time, and nobody else's random numbers change."""
    x = draw(200, 150, seed=7) * torch.logspace(0, -3, 150, dtype=torch.float64)
    state = torch.random.get_rng_state()
    found = leading_directions(x, count)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(leading_directions(x, count), found)
    assert found.shape == (200, min(count, 200))
    torch.testing.assert_close(found.mT @ found, torch.eye(found.shape[1], dtype=torch.float64), rtol=0, atol=1e-10)
    best = torch.linalg.svdvals(x)[:count].square().sum()
    assert 0.999 * best <= (found.mT @ x).square().sum() <= best * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 5), (3, 4, 4), (2, 3, 1, 1)])
def test_pack_and_unpack_are_inverses(shape):
    full = draw(*shape, seed=6)
    symmetric, d = full + full.mT, shape[-1]
    packed = pack(symmetric)
    assert packed.shape == (*shape[:-2], d * (d + 1) // 2)
    assert torch.equal(unpack(packed, d), symmetric)


def test_pack_takes_the_lower_triangle_row_by_row():
    assert pack(torch.tensor([[1, 9, 9], [2, 3, 9], [4, 5, 6]])).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("chosen", ["none", "ieee", "tf32"])
def test_tensor_cores_are_used_inside_and_the_users_own_choice_after(chosen):
    """However it was made: torch refuses to read its old setting once the new one has been used."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, chosen
    try:
        with tensor_cores():
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = before
