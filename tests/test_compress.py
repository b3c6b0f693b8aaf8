"""Compression end to end on a tiny pipeline: identity, budgets, exactness, and better than what is simpler."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import noise, noise_when_cut, tiny_pipeline, tiny_unet

import slimdiff.probing
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut, make_plan
from slimdiff.errors import BudgetError, StatisticsError
from slimdiff.groups import KINDS, find_groups
from slimdiff.guidance import guided
from slimdiff.recipe import Recipe
from slimdiff.source import Source
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build
from slimdiff.widths import allowed_widths, width_step

WORDS = tuple(f"{size} {what}" for size in ("big", "tiny", "old") for what in ("cat", "red boat", "hill"))
RECIPE = Recipe("sd1", WORDS, ("",) * len(WORDS), 4, 3.0, 16, 16)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress")
    pipe = tiny_pipeline(folder / "tokenizer", tiny_unet(sample_size=8))
    collect(pipe, Source("tiny", "tiny", None), RECIPE, folder / "s.safetensors", batch_size=9)
    return pipe, StatisticsFile(folder / "s.safetensors")


def test_budget_zero_is_the_identity_bit_for_bit(calibrated):
    pipe, statistics = calibrated
    slim, plan = cut(pipe, statistics, Options(0.0))
    assert plan.ranks() == {} and plan.achieved == 0
    dense = pipe.unet.state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in slim.state_dict().items())
    assert torch.equal(noise(slim), noise(pipe.unet))


@pytest.mark.parametrize(
    ("of", "independent", "kinds"),
    [
        ("groups", False, KINDS),
        ("groups", True, KINDS),
        ("macs", False, KINDS),
        ("unet", False, KINDS),
        ("groups", False, ("ffn",)),
        ("groups", False, ("vo",)),
    ],
)
@pytest.mark.parametrize("budget", [0.1, 0.35, 0.5])
def test_budget_is_met_and_overshoots_by_at_most_one_step(calibrated, budget, of, independent, kinds):
    if of == "unet":
        budget /= 3
    pipe, statistics = calibrated
    options = Options(budget, of=of, kinds=kinds, independent_ranks=independent, influence="local")
    slim, plan = cut(pipe, statistics, options)
    assert plan.achieved >= budget
    groups = {g.name: g for g in find_groups(pipe.unet)}
    params = sum(p.numel() for p in slim.parameters())
    assert params == plan.unet_params[1]
    removed = sum(p.numel() for p in pipe.unet.parameters()) - params
    assert removed == sum(e.params[0] - e.params[1] for e in plan.entries)
    if of == "groups":
        total = sum(e.params[0] for e in plan.entries)
        largest = max(2 * width_step(groups[e.group], None) * groups[e.group].params_per_width for e in plan.entries)
        assert removed / total == pytest.approx(plan.achieved)
        assert removed - budget * total < largest


def test_tied_widths_are_equal_and_independent_ones_need_not_be(calibrated):
    pipe, statistics = calibrated
    for independent in (False, True):
        plan, _ = make_plan(pipe, statistics, Options(0.4, independent_ranks=independent, influence="local"))
        by_layer: dict[str, set[int]] = {}
        for entry in plan.entries:
            if entry.kind != "ffn":
                by_layer.setdefault(entry.group.rpartition(".")[0], set()).add(entry.rank)
        assert independent or all(len(ranks) == 1 for ranks in by_layer.values())


def test_free_widths_predict_no_more_error_than_tied_ones(calibrated):
    pipe, statistics = calibrated
    tied, _ = make_plan(pipe, statistics, Options(0.4, influence="local"))
    free, _ = make_plan(pipe, statistics, Options(0.4, influence="local", independent_ranks=True))
    assert sum(e.local_error for e in free.entries) <= sum(e.local_error for e in tied.entries)


def test_impossible_budget_shows_the_arithmetic(calibrated):
    pipe, statistics = calibrated
    with pytest.raises(BudgetError, match=r"60.0% of the UNet's .* parameters .* --budget 0\.\d+"):
        cut(pipe, statistics, Options(0.6, of="unet"))
    with pytest.raises(BudgetError) as refusal:
        cut(pipe, statistics, Options(0.95))
    most = float(str(refusal.value).split()[-1][:-1])
    _, plan = cut(pipe, statistics, Options(most, influence="local"))
    assert plan.achieved >= most


@pytest.mark.parametrize("budget", [-0.1, 1.0, 1.2, float("nan")])
def test_budgets_that_are_no_share(budget):
    with pytest.raises(BudgetError, match="below 1"):
        Options(budget)


def test_slim_outputs_come_near_and_nearer_with_more_width(calibrated):
    pipe, statistics = calibrated
    dense = noise(pipe.unet)
    errors = []
    for budget in (0.15, 0.4, 0.7):
        slim, _ = cut(pipe, statistics, Options(budget, influence="local"))
        errors.append(float((noise(slim) - dense).square().sum() / dense.square().sum()))
    assert errors == sorted(errors) and errors[0] < 0.01


def test_slim_and_padded_weights_are_the_same_function(calibrated):
    """A slim layer computes what the dense layer computes with the same factors in padded form."""
    pipe, statistics = calibrated
    plan, solutions = make_plan(pipe, statistics, Options(0.5, influence="local"))
    groups = [g for g in find_groups(pipe.unet) if g.name in plan.ranks()]
    slim = noise(build(pipe.unet, plan.ranks(), solutions))
    padded = noise_when_cut(pipe.unet, groups, plan.ranks(), solutions)
    assert torch.allclose(slim, padded, atol=1e-5)


def test_probing_is_cached_and_later_budgets_are_free(calibrated, monkeypatch):
    pipe, statistics = calibrated
    cut(pipe, statistics, Options(0.3, probe_prompts=2, probe_steps=2))
    monkeypatch.setattr(slimdiff.probing, "sample", lambda *a, **k: pytest.fail("probed again"))
    _, plan = cut(pipe, statistics, Options(0.5, probe_prompts=2, probe_steps=2))
    assert any(entry.final_error != entry.local_error for entry in plan.entries)


def test_refine_lowers_the_held_out_error_or_changes_nothing(calibrated):
    pipe, statistics = calibrated
    plain, _ = cut(pipe, statistics, Options(0.5, influence="local"))
    refined, plan = cut(pipe, statistics, Options(0.5, influence="local", refine=True))
    assert plan.refits and all(ratio <= 1 for ratio in plan.refits.values())
    states = statistics.states()
    chosen = list(range(0, len(states.prompts), 5))
    arguments = states.batch(chosen, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        dense, a, b = (
            guided(unet(**arguments).sample, len(chosen), statistics.recipe.guidance_scale)
            for unet in (pipe.unet, plain, refined)
        )
    assert (b - dense).square().sum() < (a - dense).square().sum()


def test_the_refitted_output_is_nearer_to_the_dense_guided_prediction(calibrated):
    """On the states that judge, by as much as the plan says; the dense UNet keeps its own."""
    pipe, statistics = calibrated
    states, scale = statistics.states(), statistics.recipe.guidance_scale
    judges = set(sorted(set(states.prompts))[2::3])
    held = [i for i, prompt in enumerate(states.prompts) if prompt in judges]
    options = Options(0.7, influence="local")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    refitted, plan = cut(pipe, statistics, options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    plan_alone, solutions = make_plan(pipe, statistics, options)
    plain = build(pipe.unet, plan_alone.ranks(), solutions)
    arguments = states.batch(held, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        dense, a, b = (guided(unet(**arguments).sample, len(held), scale) for unet in (pipe.unet, plain, refitted))
    ratio = float((b - dense).square().sum() / (a - dense).square().sum())
    assert ratio == pytest.approx(plan.refits["conv_out"], rel=1e-3) and ratio < 1


def test_statistics_of_other_groups_are_refused(calibrated):
    _, statistics = calibrated
    other = tiny_pipeline(Path(statistics.path).parent / "tokenizer", tiny_unet(layers_per_block=2))
    with pytest.raises(StatisticsError, match="no tokens"):
        cut(other, statistics, Options(0.3))


def test_steps_of_width():
    group = find_groups(tiny_unet())[0]
    steps = {d: width_step(replace(group, width=d), None) for d in (8, 16, 40, 64, 80, 160)}
    assert steps == {8: 1, 16: 2, 40: 8, 64: 8, 80: 8, 160: 8}
    ffn = replace(group, kind="ffn", width=1280)
    assert width_step(ffn, None) == 32 and width_step(replace(ffn, width=5120), None) == 64 and width_step(ffn, 4) == 32
    assert list(itertools.islice(allowed_widths(replace(group, width=40), Options(0.3)), 3)) == [40, 32, 24]
