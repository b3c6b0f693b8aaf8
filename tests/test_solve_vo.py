"""Value-output groups: the best dimensions of every head, and the output projection refitted on all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from baselines import CASES, accumulated, correlated, draw, moments, random_vo, svd_vo, whitened_vo
from torch import Tensor

from slimdiff.linalg import RIDGE
from slimdiff.solve.solution import Factors
from slimdiff.solve.vo import VOSolution, solve_vo

torch.set_num_threads(1)
H, D, C, N = 3, 6, 10, 300


def dense_weight(factors: Factors) -> Tensor:
    """What the factors do to the dense head outputs, (C, h d)."""
    out = factors.out.unflatten(1, (H, -1)).transpose(0, 1)
    return (out @ factors.into[0]).transpose(0, 1).flatten(1)


def error(z: Tensor, weight: Tensor, other: Tensor, bias: Tensor | float = 0.0, centred: bool = True) -> float:
    """Squared error of `z otherᵀ + bias`, relative to the energy of `z weightᵀ` (around its mean where centred)."""
    y = z @ weight.mT
    energy = (y - y.mean(0) if centred else y).square().sum()
    return float((z @ other.mT + bias - y).square().sum() / energy)


def exact(solution: VOSolution, r: int) -> float:
    """The relative error of a solution's factors in the moment it was fitted to."""
    weight, moment = solution.weight, solution.moment
    lost = weight - dense_weight(solution.at(r))
    return float(torch.trace(lost @ moment @ lost.mT) / torch.trace(weight @ moment @ weight.mT))


def solved(z: Tensor, seed: int = 5, **options: int) -> tuple[VOSolution, Tensor]:
    weight = draw(C, H * D, seed=seed)
    return solve_vo(moments(z), weight, H, **options), weight


@pytest.mark.parametrize("case", [name for name in CASES if name != "zero"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_predicted_error_is_the_error_on_the_tokens_at_every_width(case, has_bias):
    for seed in (0, 100):
        z = CASES[case](correlated(N, H * D, seed))
        solution, weight = solved(z, seed, has_bias=has_bias, sweeps=0)
        assert solution.error.shape == (D + 1,)
        assert solution.error[0] == 1
        assert solution.error[D] == 0
        assert (solution.error.diff() <= 0).all()
        for r in range(1, D + 1):
            factors = solution.at(r)
            assert factors.into[0].shape == (H, r, D)
            assert factors.out.shape == (C, H * r)
            assert float(solution.error[r]) == pytest.approx(exact(solution, r), rel=1e-6, abs=1e-9)
            measured = error(z, weight, dense_weight(factors), factors.bias, centred=has_bias)
            assert measured == pytest.approx(float(solution.error[r]), abs=100 * RIDGE)


@pytest.mark.parametrize("case", CASES)
def test_full_width_keeps_the_weight(case):
    solution, weight = solved(CASES[case](correlated(N, H * D, seed=1)))
    torch.testing.assert_close(dense_weight(solution.at(D)), weight, rtol=1e-7, atol=1e-9)


def test_nothing_to_pass_on_gives_finite_factors():
    solution, _ = solved(torch.zeros(N, H * D, dtype=torch.float64))
    for r in range(1, D + 1):
        factors = solution.at(r)
        assert torch.isfinite(factors.out).all()
        assert not factors.bias.any()


def test_a_layer_that_passes_nothing_on_loses_nothing():
    solution = solve_vo(moments(correlated(N, H * D, seed=1)), torch.zeros(C, H * D), H)
    assert solution.error.tolist() == [0.0] * (D + 1)
    assert not solution.at(2).out.any()


def test_heads_that_choose_alone_are_nested():
    solution, _ = solved(correlated(N, H * D, seed=2), sweeps=0)
    assert torch.equal(solution.at(2).into[0], solution.at(D).into[0][:, :2])


@pytest.mark.parametrize("case", CASES)
def test_rows_are_orthonormal(case):
    solution, _ = solved(CASES[case](correlated(N, H * D, seed=2)))
    for r in range(1, D + 1):
        rows = solution.at(r).into[0]
        assert rows.shape == (H, r, D)
        unit = torch.eye(r, dtype=torch.float64).expand(H, r, r)
        torch.testing.assert_close(rows @ rows.mT, unit, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [name for name in CASES if name != "zero"])
def test_choosing_together_never_errs_more_and_each_sweep_less(case):
    z = CASES[case](correlated(N, H * D, seed=14))
    by_sweeps = [solved(z, sweeps=sweeps)[0] for sweeps in (0, 1, 2, 8)]
    for r in range(1, D):
        found = [exact(solution, r) for solution in by_sweeps]
        assert all(more <= less * (1 + 1e-6) + 1e-9 for less, more in pairwise(found))
        assert found[2] <= float(by_sweeps[2].error[r]) * (1 + 1e-6) + 1e-9
        if case == "plain":
            assert found[2] < 0.95 * found[0]
            assert found[2] < 1.1 * found[3]


def test_no_head_can_choose_better_once_all_have_chosen():
    solution, weight = solved(correlated(N, H * D, seed=15), sweeps=100)
    maps, r = solution.at(3).into[0], 3

    def lost(maps: Tensor) -> float:
        rows = torch.block_diag(*maps)
        kept = weight @ solution.moment @ rows.mT
        explained = kept @ torch.linalg.solve(rows @ solution.moment @ rows.mT, kept.mT)
        return float(torch.trace(weight @ solution.moment @ weight.mT) - torch.trace(explained))

    best = lost(maps)
    for seed in range(20):
        other = maps.clone()
        other[seed % H] += 0.05 * draw(r, D, seed=seed)
        assert lost(other) > best


def test_one_head_has_nobody_to_choose_with():
    z, weight = correlated(N, D, seed=16), draw(C, D, seed=17)
    together, alone = (solve_vo(moments(z), weight, 1, sweeps=sweeps) for sweeps in (2, 0))
    first, second = (solution.at(3).into[0].mT @ solution.at(3).out.mT for solution in (together, alone))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_output_projection_is_the_least_squares_fit_over_all_heads(has_bias):
    z = correlated(N, H * D, seed=3)
    solution, weight = solved(z, has_bias=has_bias)
    for r in (1, 3):
        factors = solution.at(r)
        kept = torch.einsum("nhd,hrd->nhr", z.unflatten(1, (H, D)), factors.into[0]).flatten(1)
        inputs = torch.cat([kept, torch.ones_like(kept[:, :1])], 1) if has_bias else kept
        direct = torch.linalg.lstsq(inputs, z @ weight.mT).solution.mT
        torch.testing.assert_close(factors.out, direct[:, : H * r], rtol=1e-4, atol=1e-4)
        if has_bias:
            torch.testing.assert_close(factors.bias, direct[:, -1], rtol=1e-4, atol=1e-4)
        else:
            assert not factors.bias.any()


@pytest.mark.parametrize("seed", [4, 104])
def test_the_joint_fit_beats_each_head_on_its_own(seed):
    z = correlated(N, H * D, seed)
    solution, weight = solved(z)
    moment = moments(z).covariance
    centred = z - z.mean(0)
    for r in range(1, D):
        alone = error(centred, weight, whitened_vo(weight, moment, H, r))
        joint = error(centred, weight, dense_weight(solution.at(r)))
        assert joint < 0.97 * alone


def test_one_head_reaches_the_eckart_young_optimum():
    z, weight = correlated(N, 8, seed=6), draw(C, 8, seed=7)
    solution = solve_vo(moments(z), weight, 1)
    energies = torch.linalg.svdvals((z - z.mean(0)) @ weight.mT).square()
    for r in range(9):
        assert float(solution.error[r]) == pytest.approx(float(energies[r:].sum() / energies.sum()), abs=5 * RIDGE)


def test_the_mean_of_the_output_is_kept():
    z = CASES["far from zero"](correlated(N, H * D, seed=8))
    solution, weight = solved(z)
    for r in (1, 4):
        factors = solution.at(r)
        slim = z @ dense_weight(factors).mT + factors.bias
        torch.testing.assert_close(slim.mean(0), (z @ weight.mT).mean(0), rtol=1e-9, atol=1e-9)


def test_rotations_inside_heads_and_of_the_output_change_nothing():
    z = correlated(N, H * D, seed=9)
    solution, weight = solved(z)
    turn, _ = torch.linalg.qr(draw(H, D, D, seed=10))
    turn = torch.block_diag(*turn)
    outer, _ = torch.linalg.qr(draw(C, C, seed=11))
    turned = solve_vo(moments(z @ turn.mT), outer @ weight @ turn.mT, H)
    torch.testing.assert_close(turned.error, solution.error, rtol=1e-8, atol=1e-12)
    for r in (1, 3):
        torch.testing.assert_close(
            outer.mT @ dense_weight(turned.at(r)) @ turn, dense_weight(solution.at(r)), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_closed_form_beats_plain_svd_beats_random(seed):
    x = correlated(N, 20, seed)
    w_v, w_o = correlated(H * D, 20, seed + 1), correlated(C, H * D, seed + 2)
    z = x @ w_v.mT
    z = z - z.mean(0)
    solution = solve_vo(moments(z), w_o, H)
    for r in (2, 3):
        ours = error(z, w_o, dense_weight(solution.at(r)))
        plain, random = error(z, w_o, svd_vo(w_v, w_o, H, r)), error(z, w_o, random_vo(w_o, H, r, seed))
        assert ours < plain < random


@pytest.mark.parametrize("case", ["few directions", "dead units", "far from zero", "far and few"])
def test_single_precision_sums_are_good_enough(case):
    """Cross-attention looks mostly at one token, so head outputs lie far from zero compared to how they vary."""
    z = correlated(N, H * D, seed=12)
    z = CASES["far from zero"](CASES["few directions"](z)) if case == "far and few" else CASES[case](z)
    weight = draw(C, H * D, seed=13)
    solution, ideal = solve_vo(accumulated(z), weight, H), solve_vo(moments(z), weight, H)
    torch.testing.assert_close(solution.error, ideal.error, rtol=0, atol=1e-3)
    for r in range(1, D + 1):
        factors = solution.at(r)
        assert error(z, weight, dense_weight(factors), factors.bias) < float(ideal.error[r]) + 1e-3
