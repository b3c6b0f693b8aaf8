"""Capture during real forward passes, and what its statistics promise about cutting a group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import gelu

from slimdiff.capture import captured
from slimdiff.gram import Gram, Moments
from slimdiff.groups import find_groups, probes
from slimdiff.guidance import guided
from slimdiff.methods import METHODS, Evidence
from slimdiff.solve.solution import Solution
from slimdiff.solve.vo import VOSolution
from slimdiff.surgery import build, slim_weights, truncated

torch.set_num_threads(1)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
BATCHES = 3


class Grams(dict):
    """Accumulators where a statistics file would be."""

    def moments(self, key: str, device: object = "cpu") -> Moments:
        return self[key].moments()


def inputs(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(8, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(100 + 300 * batch),
        "encoder_hidden_states": torch.randn(8, 8, 12, generator=generator),
    }


@torch.no_grad()
def run(unet: nn.Module) -> list[Tensor]:
    return [unet(**inputs(batch)).sample for batch in range(BATCHES)]


def guide(x: Tensor) -> Tensor:
    """The first four samples are the negative halves of the others."""
    return guided(x, 4, 3.0)


def capture(unet: nn.Module) -> Grams:
    grams = Grams()
    with captured(unet, find_groups(unet), grams, guide=guide):
        run(unet)
    return grams


def hooks(unet: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in unet.modules() for kind in HOOKS)


def snapshot(unet: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def assert_untouched(unet: nn.Module, before: dict[str, Tensor]) -> None:
    state = unet.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@pytest.fixture(scope="module")
def calibrated() -> tuple[UNet2DConditionModel, Grams, dict[str, Solution]]:
    unet = tiny_unet()
    with torch.no_grad():  # fresh layers have tiny weights and no biases to speak of
        for index, parameter in enumerate(unet.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    grams, solve = capture(unet), METHODS["slimdiff"].solve
    return unet, grams, {g.name: solve(Evidence(unet, g, grams.moments)) for g in find_groups(unet)}


def test_nothing_is_left_behind_and_nothing_changes():
    unet = tiny_unet()
    unet.conv_in.register_forward_hook(lambda *_: None)
    before, there, plain = snapshot(unet), hooks(unet), run(unet)
    grams: dict[str, Gram] = {}
    groups = find_groups(unet)
    with captured(unet, groups, grams):
        assert hooks(unet) == there + sum(len(probes(unet, group)) for group in groups)
        watched = run(unet)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert hooks(unet) == there
    assert_untouched(unet, before)


def test_hooks_go_when_the_run_fails_and_when_attaching_fails():
    unet = tiny_unet()
    groups = find_groups(unet)
    with pytest.raises(ZeroDivisionError), captured(unet, groups, {}):
        run(unet)
        raise ZeroDivisionError
    assert hooks(unet) == 0
    strange = [*groups, type(groups[0])("nowhere.qk", "qk", "nowhere", 1, 1, 1, 1)]
    with pytest.raises(AttributeError), captured(unet, strange, {}):
        pass
    assert hooks(unet) == 0


def test_sums_are_those_of_the_layers_own_mathematics(calibrated):
    """Queries, keys, head outputs and hidden units from the layers' inputs and matrices alone."""
    unet, grams, _ = calibrated
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    seen: dict[str, list[Tensor]] = {"q": [], "k": [], "z": [], "g": []}

    def heads(x: Tensor) -> Tensor:
        return x.double().unflatten(-1, (2, 16)).transpose(1, 2)

    def attention(layer, args, kwargs):
        x, text = args[0], kwargs["encoder_hidden_states"]
        q, k, v = (heads(y @ w.weight.mT) for y, w in ((x, layer.to_q), (text, layer.to_k), (text, layer.to_v)))
        z = (q @ k.mT / 4).softmax(-1) @ v
        seen["q"].append(q.transpose(1, 2).flatten(0, 1))
        seen["k"].append((k - k.mean(2, keepdim=True)).transpose(1, 2).flatten(0, 1))
        seen["z"].append(z.transpose(1, 2).flatten(0, 1).flatten(1)[:, None])

    def feed_forward(layer, args):
        values, gates = layer.net[0].proj(args[0]).double().chunk(2, -1)
        negative, positive = (values * gelu(gates)).chunk(2)
        seen["g"].append((negative + 3 * (positive - negative)).flatten(0, 1)[:, None])

    handles = [
        block.attn2.register_forward_pre_hook(attention, with_kwargs=True),
        block.ff.register_forward_pre_hook(feed_forward),
    ]
    run(unet)
    for handle in handles:
        handle.remove()
    path = "mid_block.attentions.0.transformer_blocks.0"
    for key, statistic in ((".attn2.qk:q", "q"), (".attn2.qk:k", "k"), (".attn2.vo:z", "z"), (".ff.ffn:g", "g")):
        x, gram = torch.cat(seen[statistic]), grams[path + key]
        tokens = BATCHES * (4 if statistic == "g" else 8) * (8 if statistic == "k" else 16)
        assert gram.count == len(x) == tokens
        found, wanted = gram.moments().second, torch.einsum("nhd,nhe->hde", x, x) / tokens
        scale = wanted.abs().max()
        torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(gram.moments().mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)


def test_going_on_adds_to_the_sums_that_are_there():
    unet = tiny_unet()
    once, twice = capture(unet), capture(unet)
    with captured(unet, find_groups(unet), twice, guide=guide):
        run(unet)
    for key, gram in twice.items():
        assert gram.count == 2 * once[key].count
        torch.testing.assert_close(gram.moments().second, once[key].moments().second, rtol=1e-4, atol=1e-6)


def test_a_shift_of_an_images_keys_moves_neither_the_picture_nor_the_statistics():
    unet = tiny_unet()
    plain, plain_grams = run(unet), capture(unet)

    def shifted(module, args, keys):
        return keys + 3 * torch.randn(len(keys), 1, keys.shape[2], generator=torch.Generator().manual_seed(5))

    for name, module in unet.named_modules():
        if name.endswith("to_k"):
            module.register_forward_hook(shifted)
    for a, b in zip(plain, run(unet), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for key, gram in capture(unet).items():
        found, wanted = gram.moments().second, plain_grams[key].moments().second
        torch.testing.assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=1e-3)


def outputs(unet: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What these layers put out in all batches, tokens as rows, in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out.double().flatten(0, 1)))
        for name, layer in layers.items()
    ]
    run(unet)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def guide_rows(rows: Tensor) -> Tensor:
    """`guide`, for the rows that `outputs` returns."""
    batches = rows.view(BATCHES, 8, -1, rows.shape[1])
    return torch.cat([guide(batch).flatten(0, 1) for batch in batches]).double()


def measured(unet: nn.Module, group, solution: Solution, width: int) -> float:
    """The local error of a cut on exactly the tokens that were captured."""
    layer = unet.get_submodule(group.module)
    if group.kind != "qk":
        layers = {"y": layer.to_out[0] if group.kind == "vo" else layer.net[2]}
        dense = outputs(unet, layers)["y"]
        with truncated(unet, group, solution.at(width)):
            slim = outputs(unet, layers)["y"]
        if group.kind == "ffn":
            dense, slim = guide_rows(dense), guide_rows(slim)
        return float((slim - dense).square().sum() / (dense - dense.mean(0)).square().sum())

    def logits() -> Tensor:
        found = outputs(unet, {"q": layer.to_q, "k": layer.to_k})
        k = found["k"].unflatten(0, (BATCHES * 8, -1))
        q, k = (
            x.unflatten(1, (group.heads, -1)).transpose(0, 1) for x in (found["q"], (k - k.mean(1, True)).flatten(0, 1))
        )
        return q @ k.mT

    dense = logits()
    with truncated(unet, group, solution.at(width)):
        slim = logits()
    return float((slim - dense).square().sum() / dense.square().sum())


@pytest.mark.parametrize("module", ["down_blocks.0", "mid_block", "up_blocks.1"])
@pytest.mark.parametrize("layer", ["attn1", "attn2", "ff"])
def test_the_error_of_a_cut_is_the_predicted_one(calibrated, module, layer):
    """Or less, where heads choose together: the prediction is of each alone."""
    unet, _, solutions = calibrated
    path = f"{module}.attentions.0.transformer_blocks.0.{layer}"
    for group in [group for group in find_groups(unet) if group.module == path]:
        for width in {group.width // 4, group.width // 2, group.width - 1}:
            solution = solutions[group.name]
            predicted = float(solution.error[width])
            if isinstance(solution, VOSolution):
                assert measured(unet, group, solution, width) <= predicted * (1 + 1e-3) + 1e-5
                solution = replace(solution, sweeps=0)
            assert measured(unet, group, solution, width) == pytest.approx(predicted, rel=1e-3, abs=1e-5)


def test_a_truncation_ends_with_every_weight_bit_for_bit_as_before(calibrated):
    unet, _, solutions = calibrated
    before, plain = snapshot(unet), run(unet)
    for group in find_groups(unet):
        factors = solutions[group.name].at(group.width // 2)
        with truncated(unet, group, factors):
            changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
            assert changed
            assert changed <= slim_weights(unet, group, factors, padded=True).keys()
        assert_untouched(unet, before)
        with pytest.raises(ZeroDivisionError), truncated(unet, group, factors):
            raise ZeroDivisionError
        assert_untouched(unet, before)
    assert all(torch.equal(a, b) for a, b in zip(plain, run(unet), strict=True))


def test_the_slim_unet_computes_what_all_truncations_together_compute(calibrated):
    """Narrow weights against padded ones: the softmax scale, the order of heads, the halves of GEGLU, the biases."""
    unet, _, solutions = calibrated
    groups = find_groups(unet)
    ranks = {g.name: g.width // 2 for g in groups if "down_blocks.0" in g.name or "mid_block" in g.name}
    ranks["up_blocks.0.attentions.1.transformer_blocks.0.attn1.qk"] = 5  # unequal widths
    before, dense = snapshot(unet), run(unet)
    slim = build(unet, ranks, solutions)
    shapes = {name: tensor.shape for name, tensor in slim.state_dict().items()}
    for group in groups:
        if group.name in ranks:
            unet.load_state_dict(
                slim_weights(unet, group, solutions[group.name].at(ranks[group.name]), True), strict=False
            )
    padded = run(unet)
    unet.load_state_dict(before)
    for a, b, c in zip(run(slim), padded, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert (a - c).abs().max() > 1e-2  # the cut does change the output
    saved = sum((g.width - ranks[g.name]) * g.params_per_width for g in groups if g.name in ranks)
    assert sum(p.numel() for p in unet.parameters()) - saved == sum(s.numel() for s in shapes.values())


def test_full_widths_build_the_dense_weights_bit_for_bit(calibrated):
    unet, _, solutions = calibrated
    slim = build(unet, {group.name: group.width for group in find_groups(unet)}, solutions)
    assert slim.config.slim_ranks == {}
    assert_untouched(slim, snapshot(unet))
