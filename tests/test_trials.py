"""ResNet groups from calibration to checkpoint, on a tiny pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import noise, noise_when_cut, tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline
from torch.nn.functional import conv2d, group_norm, silu

from slimdiff import checkpoint
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut, make_plan, sweep
from slimdiff.errors import BudgetError, StatisticsError
from slimdiff.groups import KINDS, find_groups, inner_layers
from slimdiff.guidance import guided
from slimdiff.methods import METHODS, Evidence
from slimdiff.recipe import Recipe
from slimdiff.source import Source
from slimdiff.spectra import spectrum
from slimdiff.states import States
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build, truncated
from slimdiff.trials import try_widths

ALL = (*KINDS, "resnet")
WORDS = tuple(f"{size} {what}" for size in ("big", "tiny", "old") for what in ("cat", "red boat", "hill"))
RECIPE = Recipe("sd1", WORDS, ("",) * len(WORDS), 4, 3.0, 16, 16, resnets=True)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnets")
    pipe = tiny_pipeline(folder / "tokenizer", tiny_unet(sample_size=8))
    collect(pipe, Source("tiny", "tiny", None), RECIPE, folder / "s.safetensors", batch_size=9)
    return pipe, StatisticsFile(folder / "s.safetensors")


@pytest.fixture(scope="module")
def solved(calibrated):
    pipe, statistics = calibrated
    groups = find_groups(pipe.unet, kinds=("resnet",))
    solve = METHODS["slimdiff"].solve
    return {g: solve(Evidence(pipe.unet, g, statistics.moments, statistics.patch_moments)) for g in groups}


def outputs(unet, group, states: States, factors=None) -> torch.Tensor:
    """What a block's second convolution gives on the states, its inputs those of the dense UNet, guided."""
    block, seen = unet.get_submodule(group.module), []
    _, convolution = inner_layers(unet, group)

    def again(module, args, kwargs, output):
        if factors is not None:
            with truncated(unet, group, factors):
                module.forward(*args, **kwargs)

    hooks = [
        convolution.register_forward_hook(lambda module, args, output: seen.append(output)),
        block.register_forward_hook(again, with_kwargs=True),
    ]
    with torch.no_grad():
        unet(**states.batch(list(range(len(states.prompts))), torch.device("cpu"), torch.float32))
    for hook in hooks:
        hook.remove()
    return guided(seen[-1], len(states.prompts), RECIPE.guidance_scale)


def test_calibration_sums_the_guided_inputs_of_the_second_convolution_on_request(calibrated):
    pipe, statistics = calibrated
    group = find_groups(pipe.unet, kinds=("resnet",))[0]
    found = statistics.patches(f"{group.name}:p")
    assert found.count == 9 * 4 * 64  # prompts x steps x pixels, the halves put together
    assert statistics.tensor(f"{group.name}:p.shifted").shape == (13, 16, 16)
    resumed = statistics.read().grams[f"{group.name}:p"]
    assert torch.equal(resumed.products, found.products)
    assert torch.equal(resumed.sums, found.sums)


def test_inspecting_shows_the_pixels_of_the_patches(calibrated):
    pipe, statistics = calibrated
    group = find_groups(pipe.unet, kinds=("resnet",))[0]
    found = spectrum(statistics, f"{group.name}:p")
    covariance = statistics.patch_moments(f"{group.name}:p").pixels.covariance[0]
    values = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(found.values, values / values.sum(), rtol=1e-2, atol=1e-5)
    assert found.energy is not None and float(found.energy.sum()) == pytest.approx(1)


def test_several_budgets_at_once_give_what_each_gives_alone(calibrated):
    pipe, statistics = calibrated
    options = Options(0.0, kinds=("resnet",), probe_prompts=2, probe_steps=2)
    together = [slim.state_dict() for slim, _ in sweep(pipe, statistics, options, (0.5, 0.3))]
    for state, budget in zip(together, (0.5, 0.3), strict=True):
        alone, _ = cut(pipe, statistics, replace(options, budget=budget))
        assert all(torch.equal(tensor, state[name]) for name, tensor in alone.state_dict().items())


def test_statistics_without_these_sums_are_refused_with_the_way_out(calibrated, tmp_path):
    pipe, _ = calibrated
    plain = Recipe("sd1", WORDS[:2], ("", ""), 2, 3.0, 16, 16)
    collect(pipe, Source("tiny", "tiny", None), plain, tmp_path / "s")
    assert not [key for key in StatisticsFile(tmp_path / "s").metadata["tokens"] if "resnet" in key]
    with pytest.raises(StatisticsError, match="slimdiff calibrate --resnets"):
        cut(pipe, StatisticsFile(tmp_path / "s"), Options(0.1, kinds=ALL))


def test_other_methods_do_not_cut_them(calibrated):
    pipe, statistics = calibrated
    with pytest.raises(BudgetError, match="--groups asks for resnet"):
        cut(pipe, statistics, Options(0.1, kinds=("resnet",), method="svd"))


def test_they_are_cut_only_where_they_are_asked_for(calibrated):
    pipe, statistics = calibrated
    plan, _ = make_plan(pipe, statistics, Options(0.1, influence="local"))
    assert {entry.kind for entry in plan.entries} == set(KINDS)


@pytest.mark.parametrize("of", ["groups", "unet", "macs"])
def test_budgets_count_them_and_the_parameters_that_go(calibrated, of):
    pipe, statistics = calibrated
    options = Options(0.5, of=of, kinds=ALL, influence="uniform")
    slim, plan = cut(pipe, statistics, options)
    assert plan.achieved >= 0.5
    assert any(e.kind == "resnet" and e.rank < e.width for e in plan.entries)
    assert sum(p.numel() for p in slim.parameters()) == plan.unet_params[1]
    without = Options(0.7, of="unet", kinds=KINDS)
    with pytest.raises(BudgetError, match="The groups qk, vo, ffn hold"):
        cut(pipe, statistics, without)


def test_slim_and_narrow_dense_blocks_are_the_same_function(calibrated):
    """Among cut layers of all kinds; the dense UNet is left as it was."""
    pipe, statistics = calibrated
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    plan, solutions = make_plan(pipe, statistics, Options(0.5, kinds=ALL, influence="uniform"))
    cut = [g for g in find_groups(pipe.unet, kinds=ALL) if g.name in plan.ranks()]
    slim = noise(build(pipe.unet, plan.ranks(), solutions))
    assert torch.allclose(slim, noise_when_cut(pipe.unet, cut, plan.ranks(), solutions), atol=1e-5)
    after = pipe.unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_blocks_whose_time_embedding_scales_too_are_cut_in_both_halves(tmp_path):
    pipe = tiny_pipeline(tmp_path, tiny_unet(resnet_time_scale_shift="scale_shift"))
    collect(pipe, Source("tiny", "tiny", None), RECIPE, tmp_path / "s", batch_size=9)
    options = Options(0.4, kinds=("resnet",), influence="local")
    slim, plan = cut(pipe, StatisticsFile(tmp_path / "s"), options)
    assert sum(p.numel() for p in slim.parameters()) == plan.unet_params[1]
    dense, found = noise(pipe.unet), noise(slim)
    assert float((found - dense).square().sum() / dense.square().sum()) < 0.1


def test_at_full_width_a_trial_finds_the_dense_block(calibrated, solved):
    pipe, statistics = calibrated
    group = next(iter(solved))
    tried = try_widths(pipe.unet, {group: solved[group]}, {group: [group.width]}, statistics.states(), 3.0)
    factors = tried[group].at(group.width)
    _, convolution = inner_layers(pipe.unet, group)
    torch.testing.assert_close(factors.out.float(), convolution.weight.flatten(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(factors.norm[0].float(), torch.ones(len(factors.norm[0])), rtol=1e-3, atol=0)
    assert factors.bias.abs().max() < 1e-3


def test_trials_bring_every_block_nearer_to_the_dense_one(calibrated, solved):
    """On the states, its inputs those of the dense UNet: nearer than the plain refit, which is nearer than none."""
    pipe, statistics = calibrated
    states = statistics.states()
    widths = {group: [group.width // 2] for group in solved}
    tried = try_widths(pipe.unet, solved, widths, states, RECIPE.guidance_scale)
    for group, solution in solved.items():
        r = group.width // 2
        dense = outputs(pipe.unet, group, states)
        plain = solution.at(r)
        columns = (9 * plain.into[0][:, None] + torch.arange(9)).flatten()
        _, convolution = inner_layers(pipe.unet, group)
        simple = type(plain)(plain.into, convolution.weight.flatten(1)[:, columns].double(), 0 * plain.bias)
        ours, refit, none = (
            float((outputs(pipe.unet, group, states, f) - dense).square().sum())
            for f in (tried[group].at(r), plain, simple)
        )
        assert ours < refit < none, group.name


def test_the_fitted_block_is_what_brute_force_finds(calibrated, solved):
    """Least squares on the unfolded patches of the cut block, with the dense block's knowledge as more patches."""
    pipe, statistics = calibrated
    group, states = next(iter(solved)), statistics.states()
    norm, convolution = inner_layers(pipe.unet, group)
    r = group.width // 2
    factors = try_widths(pipe.unet, {group: solved[group]}, {group: [r]}, states, 3.0)[group].at(r)
    kept, seen = factors.into[0], []
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        pipe.unet(**states.batch(list(range(len(states.prompts))), torch.device("cpu"), torch.float32))
    hook.remove()
    x, count = seen[0], len(states.prompts)
    scale, shift = (f.float()[:, None, None] for f in factors.norm)
    weight, bias = (t[kept][:, None, None] for t in (norm.weight, norm.bias))
    narrow = group_norm(x[:, kept], norm.num_groups, eps=norm.eps) * scale + shift
    slim = guided(silu(narrow * weight + bias), count, 3.0).double()
    dense = guided(silu(norm(x)), count, 3.0).double()

    def patches(h, border):
        return torch.nn.functional.unfold(h, 3, padding=border).transpose(1, 2).flatten(0, 1)

    inner, outer, n = patches(slim, 1), patches(slim, 2), count * 64
    full = conv2d(dense, convolution.weight.double(), padding=2)
    y, mean = full.flatten(2).transpose(1, 2).flatten(0, 1), full[:, :, 1:-1, 1:-1].mean((0, 2, 3))
    known, _ = solved[group].read()
    everything, share = torch.arange(len(norm.weight)), 9 * len(kept) / n
    left = outer.mT @ outer / n - inner.mean(0)[:, None] * inner.mean(0) + share * known.covariance(kept, kept)
    right = y.mT @ outer / n - mean[:, None] * inner.mean(0)
    right = right + share * convolution.weight.flatten(1).double() @ known.covariance(everything, kept)
    direct = torch.linalg.solve(left, right, left=False)
    torch.testing.assert_close(factors.out, direct, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(factors.bias, mean - direct @ inner.mean(0), rtol=1e-2, atol=1e-3)


def test_without_states_there_is_an_explanation(calibrated, solved):
    with pytest.raises(StatisticsError, match="calibration states"):
        try_widths(calibrated[0].unet, solved, {group: [1] for group in solved}, States(), 3.0)


def test_a_checkpoint_loads_with_slimdiff_and_without(calibrated, tmp_path: Path):
    pipe, statistics = calibrated
    slim, plan = cut(pipe, statistics, Options(0.4, kinds=ALL, influence="local"))
    checkpoint.write(tmp_path / "slim", slim, pipe, plan.to_json(), None)
    expected = noise(slim)
    assert torch.equal(noise(checkpoint.load(tmp_path / "slim").unet), expected)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert torch.equal(noise(plain.unet), expected)
    assert any(name.endswith(".resnet") for name in plain.unet.config["slim_ranks"])
