"""ResNet groups: which channels stay, the refit against brute force, and the norm that changes with its groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, silu, unfold

from slimdiff.linalg import RIDGE
from slimdiff.patches import Patches, PatchMoments
from slimdiff.solve import ffn
from slimdiff.solve.resnet import Pictures, ResnetSolution, Trial, renormed, solve_resnet

torch.set_num_threads(1)
GROUPS, SIZE, OUT = 3, 4, 5
C = GROUPS * SIZE


def inputs(seed: int = 0, n: int = 40, side: int = 6) -> Tensor:
    """Channels in front of the norm, (n, C, side, side): few fields, each of another strength in every picture."""
    always = torch.Generator().manual_seed(99)
    mixing, levels = torch.randn(C, 4, generator=always), torch.randn(C, 1, 1, generator=always)
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.randn(n, 4, 1, 1, generator=generator).abs()
    fields = strengths * torch.randn(n, 4, side, side, generator=generator)
    own = 0.1 * torch.randn(n, C, side, side, generator=generator)
    return torch.einsum("cf,nfhw->nchw", mixing, fields) + 2 * levels + own


def hidden(x: Tensor) -> Tensor:
    return silu(group_norm(x, GROUPS))


def weights(seed: int = 1) -> Tensor:
    return torch.randn(OUT, C, 3, 3, generator=torch.Generator().manual_seed(seed))


def moments(h: Tensor) -> PatchMoments:
    patches = Patches(h.shape[1])
    patches.add(h)
    return patches.moments()


def solved(h: Tensor, weight: Tensor) -> ResnetSolution:
    found = moments(h)
    return solve_resnet(lambda: (found, weight), GROUPS)


def rows(h: Tensor, border: int = 1) -> Tensor:
    return unfold(h.double(), 3, padding=border).transpose(1, 2).flatten(0, 1)


def output(h: Tensor, factors) -> Tensor:
    """(n, OUT, H, W), float64, from the kept channels."""
    return conv2d(h.double(), factors.out.unflatten(1, (-1, 3, 3)), factors.bias, padding=1)


def relative(found: Tensor, wanted: Tensor) -> float:
    spread = wanted - wanted.mean((0, 2, 3), keepdim=True)
    return float((found - wanted).square().sum() / spread.square().sum())


def test_full_width_is_exact():
    x, weight = inputs(), weights()
    seen = x.double().flatten(2)
    pictures = Pictures(seen.mean(2), seen.square().mean(2), 1e-5)
    solution = solved(hidden(x), weight)
    factors = replace(solution, pictures=pictures).at(SIZE)
    assert factors.into[0].tolist() == list(range(C))
    torch.testing.assert_close(factors.out, weight.double().flatten(1), rtol=1e-6, atol=1e-6)
    assert factors.bias.abs().max() < 1e-5
    torch.testing.assert_close(factors.norm[0], torch.ones(C, dtype=torch.float64), rtol=1e-4, atol=0)
    assert factors.norm[1].abs().max() < 1e-4
    assert solution.error[0] == 1
    assert solution.error[SIZE] == 0


def test_every_group_of_the_norm_keeps_as_many_channels_and_widths_are_nested():
    solution = solved(hidden(inputs()), weights())
    kept = [solution.at(r).into[0] for r in range(1, SIZE + 1)]
    for r, channels in enumerate(kept, 1):
        assert torch.bincount(channels // SIZE, minlength=GROUPS).tolist() == [r] * GROUPS
        assert channels.dtype == torch.int64
    assert all(set(narrow.tolist()) < set(wide.tolist()) for narrow, wide in pairwise(kept))
    assert (solution.error.diff() < 0).all()


@pytest.mark.parametrize("panel", [2, 5, 128])
def test_balanced_elimination_is_greedy_among_the_groups_that_have_not_lost_one(monkeypatch, panel):
    monkeypatch.setattr(ffn, "PANEL", panel)
    moment = moments(hidden(inputs())).pixels.covariance[0] + 1e-3 * torch.eye(C, dtype=torch.float64)
    taps = weights().double().flatten(2).permute(0, 2, 1).flatten(0, 1)

    def lost(kept: list[int]) -> float:
        cross = taps @ moment[:, kept]
        return float(-torch.trace(cross @ torch.linalg.solve(moment[kept][:, kept], cross.mT))) if kept else 0.0

    alive, expected = list(range(C)), []
    while alive:
        turn = set(range(GROUPS))
        while turn:
            free = [j for j in alive if j // SIZE in turn]
            j = min(free, key=lambda j: lost([i for i in alive if i != j]))
            alive.remove(j)
            turn.remove(j // SIZE)
            expected.append(j)
    assert ffn.elimination(moment, taps, GROUPS).tolist() == expected


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_refit_is_least_squares_over_the_patches_and_those_on_the_border(r):
    """With what it predicts as its error; the outputs on the border, which nobody reads, are to be kept as well."""
    h, weight = hidden(inputs()), weights()
    solution = solved(h, weight)
    factors = solution.at(r)
    kept, flat = factors.into[0], weight.double().flatten(1)
    inner, outer, count = rows(h), rows(h, border=2), h.shape[0] * h.shape[2] * h.shape[3]
    mean, kept_mean = inner.mean(0), rows(h[:, kept]).mean(0)
    gram = outer.mT @ outer - count * mean[:, None] * mean
    columns = (9 * kept[:, None] + torch.arange(9)).flatten()
    direct = torch.linalg.solve(gram[columns][:, columns], gram[columns] @ flat.mT).mT
    torch.testing.assert_close(factors.out, direct, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(factors.bias, flat @ mean - factors.out @ kept_mean, rtol=1e-4, atol=1e-5)
    difference = flat - torch.zeros_like(flat).index_copy(1, columns, factors.out)
    error = torch.trace(difference @ gram @ difference.mT) / torch.trace(flat @ gram @ flat.mT)
    assert float(solution.error[r]) == pytest.approx(float(error), abs=50 * RIDGE)


@pytest.mark.parametrize("side", [3, 6, 12])
def test_the_border_costs_little_against_exact_least_squares(side):
    """On the patches inside alone, for which the fit over the border as well is not quite the best."""
    h, weight = hidden(inputs(n=120, side=side)), weights()
    factors = solved(h, weight).at(2)
    kept = factors.into[0]
    wanted = conv2d(h.double(), weight.double(), padding=1)
    seen = torch.cat([rows(h[:, kept]), torch.ones(h.shape[0] * side * side, 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(seen, wanted.flatten(2).transpose(1, 2).flatten(0, 1)).solution
    best = (seen @ exact).view(h.shape[0], side, side, OUT).permute(0, 3, 1, 2)
    least, ours = relative(best, wanted), relative(output(h[:, kept], factors), wanted)
    plain = conv2d(h[:, kept].double(), weight[:, kept].double(), padding=1)
    plain += (wanted - plain).mean((0, 2, 3), keepdim=True)
    assert least <= ours <= 1.15 * least
    assert ours < 0.8 * relative(plain, wanted), "the refit pays"


def test_the_mean_of_the_output_is_kept():
    h, weight = hidden(inputs()), weights()
    factors = solved(h, weight).at(1)
    wanted = conv2d(h.double(), weight.double(), padding=1).mean((0, 2, 3))
    torch.testing.assert_close(output(h[:, factors.into[0]], factors).mean((0, 2, 3)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_renormed_is_the_best_scale_and_shift_of_every_channel(r):
    x = inputs()
    seen = x.double().flatten(2)
    kept = torch.cat([torch.randperm(SIZE, generator=torch.Generator().manual_seed(g))[:r].sort().values + g * SIZE
                      for g in range(GROUPS)])  # fmt: skip
    scale, shift = renormed(Pictures(seen.mean(2), seen.square().mean(2), 1e-5), kept, GROUPS)
    dense, slim = (
        y.double().transpose(0, 1).flatten(1) for y in (group_norm(x, GROUPS)[:, kept], group_norm(x[:, kept], GROUPS))
    )
    for channel in range(len(kept)):
        design = torch.stack([slim[channel], torch.ones_like(slim[channel])], 1)
        direct = torch.linalg.lstsq(design, dense[channel][:, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([scale[channel], shift[channel]]), direct, rtol=1e-3, atol=1e-3)


def trial(cut: Tensor, dense: Tensor, weight: Tensor) -> Trial:
    full = conv2d(dense.double(), weight.double(), padding=2)
    count = dense.shape[0] * dense.shape[2] * dense.shape[3]
    products = full.flatten(2).transpose(0, 1).flatten(1) @ rows(cut, border=2)
    return Trial(moments(cut), products / count, full[:, :, 1:-1, 1:-1].sum((0, 2, 3)) / count)


def test_a_trial_makes_good_what_the_narrow_norm_does():
    x, fresh, weight = inputs(n=80), inputs(seed=5, n=80), weights()
    solution = solved(hidden(x), weight)
    kept = solution.at(2).into[0]
    tried = solution.after({2: trial(hidden(x[:, kept]), hidden(x), weight)})
    assert torch.equal(tried.at(2).into[0], kept)
    assert torch.equal(tried.at(3).out, solution.at(3).out), "other widths are as they were"
    for pictures in (x, fresh):
        wanted = conv2d(hidden(pictures).double(), weight.double(), padding=1)
        before, after = (relative(output(hidden(pictures[:, kept]), s.at(2)), wanted) for s in (solution, tried))
        assert after < 0.9 * before


def test_a_trial_that_shows_nothing_new_changes_nothing():
    h, weight = hidden(inputs()), weights()
    solution = solved(h, weight)
    kept = solution.at(2).into[0]
    tried = solution.after({2: trial(h[:, kept], h, weight)}).at(2)
    torch.testing.assert_close(tried.out, solution.at(2).out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tried.bias, solution.at(2).bias, rtol=1e-3, atol=1e-3)


def test_dead_channels_give_finite_factors():
    solution = solved(torch.zeros(2, C, 4, 4), weights())
    factors = solution.at(2)
    assert torch.isfinite(factors.out).all()
    assert not factors.bias.any()
