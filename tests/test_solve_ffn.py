"""Feed-forward groups: which hidden units to keep, and the projection refitted on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from baselines import CASES, accumulated, correlated, draw, magnitude_ffn, moments, random_ffn
from torch import Tensor
from torch.nn.functional import gelu

from slimdiff.linalg import RIDGE, regularised
from slimdiff.solve import ffn
from slimdiff.solve.solution import Factors

torch.set_num_threads(1)
F, C, N = 21, 6, 400


def hidden(n: int, f: int, seed: int) -> tuple[Tensor, Tensor]:
    """Real hidden units, (n, f), and the GEGLU weight that made them, (2 f, 8)."""
    x = correlated(n, 8, seed)
    w_in = draw(2 * f, 8, seed=seed + 3) * torch.linspace(0.3, 1.5, 2 * f, dtype=torch.float64).roll(seed)[:, None]
    values, gates = (x @ w_in.mT).chunk(2, 1)
    return values * gelu(gates), w_in


def output(u: Tensor, factors: Factors) -> Tensor:
    return u[:, factors.into[0]] @ factors.out.mT + factors.bias


def error(y: Tensor, slim: Tensor, centred: bool = True) -> float:
    return float((slim - y).square().sum() / (y - y.mean(0) if centred else y).square().sum())


def lost_without(moment: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Σ over outputs of the error of the best fit on the kept units, from scratch."""
    total = torch.trace(weight @ moment @ weight.mT)
    if not kept:
        return float(total)
    cross = weight @ moment[:, kept]
    return float(total - torch.trace(cross @ torch.linalg.solve(moment[kept][:, kept], cross.mT)))


def naive_elimination(moment: Tensor, weight: Tensor) -> list[int]:
    """Drop, one by one, the unit whose absence costs least once all others are refitted."""
    alive, dropped = list(range(weight.shape[1])), []
    while alive:
        worst = min(alive, key=lambda j: lost_without(moment, weight, [i for i in alive if i != j]))
        alive.remove(worst)
        dropped.append(worst)
    return dropped


@pytest.mark.parametrize("panel", [1, 4, 64])
@pytest.mark.parametrize("f", [20, 21])
def test_elimination_is_the_greedy_optimum_step_by_step(monkeypatch, panel, f):
    monkeypatch.setattr(ffn, "PANEL", panel)
    for seed in range(3):
        u, _ = hidden(N, f, seed)
        moment, weight = regularised(moments(u).covariance), draw(C, f, seed=seed + 7)
        assert ffn.elimination(moment, weight).tolist() == naive_elimination(moment, weight)


@pytest.mark.parametrize("case", [name for name in CASES if name != "zero"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_predicted_error_is_the_error_on_the_tokens_at_every_width(case, has_bias):
    for seed in (0, 100):
        u = CASES[case](hidden(N, F, seed)[0])
        weight = draw(C, F, seed=seed + 5)
        solution = ffn.solve_ffn(moments(u), weight, has_bias=has_bias)
        assert solution.error.shape == (F + 1,)
        assert solution.error[0] == 1
        assert solution.error[F] == 0
        assert (solution.error.diff() <= 0).all()
        moment = regularised(moments(u).covariance if has_bias else moments(u).second)
        total = lost_without(moment, weight, [])
        for r in range(1, F + 1):
            factors = solution.at(r)
            (kept,) = factors.into
            assert kept.dtype == torch.int64
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert factors.out.shape == (C, r)
            best = lost_without(moment, weight, kept.tolist()) / total
            assert float(solution.error[r]) == pytest.approx(best, rel=1e-6, abs=1e-9)
            measured = error(u @ weight.mT, output(u, factors), centred=has_bias)
            assert measured == pytest.approx(float(solution.error[r]), abs=20 * RIDGE)
            if not has_bias:
                assert not factors.bias.any()


@pytest.mark.parametrize("case", CASES)
def test_full_width_keeps_the_weight_and_the_order_of_units(case):
    weight = draw(C, F, seed=1)
    factors = ffn.solve_ffn(moments(CASES[case](hidden(N, F, seed=2)[0])), weight).at(F)
    assert factors.into[0].tolist() == list(range(F))
    torch.testing.assert_close(factors.out, weight, rtol=1e-7, atol=1e-9)
    assert factors.bias.abs().max() < 1e-6


def test_nothing_to_pass_on_gives_finite_factors():
    solution = ffn.solve_ffn(moments(torch.zeros(N, F, dtype=torch.float64)), draw(C, F, seed=1))
    for r in (1, 10):
        factors = solution.at(r)
        assert torch.isfinite(factors.out).all()
        assert not factors.bias.any()


def test_a_layer_that_passes_nothing_on_loses_nothing():
    solution = ffn.solve_ffn(moments(hidden(N, F, seed=1)[0]), torch.zeros(C, F))
    assert solution.error.tolist() == [0.0] * (F + 1)
    assert not solution.at(2).out.any()


def test_widths_are_nested():
    solution = ffn.solve_ffn(moments(hidden(N, F, seed=3)[0]), draw(C, F, seed=4))
    kept = [set(solution.at(r).into[0].tolist()) for r in range(1, F + 1)]
    assert all(narrow < wide for narrow, wide in pairwise(kept))
    assert sorted(solution.order.tolist()) == list(range(F))


def test_units_that_add_nothing_go_first_and_cost_nothing():
    """A dead unit, one that never changes (the bias takes it over), a copy, and one that nothing reads."""
    u, weight = hidden(N, F, seed=5)[0], draw(C, F, seed=6)
    u[:, 3], u[:, 7], u[:, 11] = 0, 2.5, u[:, 5]
    weight[:, 16] = 0
    solution = ffn.solve_ffn(moments(u), weight)
    dropped = set(solution.order[-4:].tolist())
    assert {3, 7, 16} < dropped
    assert dropped & {5, 11}
    assert float(solution.error[F - 4]) < 20 * RIDGE
    assert float(solution.error[F - 5]) > 40 * RIDGE
    assert error(u @ weight.mT, output(u, solution.at(F - 4))) < 20 * RIDGE


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_projection_is_the_least_squares_fit_on_the_kept_units(has_bias):
    u, weight = hidden(N, F, seed=7)[0], draw(C, F, seed=8)
    factors = ffn.solve_ffn(moments(u), weight, has_bias=has_bias).at(6)
    kept = u[:, factors.into[0]]
    inputs = torch.cat([kept, torch.ones_like(kept[:, :1])], 1) if has_bias else kept
    direct = torch.linalg.lstsq(inputs, u @ weight.mT).solution.mT
    torch.testing.assert_close(factors.out, direct[:, :6], rtol=1e-3, atol=1e-3)
    if has_bias:
        torch.testing.assert_close(factors.bias, direct[:, 6], rtol=1e-3, atol=1e-3)


def test_the_mean_of_the_output_is_kept():
    u, weight = CASES["far from zero"](hidden(N, F, seed=9)[0]), draw(C, F, seed=10)
    solution = ffn.solve_ffn(moments(u), weight)
    for r in (1, 8):
        torch.testing.assert_close(output(u, solution.at(r)).mean(0), (u @ weight.mT).mean(0), rtol=1e-9, atol=1e-9)


def test_neither_the_order_of_units_nor_a_rotation_of_the_output_matters():
    u, weight = hidden(N, F, seed=11)[0], draw(C, F, seed=12)
    shuffled = torch.randperm(F, generator=torch.Generator().manual_seed(13))
    outer, _ = torch.linalg.qr(draw(C, C, seed=14))
    plain = ffn.solve_ffn(moments(u), weight)
    other = ffn.solve_ffn(moments(u[:, shuffled]), outer @ weight[:, shuffled])
    torch.testing.assert_close(other.error, plain.error, rtol=1e-6, atol=1e-10)
    assert sorted(shuffled[other.at(9).into[0]].tolist()) == plain.at(9).into[0].tolist()


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_closed_form_beats_magnitude_beats_random(seed):
    u, w_in = hidden(N, 40, seed)
    weight = draw(C, 40, seed=seed + 5)
    y = u @ weight.mT
    solution = ffn.solve_ffn(moments(u), weight)

    def kept_as_they_are(kept: Tensor) -> float:
        mean = u.mean(0)
        return error(y, (u[:, kept] - mean[kept]) @ weight[:, kept].mT + mean @ weight.mT)

    for r in (20, 30):
        ours = error(y, output(u, solution.at(r)))
        magnitude = kept_as_they_are(magnitude_ffn(w_in, weight, r))
        assert ours < magnitude < kept_as_they_are(random_ffn(40, r, seed))


@pytest.mark.parametrize("case", ["few directions", "dead units", "far from zero", "far and few"])
def test_single_precision_sums_are_good_enough(case):
    u = hidden(N, F, seed=15)[0]
    u = CASES["far from zero"](CASES["few directions"](u)) if case == "far and few" else CASES[case](u)
    weight = draw(C, F, seed=16)
    solution = ffn.solve_ffn(accumulated(u), weight)
    for r in range(1, F + 1):
        measured = error(u @ weight.mT, output(u, solution.at(r)))
        assert measured == pytest.approx(float(solution.error[r]), abs=1e-3)
