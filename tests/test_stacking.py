"""What goes on top of a pipeline: it acts, on slim and dense models alike, and leaves the pipeline below as it was."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import UNETS, tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline, TorchAoConfig
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

import slimdiff
from slimdiff import stacking, timing
from slimdiff.bench import _bytes, measure
from slimdiff.cli import main
from slimdiff.errors import SlimdiffError
from slimdiff.groups import find_groups
from slimdiff.influence import relative_error
from slimdiff.measured import Settings, quantile
from slimdiff.pipeline import encode, sample
from slimdiff.plan import Entry, Plan
from slimdiff.report import page
from slimdiff.report.results import Report
from slimdiff.report.wording import factor, percent
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.source import DEMO
from slimdiff.stacking import check, stacked

STEPS = 6
SETTINGS = Settings(
    ("red cat", "an owl"), ("", "a dog"), steps=4, guidance_scale=4.0, height=16, width=16, batch_sizes=(1,), repeats=1,
    stacks=("int8", "deepcache+tome"),
)  # fmt: skip


def slim_of(pipe: DiffusionPipeline) -> SlimUNet2DConditionModel:
    """A slim UNet of unequal widths, with random weights."""
    shares = {"qk": 0.5, "vo": 0.75, "ffn": 0.5}
    ranks = {group.name: int(group.width * shares[group.kind]) for group in find_groups(pipe.unet)}
    torch.manual_seed(3)
    return SlimUNet2DConditionModel.from_config(pipe.unet.config, slim_ranks=ranks).requires_grad_(False).eval()


@pytest.fixture(params=["dense", "slim"])
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> DiffusionPipeline:
    found = tiny_pipeline(tmp_path)
    return found if request.param == "dense" else tiny_pipeline(tmp_path, slim_of(found))


def latents(pipe: DiffusionPipeline) -> Tensor:
    size = {"height": 16, "width": 16}
    return sample(pipe, encode(pipe, ["red cat", "owl"], ["", ""]), [1, 2], steps=STEPS, guidance_scale=4.0, **size)


def linears(unet: nn.Module) -> list[nn.Linear]:
    return [layer for layer in unet.modules() if isinstance(layer, nn.Linear)]


def calls(layer: nn.Module, pipe: DiffusionPipeline) -> list[torch.Size]:
    """Shapes of what a layer gets while a picture is painted."""
    seen: list[torch.Size] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    latents(pipe)
    handle.remove()
    return seen


@pytest.mark.parametrize("stack", ["int8", "deepcache", "tome", "int8+deepcache+tome"])
def test_a_stack_changes_the_pictures_and_not_the_pipeline_below(pipe, stack):
    before, weights = latents(pipe), dict(pipe.unet.named_parameters())
    names = [set(vars(module)) for module in pipe.unet.modules()]
    kinds = [type(module) for module in pipe.unet.modules()]
    other = stacked(pipe, stack)
    changed = latents(other)
    assert changed.isfinite().all() and not torch.equal(changed, before)
    assert torch.equal(latents(stacked(pipe, stack)), changed), "a stack paints the same picture again"
    assert torch.equal(latents(pipe), before)
    assert all(dict(pipe.unet.named_parameters())[name] is weight for name, weight in weights.items())
    assert [set(vars(module)) for module in pipe.unet.modules()] == names
    assert [type(module) for module in pipe.unet.modules()] == kinds
    for name, weight in other.unet.named_parameters():
        assert weight is weights[name] or "int8" in stack


def test_int8_holds_matrices_in_a_byte_for_each_weight_and_hardly_changes_a_prediction(pipe):
    other = stacked(pipe, "int8")
    for layer, dense in zip(linears(other.unet), linears(pipe.unet), strict=True):
        assert layer.weight.qdata.dtype == torch.int8 and layer.weight.qdata.shape == dense.weight.shape
        error = relative_error(layer.weight.dequantize()[None], dense.weight[None]).item()
        assert 0 < error < 1e-4, "8 bits"
    assert all(p.dtype == torch.float32 for n, p in other.unet.named_parameters() if "conv" in n)
    saved = 3 * sum(layer.weight.numel() for layer in linears(pipe.unet))
    scales = 4 * 2 * sum(layer.out_features for layer in linears(pipe.unet))
    weights = _bytes(other.unet)
    assert _bytes(pipe.unet) - saved < weights <= _bytes(pipe.unet) - saved + 2 * scales
    state = torch.randn(2, 4, 8, 8), 600, torch.randn(2, 8, 12)
    assert 0 < relative_error(other.unet(*state).sample, pipe.unet(*state).sample).max() < 1e-3


def test_int8_does_not_overflow_in_float16(tmp_path):
    """The outputs fit float16 by far, sums of inputs times integers do not."""
    pipe = tiny_pipeline(tmp_path)
    layer = linears(pipe.unet.half())[0]
    layer.weight.data.fill_(1e-3)
    inputs = torch.full((1, layer.in_features), 1e4, dtype=torch.float16)
    found = linears(stacked(pipe, "int8").unet)[0](inputs)
    torch.testing.assert_close(found, layer(inputs), rtol=0.01, atol=0)
    assert layer.in_features * 1e4 * 127 > torch.finfo(torch.float16).max > 100 * found.abs().max()


def test_deepcache_skips_the_inner_layers_of_two_in_three_steps(pipe, monkeypatch):
    inner = "mid_block.resnets.0"
    outer = "down_blocks.0.resnets.0"
    assert len(calls(pipe.unet.get_submodule(inner), pipe)) == STEPS
    other = stacked(pipe, "deepcache")
    assert len(calls(other.unet.get_submodule(inner), other)) == STEPS // 3
    assert len(calls(other.unet.conv_in, other)) == STEPS
    monkeypatch.setattr(stacking, "INTERVAL", 1)
    every = stacked(pipe, "deepcache")
    assert torch.equal(latents(every), latents(pipe))
    assert len(calls(every.unet.get_submodule(outer), every)) == STEPS


def test_tome_merges_half_of_the_tokens_of_the_finest_attention(pipe, monkeypatch):
    finest, coarser = (f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn1.to_q" for level in (0, 1))
    other = stacked(pipe, "tome")
    assert {s[1] for s in calls(pipe.unet.get_submodule(finest), pipe)} == {64}
    assert {s[1] for s in calls(other.unet.get_submodule(finest), other)} == {32}
    assert {s[1] for s in calls(other.unet.get_submodule(coarser), other)} == {16}
    monkeypatch.setattr(stacking, "RATIO", 0)
    assert torch.equal(latents(stacked(pipe, "tome")), latents(pipe))


def test_tome_finds_the_finest_attention_of_sdxl(tmp_path):
    other = stacked(tiny_pipeline(tmp_path, tiny_unet(**UNETS["sdxl"])), "tome")
    layer = other.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    assert {s[1] for s in calls(layer, other)} == {8}


def test_what_cannot_be_put_on_top_is_refused(tmp_path, monkeypatch):
    pipe = tiny_pipeline(tmp_path, tiny_unet(**UNETS["bk-sdm"]))
    with pytest.raises(SlimdiffError, match="middle block"):
        check(pipe, "int8+deepcache")
    with pytest.raises(SlimdiffError, match="choose from int8, deepcache, tome"):
        check(pipe, "int4")
    check(pipe, "int8+tome")
    monkeypatch.setattr(stacking, "find_spec", lambda name: None)
    with pytest.raises(SlimdiffError, match=r"tomesd, which is not installed: pip install 'slimdiff\[tome\]'"):
        stacked(pipe, "tome")


def test_the_command_refuses_unknown_names():
    done = CliRunner().invoke(main, ["bench", "--with", "int8,fp4"])
    assert done.exit_code == 2 and "'fp4' cannot be put on top" in done.output


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    folder = tmp_path_factory.mktemp("tokenizer")
    dense = tiny_pipeline(folder)
    slim = tiny_pipeline(folder, slim_of(dense))
    ranks = slim.unet.config.slim_ranks
    entries = tuple(
        Entry(g.name, g.kind, g.width, ranks[g.name], (g.params, g.params), (2, 1), 0.1, 0.1)
        for g in find_groups(dense.unet)
    )
    plan = Plan(0.5, "groups", 0.5, entries, (1, 1), (1, 1), None, None, {"model": "owner/tiny"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SHORTEST", 0.01)
        yield measure(dense, slim, plan, SETTINGS)


def test_each_stack_is_a_column_of_the_benchmark(report):
    rows = report.stack_rows()
    assert rows[0] == ("On top", "nothing", "int8", "deepcache+tome")
    assert {len(row) for row in rows} == {4}
    for stack in report.stacks:
        for side in (stack.dense, stack.slim):
            shown = f"{factor(side.speedup.median)}, {percent(quantile(side.drift, 0.5))} ("
            assert any(row[rows[0].index(stack.name)].startswith(shown) for row in rows), (
                "no speed-up without its drift"
            )
            assert len(side.drift) == len(side.mse) == 2 and side.speedup.median > 0
    text = report.table()
    assert all(row[0].strip() in text for row in rows) and "with nothing on top" in text
    html = page.html(report)
    assert html.count('data-of="deepcache+tome"') == html.count('data-of="int8"') == 6


def test_stacks_are_measured_against_the_plain_dense_model(report):
    int8, rest = report.stacks
    assert max(int8.dense.drift) < 1e-2 < min(int8.slim.drift), "the slim UNet's weights are random"
    assert int8.slim.drift == pytest.approx(report.fidelity.drift, rel=0.1)
    assert int8.dense.weights < report.size.weights[0] == rest.dense.weights
    assert int8.slim.weights < report.size.weights[1] == rest.slim.weights
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [stack["name"] for stack in data["stacks"]] == ["int8", "deepcache+tome"]
    side = data["stacks"][0]["slim"]
    assert side["drift"]["worst"] == max(int8.slim.drift) and side["weights"] == int8.slim.weights
    assert side["speedup"]["median"] == int8.slim.speedup.median and set(side["psnr_db"]) == {"typical", "p90", "worst"}
    assert {"torchao", "DeepCache", "tomesd"} <= set(data["provenance"]["versions"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a slim miniature in it."""
    found = tmp_path_factory.mktemp("miniature")
    dense = DiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    statistics = slimdiff.calibrate(dense, output=found / "statistics.safetensors", num_prompts=2, steps=2)
    slimdiff.save(slimdiff.compress(dense, statistics, influence="local"), found / "slim")
    return found


def test_a_slim_checkpoint_loads_in_int8_in_plain_diffusers(folder):
    in_int8 = TorchAoConfig(Int8WeightOnlyConfig())
    pipe = DiffusionPipeline.from_pretrained(
        folder / "slim", trust_remote_code=True, torch_dtype=torch.bfloat16,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": in_int8}),
    )  # fmt: skip
    assert all(layer.weight.qdata.dtype == torch.int8 for layer in linears(pipe.unet))
    text, sample = torch.randn(1, 16, 128), torch.randn(1, 4, 12, 12)
    found = pipe.unet(sample.bfloat16(), 600, text.bfloat16()).sample
    assert relative_error(found, slimdiff.load(folder / "slim").unet(sample, 600, text).sample).max() < 1e-2


def test_the_example_runs(folder, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "examples/stacking.py"
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(sys, "argv", [str(script), str(folder)])
    runpy.run_path(str(script))
    assert "deepcache" in capsys.readouterr().out
    pictures = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
    assert pictures.pop("slim-again") == pictures["slim"]
    assert len(set(pictures.values())) == 4, "each paints its own picture"
