"""Every method through the same surgery, checkpoint and budget; what each goes by is what the layers really see."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from conftest import noise, noise_when_cut, tiny_pipeline, tiny_unet
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from slimdiff import checkpoint
from slimdiff.calibrate import collect
from slimdiff.capture import captured
from slimdiff.compress import cut, make_plan
from slimdiff.errors import BudgetError, StatisticsError
from slimdiff.groups import find_groups, inputs
from slimdiff.methods import METHODS, Evidence
from slimdiff.options import METHODS as NAMES
from slimdiff.options import Options
from slimdiff.recipe import Recipe
from slimdiff.sequential import solve_in_turn
from slimdiff.slim_unet import LowRank
from slimdiff.source import Source
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build

WORDS = tuple(f"{size} {what}" for size in ("big", "tiny", "old") for what in ("cat", "red boat", "hill"))
RECIPE = Recipe("sd1", WORDS, ("",) * len(WORDS), 4, 3.0, 16, 16, baselines=True)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    pipe = tiny_pipeline(folder / "tokenizer", tiny_unet(sample_size=8))
    pipe.save_pretrained(folder / "dense")
    collect(pipe, Source("tiny", "tiny", None), RECIPE, folder / "s.safetensors", batch_size=9)
    return pipe, StatisticsFile(folder / "s.safetensors")


def error(changed: Tensor, reference: Tensor) -> float:
    return float((changed - reference).square().sum() / reference.square().sum())


def test_names_are_those_of_the_options():
    assert tuple(METHODS) == NAMES


@pytest.mark.parametrize("of", ["groups", "macs"])
@pytest.mark.parametrize("method", NAMES)
def test_budget_is_met_and_accounted_for(calibrated, method, of):
    pipe, statistics = calibrated
    slim, plan = cut(pipe, statistics, Options(0.3, of=of, method=method))
    assert plan.achieved >= 0.3
    before, after = (sum(p.numel() for p in unet.parameters()) for unet in (pipe.unet, slim))
    assert (before, after) == plan.unet_params
    side = "params" if of == "groups" else "macs"
    pairs = [getattr(entry, side) for entry in plan.entries]
    assert 1 - sum(b for _, b in pairs) / sum(a for a, _ in pairs) == pytest.approx(plan.achieved)


@pytest.mark.parametrize("method", NAMES)
def test_the_slim_model_computes_what_the_dense_one_does_with_padded_weights(calibrated, method):
    pipe, statistics = calibrated
    plan, solutions = make_plan(pipe, statistics, Options(0.3, method=method, influence="uniform"))
    groups = [g for g in find_groups(pipe.unet, kinds=METHODS[method].kinds) if g.name in plan.ranks()]
    assert len(groups) == len(plan.ranks()) > 0
    slim = noise(build(pipe.unet, plan.ranks(), solutions))
    padded = noise_when_cut(pipe.unet, groups, plan.ranks(), solutions)
    assert torch.allclose(slim, padded, atol=1e-5)
    assert error(slim, noise(pipe.unet)) > 1e-7


@pytest.mark.parametrize("method", NAMES)
def test_full_width_of_every_solution_is_the_dense_model(calibrated, method):
    """Not by keeping the weights, which `build` does, but by the solutions' own factors."""
    pipe, statistics = calibrated
    _, solutions = make_plan(pipe, statistics, Options(0.3, method=method, influence="uniform"))
    dense = noise(pipe.unet)
    groups = find_groups(pipe.unet, kinds=METHODS[method].kinds)
    full = {group.name: group.width for group in groups}
    assert error(noise_when_cut(pipe.unet, groups, full, solutions), dense) < 1e-8


@pytest.mark.parametrize("method", ["obs", "svd-llm", "svd"])
def test_heads_and_factors_load_in_plain_diffusers(calibrated, method, tmp_path):
    pipe, statistics = calibrated
    slim, plan = cut(pipe, statistics, Options(0.3, method=method))
    checkpoint.write(tmp_path / "slim", slim, pipe, plan.to_json(), statistics.path.parent / "dense")
    for loaded in (
        checkpoint.load(tmp_path / "slim"),
        DiffusionPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=True),
    ):
        assert torch.equal(noise(loaded.unet), noise(slim))
    factors = [layer for layer in slim.modules() if isinstance(layer, LowRank)]
    assert bool(factors) == (method != "obs")
    with pytest.raises(ValueError, match=r"two factors|differ in width") if factors else ExitStack():
        slim.fuse_qkv_projections()


def test_inputs_say_what_the_projections_make_of_them():
    unet = tiny_unet()
    groups, grams, seen = find_groups(unet, kinds=("qk", "vo")), {}, {}
    handles = [
        unet.get_submodule(group.module).get_submodule(matrix).register_forward_hook(
            lambda m, args, out, key=(group.name, i): seen.setdefault(key, []).append(out.double().flatten(0, 1))
        )
        for group in groups for i, matrix in enumerate(("to_q", "to_k") if group.kind == "qk" else ("to_v",))
    ]  # fmt: skip
    with captured(unet, find_groups(unet, kinds=("linear",)), grams):
        noise(unet), noise(unet, 1)
    for handle in handles:
        handle.remove()
    for (name, i), parts in seen.items():
        group = next(group for group in groups if group.name == name)
        rows = torch.cat(parts).unflatten(-1, (group.heads, -1)).transpose(0, 1)
        found = Evidence(unet, group, lambda key: grams[key].moments()).projected(i)
        assert torch.allclose(found, rows.mT @ rows / rows.shape[1], rtol=1e-4, atol=1e-7)
        assert inputs(unet, group)[i] in grams


def test_matrices_of_one_layer_share_the_tokens_they_share():
    """Keys and values read the text; queries, and in self-attention all three, the layer's own input."""
    unet, grams = tiny_unet(), {}
    with captured(unet, find_groups(unet, kinds=("linear",)), grams):
        noise(unet)
    layers = {key.rpartition(".")[2] for key in grams}
    assert layers == {"attn1:x", "attn2:x", "attn2:c", "vo:z", "ff:x", "ffn:u"}
    assert len(grams) == 7 * 7  # of each of the 7 blocks: x, z; x, c, z; x, u


def test_statistics_without_baselines_are_enough_for_slimdiff_and_what_needs_none(calibrated, tmp_path):
    pipe, _ = calibrated
    collect(pipe, Source("tiny", "tiny", None), replace(RECIPE, baselines=False), tmp_path / "s.safetensors")
    statistics = StatisticsFile(tmp_path / "s.safetensors")
    for method in NAMES:
        if METHODS[method].baselines:
            with pytest.raises(StatisticsError, match=r"calibrate --baselines"):
                make_plan(pipe, statistics, Options(0.3, method=method))
        else:
            make_plan(pipe, statistics, Options(0.3, method=method, influence="local"))
    assert {method for method in NAMES if not METHODS[method].baselines} == {"slimdiff", "svd"}


def test_kinds_that_a_method_does_not_cut_are_refused(calibrated):
    with pytest.raises(BudgetError, match="svd-llm cuts linear"):
        cut(*calibrated, Options(0.3, method="svd-llm", kinds=("ffn",)))
    _, plan = cut(*calibrated, Options(0.1, method="obs", kinds=("ffn",)))
    assert {entry.kind for entry in plan.entries} == {"ffn"}


def test_a_matrix_is_only_factorised_where_that_saves(calibrated):
    plan, _ = make_plan(*calibrated, Options(0.2, method="svd-llm"))
    for entry in plan.entries:
        assert entry.rank == entry.width or entry.params[1] < entry.params[0]


def test_later_packages_see_what_the_earlier_ones_really_feed_them(calibrated):
    pipe, statistics = calibrated
    groups = find_groups(pipe.unet, kinds=("heads", "ffn"))
    solve = METHODS["obs"].solve
    full = {group.name: group.width for group in groups}
    half = {group.name: max(1, group.width // 2) for group in groups}
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    dense, cut = (
        solve_in_turn(pipe, groups, widths, statistics.recipe, lambda *seen: solve(Evidence(*seen)))
        for widths in (full, half)
    )
    first, last = groups[0], groups[-1]
    assert torch.equal(dense[first.name].error, cut[first.name].error)
    assert not torch.allclose(dense[last.name].error, cut[last.name].error, rtol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_large_pictures_are_painted_few_at_once(calibrated):
    pipe, statistics = calibrated
    groups = [group for group in find_groups(pipe.unet, kinds=("heads",)) if group.module.startswith("mid_block")]
    recipe = replace(statistics.recipe, prompts=WORDS[:3], height=96, width=96, steps=1)
    rows = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )  # the copy that is cut has it too
    try:
        solve_in_turn(
            pipe, groups, {group.name: group.width for group in groups}, recipe,
            lambda *seen: METHODS["obs"].solve(Evidence(*seen)),
        )  # fmt: skip
    finally:
        handle.remove()
    assert rows == [4, 2] * len(groups), "two prompts of 48 x 48 latent pixels, with both halves of guidance, then one"
