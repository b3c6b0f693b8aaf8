"""The field's methods, solved as honestly as slimdiff's own: what they promise, and what they really lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
from baselines import CASES, correlated, draw, heads_of, moments, svd_vo, whitened_vo
from torch import Tensor

from slimdiff.linalg import RIDGE, regularised
from slimdiff.solve.ffn import elimination, leverage, solve_ffn
from slimdiff.solve.heads import head_elimination, solve_heads
from slimdiff.solve.linear import solve_linear
from slimdiff.solve.selection import magnitude, random, select_ffn, select_qk, select_vo, wanda, wanda_qk
from slimdiff.solve.solution import Factors, Solution
from slimdiff.solve.vo import solve_vo
from slimdiff.solve.whitening import whiten_vo

torch.set_num_threads(1)
H, D, C, N = 3, 6, 10, 300


def by_head(x: Tensor) -> Tensor:
    """(n, h d) -> (h, n, d)."""
    return x.unflatten(1, (H, D)).transpose(0, 1)


def second(x: Tensor) -> Tensor:
    """Second moments of tokens, (..., n, d) -> (..., d, d)."""
    return x.mT @ x / x.shape[-2]


def one_head_at_a_time(z: Tensor) -> Tensor:
    """Tokens of which each reaches one head only, so that heads are uncorrelated: (n, h d) -> (h n, h d)."""
    return torch.block_diag(*by_head(z))


def lost(x: Tensor, weight: Tensor, other: Tensor) -> float:
    """Squared error of `x otherᵀ`, relative to the energy of `x weightᵀ`."""
    return float((x @ (other - weight).mT).square().sum() / (x @ weight.mT).square().sum())


def lost_qk(q: Tensor, k: Tensor, factors: Factors) -> float:
    """Relative squared error of the logits of all pairs of a query and a key, (h, n, d) each."""
    logits, (map_q, map_k) = q @ k.mT, factors.into
    return float(((q @ map_q.mT) @ (k @ map_k.mT).mT - logits).square().sum() / logits.square().sum())


def best_fit(x: Tensor, weight: Tensor, seen: Tensor) -> float:
    """What the best linear map loses that sees `seen`, (n, r), in place of the tokens x."""
    y = x @ weight.mT
    return float((y - seen @ torch.linalg.lstsq(seen, y, driver="gelsd").solution).square().sum() / y.square().sum())


def dense_vo(factors: Factors) -> Tensor:
    return (factors.out.unflatten(1, (H, -1)).transpose(0, 1) @ factors.into[0]).transpose(0, 1).flatten(1)


def dense_units(factors: Factors) -> Tensor:
    full = factors.out.new_zeros(C, H * D)
    full[:, factors.into[0]] = factors.out
    return full


def dense_linear(factors: Factors) -> Tensor:
    return factors.out @ factors.into[0]


def dense_heads(factors: Factors) -> Tensor:
    full = factors.out.new_zeros(C, H, D)
    full[:, factors.into[0]] = factors.out.unflatten(1, (-1, D))
    return full.flatten(1)


@dataclass(frozen=True)
class Problem:
    """A baseline on tokens x, (n, h d), and a weight, (C, h d): how it is solved, and what it makes of the weight."""

    solve: Callable[[Tensor, Tensor], Solution]
    dense: Callable[[Factors], Tensor]
    width: int
    falling: bool = True
    tokens: Callable[[Tensor], Tensor] = lambda x: x


PROBLEMS = {
    "whitening": Problem(lambda x, w: whiten_vo(second(by_head(x)), w), dense_vo, D, tokens=one_head_at_a_time),
    "leverage": Problem(lambda x, w: solve_ffn(moments(x), w, False, leverage), dense_units, H * D),
    "linear": Problem(lambda x, w: solve_linear(second(x), w), dense_linear, C),
    "heads": Problem(lambda x, w: solve_heads(second(x), w, H), dense_heads, H),
    "wanda heads": Problem(
        lambda x, w: select_vo(wanda(second(x), w).view(H, D), second(x), w), dense_vo, D, falling=False
    ),
    "random heads": Problem(lambda x, w: select_vo(random(H, D, seed=1), second(x), w), dense_vo, D, falling=False),
    "wanda units": Problem(lambda x, w: select_ffn(wanda(second(x), w), second(x), w), dense_units, H * D, False),
    "random units": Problem(lambda x, w: select_ffn(random(H * D, seed=2), second(x), w), dense_units, H * D, False),
}
ALIVE = [name for name in CASES if name != "zero"]


@pytest.mark.parametrize("case", ALIVE)
@pytest.mark.parametrize("name", PROBLEMS)
def test_predicted_error_is_the_error_on_the_tokens_at_every_width(name, case):
    problem = PROBLEMS[name]
    for seed in (0, 100):
        x, weight = problem.tokens(CASES[case](correlated(N, H * D, seed))), draw(C, H * D, seed=seed + 5)
        solution = problem.solve(x, weight)
        assert solution.error.shape == (problem.width + 1,)
        assert solution.error[0] == 1
        assert solution.error[-1] == 0
        assert not problem.falling or (solution.error.diff() <= 0).all()
        for r in range(1, problem.width + 1):
            factors = solution.at(r)
            assert factors.bias is None or not factors.bias.any()
            measured = lost(x, weight, problem.dense(factors))
            assert measured == pytest.approx(float(solution.error[r]), rel=100 * RIDGE, abs=100 * RIDGE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_full_width_keeps_the_weight(name, case):
    problem, weight = PROBLEMS[name], draw(C, H * D, seed=2)
    factors = problem.solve(problem.tokens(CASES[case](correlated(N, H * D, seed=1))), weight).at(problem.width)
    torch.testing.assert_close(problem.dense(factors), weight, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_to_pass_on_gives_finite_factors(name):
    problem, weight = PROBLEMS[name], draw(C, H * D, seed=3)
    solution = problem.solve(torch.zeros(N, H * D, dtype=torch.float64), weight)
    assert torch.isfinite(solution.error).all()
    for r in range(1, problem.width + 1):
        assert torch.isfinite(problem.dense(solution.at(r))).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_layer_that_passes_nothing_on_loses_nothing(name):
    problem = PROBLEMS[name]
    solution = problem.solve(correlated(N, H * D, seed=4), torch.zeros(C, H * D, dtype=torch.float64))
    assert solution.error.tolist() == [0.0] * (problem.width + 1)
    assert not problem.dense(solution.at(1)).any()


@pytest.mark.parametrize("name", PROBLEMS)
def test_weights_of_half_precision_are_solved_in_double(name):
    problem, weight = PROBLEMS[name], draw(C, H * D, seed=5).half()
    x = correlated(N, H * D, seed=6)
    half, double = problem.solve(x, weight), problem.solve(x, weight.double())
    assert torch.equal(half.error, double.error)
    assert torch.equal(problem.dense(half.at(2)), problem.dense(double.at(2)))


@pytest.mark.parametrize("case", ALIVE)
@pytest.mark.parametrize("choice", ["wanda", "random"])
def test_predicted_error_is_the_error_of_the_logits(choice, case):
    for seed in (0, 100):
        q, k = (by_head(CASES[case](correlated(N, H * D, s))) for s in (seed, seed + 10))
        scores = wanda_qk(second(q), second(k)) if choice == "wanda" else random(H, D, seed=seed)
        solution = select_qk(scores, second(q), second(k))
        assert (solution.error[0], solution.error[-1], len(solution.error)) == (1, 0, D + 1)
        for r in range(1, D + 1):
            measured = lost_qk(q, k, solution.at(r))
            assert measured == pytest.approx(float(solution.error[r]), rel=100 * RIDGE, abs=100 * RIDGE)
        assert all(torch.equal(m, torch.eye(D, dtype=torch.float64).expand(H, D, D)) for m in solution.at(D).into)


def test_nothing_to_attend_to_loses_nothing():
    zero, keys = torch.zeros(H, D, D), second(by_head(correlated(N, H * D, seed=7)))
    for a, b in ((zero, zero), (zero, keys), (keys, zero)):
        assert select_qk(wanda_qk(a, b), a, b).error.tolist() == [0.0] * (D + 1)


# Each head on its own: whitening


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_no_other_directions_serve_uncorrelated_heads_better(seed):
    """Neither random ones nor neighbours of the solution, even with the output projection refitted on them."""
    x, weight = one_head_at_a_time(correlated(N, H * D, seed)), draw(C, H * D, seed=seed + 5)
    solution = whiten_vo(second(by_head(x)), weight)
    for r in range(1, D):
        found = solution.at(r).into[0]
        assert best_fit(x, weight, x @ torch.block_diag(*found).mT) == pytest.approx(
            lost(x, weight, dense_vo(solution.at(r))), abs=RIDGE
        )  # nothing is left to refit
        for trial in range(5):
            noise = draw(H, r, D, seed=seed + trial + 40)
            for maps in (noise, found + 0.1 * found.norm() / noise.norm() * noise):
                assert best_fit(x, weight, x @ torch.block_diag(*maps).mT) > float(solution.error[r])


@pytest.mark.parametrize("seed", [8, 108])
def test_the_joint_fit_is_never_worse_than_whitening(seed):
    x, weight = correlated(N, H * D, seed), draw(C, H * D, seed=seed + 5)
    alone, joint = whiten_vo(second(by_head(x)), weight), solve_vo(moments(x), weight, H, has_bias=False)
    for r in range(1, D + 1):
        ours, theirs = (lost(x, weight, dense_vo(solution.at(r))) for solution in (joint, alone))
        assert ours < (0.97 * theirs if r < D else RIDGE)


def test_whitening_is_the_truncated_svd_of_each_head():
    x, weight = correlated(N, H * D, seed=9), draw(C, H * D, seed=10)
    solution = whiten_vo(second(by_head(x)), weight)
    for r in range(1, D + 1):
        expected = whitened_vo(weight, torch.block_diag(*regularised(second(by_head(x)))), H, r)
        torch.testing.assert_close(dense_vo(solution.at(r)), expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(solution.at(2).into[0], solution.at(D).into[0][:, :2])


def test_whitening_by_the_weights_is_the_plain_svd_of_their_product():
    w_v, w_o = draw(H * D, 20, seed=11), draw(C, H * D, seed=12)
    values = heads_of(w_v, H)
    solution = whiten_vo(values @ values.mT, w_o)
    energies = torch.linalg.svdvals(heads_of(w_o.mT, H).mT @ values).square()
    for r in range(1, D + 1):
        torch.testing.assert_close(dense_vo(solution.at(r)), svd_vo(w_v, w_o, H, r), rtol=1e-4, atol=1e-4)
        assert float(solution.error[r]) == pytest.approx(float(energies[:, r:].sum() / energies.sum()), abs=5 * RIDGE)


def test_a_head_without_values_costs_nothing():
    x, weight = CASES["a dead head"](correlated(N, H * D, seed=13)), draw(C, H * D, seed=14)
    with_it = whiten_vo(second(by_head(x)), weight).error
    without = whiten_vo(second(by_head(x))[1:], weight[:, D:]).error
    torch.testing.assert_close(with_it, without, rtol=1e-12, atol=0)


def test_fewer_outputs_than_dimensions_need_no_more_directions_than_outputs():
    x, weight = one_head_at_a_time(correlated(N, H * D, seed=15)), draw(2, H * D, seed=16)
    solution = whiten_vo(second(by_head(x)), weight)
    assert float(solution.error[1]) > 0.01
    assert (solution.error[2:] < 1e-12).all()
    torch.testing.assert_close(dense_vo(solution.at(D)), weight, rtol=1e-7, atol=1e-8)


# Nyström by leverage


def test_leverage_is_the_formula_and_does_not_know_the_weight_or_the_scale():
    moment, weight = regularised(moments(correlated(N, 30, seed=17)).covariance), draw(C, 30, seed=18)
    ridge = moment.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    scores = (moment @ torch.linalg.inv(moment + ridge)).diagonal()
    order = leverage(moment, weight)
    assert order.tolist() == scores.argsort().tolist()
    assert torch.equal(leverage(1e-3 * moment, weight), order)
    loud = weight * torch.linspace(1, 100, 30, dtype=torch.float64)
    assert torch.equal(leverage(moment, loud), order)
    assert not torch.equal(elimination(moment, loud), elimination(moment, weight))


@pytest.mark.parametrize("has_bias", [True, False])
def test_elimination_is_better_than_leverage_and_the_default(has_bias):
    for seed in range(0, 60, 20):
        u, weight = correlated(N, 40, seed), draw(C, 40, seed=seed + 5)
        greedy = solve_ffn(moments(u), weight, has_bias)
        assert torch.equal(greedy.order, solve_ffn(moments(u), weight, has_bias, elimination).order)
        scored = solve_ffn(moments(u), weight, has_bias, leverage)
        assert (greedy.error <= scored.error + 1e-9).all()
        assert float(greedy.error[20]) < 0.9 * float(scored.error[20])


def test_leverage_refits_the_projection_on_the_units_of_highest_score():
    u, weight = correlated(N, H * D, seed=19), draw(C, H * D, seed=20)
    solution = solve_ffn(moments(u), weight, choose=leverage)
    for r in (1, 7, 17):
        factors = solution.at(r)
        (kept,) = factors.into
        assert kept.tolist() == sorted(leverage(regularised(moments(u).covariance), weight)[H * D - r :].tolist())
        ones = torch.ones(N, 1, dtype=torch.float64)
        direct = torch.linalg.lstsq(torch.cat([u[:, kept], ones], 1), u @ weight.mT).solution.mT
        torch.testing.assert_close(factors.out, direct[:, :-1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(factors.bias, direct[:, -1], rtol=1e-3, atol=1e-3)


# One matrix on its own


@pytest.mark.parametrize("shape", [(10, 18), (18, 10), (12, 12)], ids=["wide", "tall", "square"])
def test_one_matrix_reaches_the_eckart_young_optimum(shape):
    x, weight = correlated(N, shape[1], seed=21), draw(*shape, seed=22)
    solution = solve_linear(second(x), weight)
    energies = torch.linalg.svdvals(x @ weight.mT).square()
    full = min(shape)
    assert solution.error.shape == (full + 1,)
    for r in range(1, full + 1):
        factors = solution.at(r)
        assert factors.into[0].shape == (r, shape[1])
        assert factors.out.shape == (shape[0], r)
        assert float(solution.error[r]) == pytest.approx(float(energies[r:].sum() / energies.sum()), abs=5 * RIDGE)
    torch.testing.assert_close(dense_linear(solution.at(full)), weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_whitened_truncation_beats_plain_truncation(seed):
    x, weight = correlated(N, 18, seed), draw(14, 18, seed=seed + 5)
    ours, plain = solve_linear(second(x), weight), solve_linear(torch.eye(18), weight)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for r in range(1, 14):
        truncated = u[:, :r] * s[:r] @ vh[:r]
        torch.testing.assert_close(dense_linear(plain.at(r)), truncated, rtol=1e-9, atol=1e-9)
        assert lost(x, weight, dense_linear(ours.at(r))) < 0.95 * lost(x, weight, truncated)


# Whole heads


def lost_without(x: Tensor, weight: Tensor, gone: list[int], heads: int) -> float:
    kept = [i for i in range(heads) if i not in gone]
    return best_fit(x, weight, x.unflatten(1, (heads, -1))[:, kept].flatten(1)) if kept else 1.0


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_heads_go_in_the_greedy_order_and_cost_what_the_refit_loses(seed):
    heads = 5
    x = correlated(N, heads * 4, seed) * torch.linspace(1, 2, heads, dtype=torch.float64).repeat_interleave(4)
    weight = draw(C, heads * 4, seed=seed + 5)
    solution = solve_heads(second(x), weight, heads)
    gone: list[int] = []
    for _ in range(heads):
        alive = [i for i in range(heads) if i not in gone]
        gone.append(min(alive, key=lambda i: lost_without(x, weight, [*gone, i], heads)))
        assert float(solution.error[heads - len(gone)]) == pytest.approx(
            lost_without(x, weight, gone, heads), abs=20 * RIDGE
        )
    assert solution.order.flip(0).tolist() == gone
    assert torch.equal(head_elimination(regularised(second(x)), weight, heads).flip(0), solution.order)


def test_the_projection_is_refitted_on_the_kept_heads():
    x, weight = correlated(N, H * D, seed=23), draw(C, H * D, seed=24)
    solution = solve_heads(second(x), weight, H)
    for r in range(1, H + 1):
        factors = solution.at(r)
        (kept,) = factors.into
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(solution.order[:r].tolist())
        seen = x.unflatten(1, (H, D))[:, kept].flatten(1)
        direct = torch.linalg.lstsq(seen, x @ weight.mT).solution.mT
        torch.testing.assert_close(factors.out, direct, rtol=1e-3, atol=1e-3)


def test_compensation_tells_a_copy_from_a_head_of_its_own():
    """A dead head and one of two loud ones that say the same cost less than a faint head of its own."""
    x = correlated(N, 4 * D, seed=25).unflatten(1, (4, D)) * torch.tensor([1.0, 0.3, 1.0, 1.0])[:, None]
    x[:, 2] = x[:, 0] @ draw(D, D, seed=26)
    x[:, 3] = 0
    solution = solve_heads(second(x.flatten(1)), draw(C, 4 * D, seed=27), 4)
    assert set(solution.order[:2].tolist()) in ({0, 1}, {1, 2})
    assert float(solution.error[2]) < 20 * RIDGE < float(solution.error[1])


# Keeping some dimensions


def test_each_head_keeps_its_own_dimensions_of_highest_score():
    x, weight = correlated(N, H * D, seed=28), draw(C, H * D, seed=29)
    scores = random(H, D, seed=30)
    outgoing = select_vo(scores, second(x), weight)
    logits = select_qk(scores, second(by_head(x)), second(by_head(x)))
    for r in range(1, D + 1):
        best = [sorted(range(D), key=lambda j: -float(row[j]))[:r] for row in scores]
        expected = torch.stack([torch.eye(D, dtype=torch.float64)[sorted(kept)] for kept in best])
        (maps,), out = outgoing.at(r).into, outgoing.at(r).out
        assert torch.equal(maps, expected)
        assert torch.equal(out, weight[:, [i * D + j for i in range(H) for j in sorted(best[i])]])
        assert all(torch.equal(m, expected) for m in logits.at(r).into)
        assert logits.at(r).out is None


def test_units_of_highest_score_are_kept_and_widths_are_nested():
    x, weight, scores = correlated(N, H * D, seed=31), draw(C, H * D, seed=32), random(H * D, seed=33)
    solution = select_ffn(scores, second(x), weight)
    kept = [solution.at(r).into[0] for r in range(1, H * D + 1)]
    assert all(set(narrow.tolist()) < set(wide.tolist()) for narrow, wide in pairwise(kept))
    for r, units in enumerate(kept, 1):
        assert units.dtype == torch.int64
        assert units.tolist() == sorted(scores.topk(r).indices.tolist())
        assert torch.equal(solution.at(r).out, weight[:, units])


def test_two_units_that_cancel_are_worth_more_apart_than_their_sum():
    """The error is the true one: it counts what dropped units have in common, and may rise with the width."""
    x = correlated(N, 3, seed=34)
    x[:, 1] = 0.01 * x[:, 1] - x[:, 0]
    weight = draw(C, 1, seed=35).repeat(1, 3)
    solution = select_ffn(torch.tensor([3.0, 1.0, 2.0]), second(x), weight)
    assert solution.order.tolist() == [0, 2, 1]
    for r in (1, 2):
        assert float(solution.error[r]) == pytest.approx(lost(x, weight, _padded(solution.at(r), 3)), rel=1e-3)
    assert float(solution.error[2]) > 1


def _padded(factors: Factors, f: int) -> Tensor:
    full = factors.out.new_zeros(C, f)
    full[:, factors.into[0]] = factors.out
    return full


def test_wanda_is_the_loss_of_dropping_one_dimension_alone():
    x, weight = correlated(N, H * D, seed=36), draw(C, H * D, seed=37)
    energy = (x @ weight.mT).square().sum() / N
    for j, score in enumerate(wanda(second(x), weight)):
        without = weight.clone()
        without[:, j] = 0
        assert float(score.square() / energy) == pytest.approx(lost(x, weight, without), rel=1e-9)
    q, k = by_head(x), by_head(correlated(N, H * D, seed=38))
    terms = q[:, :, None] * k[:, None]  # (h, n, n, d)
    torch.testing.assert_close(wanda_qk(second(q), second(k)), terms.square().mean((1, 2)).sqrt())


def test_wanda_minds_the_activations_and_magnitude_the_weights():
    w_in, w_out = draw(2 * H * D, 8, seed=39), draw(C, H * D, seed=40)
    sides = torch.cat(w_in.chunk(2), 1), w_out.mT
    x = correlated(N, H * D, seed=41)
    quiet, loud = x.clone(), x.clone()
    quiet[:, 5] *= 1e-3
    loud[:, 5] *= 1e3
    assert wanda(second(quiet), w_out).argmin() == 5 == wanda(second(loud), w_out).argmax()
    weights = magnitude(*sides)
    for j in (0, 11):
        rows = [w_in[j], w_in[j + H * D]]
        expected = (rows[0].square().sum() + rows[1].square().sum()).sqrt() * w_out[:, j].norm()
        assert float(weights[j]) == pytest.approx(float(expected))
    # What is loud in the weights is not loud in the tokens, and the two choose differently.
    faint = x / weights
    by_weight, by_loss = (select_ffn(s, second(faint), w_out) for s in (weights, wanda(second(faint), w_out)))
    assert by_weight.at(6).into[0].tolist() != by_loss.at(6).into[0].tolist()
    assert float(by_loss.error[6]) < float(by_weight.error[6])


def test_moving_scale_from_one_side_to_the_other_changes_no_score():
    w_v, w_o, x = draw(H * D, 8, seed=42), draw(C, H * D, seed=43), correlated(N, H * D, seed=44)
    scale = torch.linspace(0.1, 10, H * D, dtype=torch.float64)
    torch.testing.assert_close(magnitude(w_v * scale[:, None], (w_o / scale).mT), magnitude(w_v, w_o.mT))
    torch.testing.assert_close(wanda(second(x * scale), w_o / scale), wanda(second(x), w_o))


def test_random_scores_go_by_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = random(H, D, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(random(H, D, seed=7), first)
    assert first.shape == (H, D)
    draws = [random(100, seed=seed).argsort().tolist() for seed in range(4)]
    assert all(a != b for a, b in combinations(draws, 2))


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_closed_form_beats_wanda_beats_random(seed):
    u = correlated(N, 40, seed) * torch.linspace(0.2, 2, 40, dtype=torch.float64)
    weight = draw(C, 40, seed=seed + 5)
    chosen = select_ffn(wanda(second(u), weight), second(u), weight)
    for r in (10, 20, 30):
        blind = sum(float(select_ffn(random(40, seed=s), second(u), weight).error[r]) for s in range(5)) / 5
        assert float(solve_ffn(moments(u), weight, has_bias=False).error[r]) < float(chosen.error[r]) < blind
