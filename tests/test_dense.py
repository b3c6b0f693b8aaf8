"""Slim UNets in dense shapes: the same function in the stock class, whatever was cut."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import UNETS, noise, tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from slimdiff import checkpoint, pipeline, source
from slimdiff.cli import main
from slimdiff.dense import export, export_file, padded
from slimdiff.errors import ModelError, OutputError
from slimdiff.groups import KINDS, find_groups
from slimdiff.slim_unet import SlimUNet2DConditionModel

CUTS = {
    "tied": (KINDS, {"qk": 0.5, "vo": 0.5, "ffn": 0.3}),
    "untied": (KINDS, {"qk": 0.25, "vo": 0.75, "ffn": 1}),
    "heads": (("heads", "ffn"), {"heads": 0.5, "ffn": 0.6}),
    "heads and their widths": (("heads", *KINDS), {"heads": 0.5, "qk": 0.5, "vo": 0.25, "ffn": 1}),
    "linear": (("linear",), {"linear": 0.4}),
}


def make_slim(cut: str, dense: UNet2DConditionModel, maps: int = 0) -> SlimUNet2DConditionModel:
    """A slim UNet with random weights, every other group of each kind left at its full width."""
    kinds, shares = CUTS[cut]
    ranks = {
        group.name: max(1, int(group.width * shares[kind]))
        for kind in kinds
        for group in find_groups(dense, kinds=(kind,))[::2]
    }
    torch.manual_seed(1)
    return (
        SlimUNet2DConditionModel.from_config(dense.config, slim_ranks=ranks, slim_maps=maps)
        .requires_grad_(False)
        .eval()
    )


def shapes(unet: UNet2DConditionModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("cut", CUTS)
def test_the_padded_unet_predicts_what_the_slim_one_does(cut):
    slim = make_slim(cut, tiny_unet(), maps=2)
    dense = padded(slim)
    assert type(dense) is UNet2DConditionModel and not any(key.startswith("slim") for key in dense.config)
    assert {n: x.shape for n, x in dense.state_dict().items()} == {
        n: x.shape for n, x in tiny_unet().state_dict().items()
    }
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    torch.testing.assert_close(noise(dense), noise(slim), rtol=0, atol=1e-5)


def test_every_family_has_its_dense_shapes():
    for changes in UNETS.values():
        dense = tiny_unet(**changes)
        found = padded(make_slim("tied", dense))
        assert {n: x.shape for n, x in found.state_dict().items()} == {
            n: x.shape for n, x in dense.state_dict().items()
        }


def test_nothing_cut_is_nothing_changed():
    slim = SlimUNet2DConditionModel.from_config(tiny_unet().config)
    dense = padded(slim).state_dict()
    assert all(torch.equal(x, dense[name]) for name, x in slim.state_dict().items())


def test_resnet_blocks_are_refused_by_name():
    slim = SlimUNet2DConditionModel.from_config(tiny_unet().config, slim_ranks={"mid_block.resnets.0.resnet": 4})
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.resnet .*ResNet block"):
        padded(slim)


@pytest.fixture(scope="module")
def written(model_folder, tmp_path_factory) -> Path:
    """A slim checkpoint in half precision."""
    pipe = DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    folder = tmp_path_factory.mktemp("written") / "slim"
    checkpoint.write(folder, make_slim("tied", pipe.unet).half(), pipe, "{}", model_folder)
    return folder


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "cat", num_inference_steps=2, height=16, width=16, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


def test_the_folder_loads_in_stock_diffusers_and_paints_what_the_slim_one_paints(written, tmp_path):
    result = CliRunner().invoke(main, ["dense", str(written), "-o", str(tmp_path / "dense")])
    assert result.exit_code == 0, result.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "dense", torch_dtype=torch.float32)
    assert type(pipe.unet) is UNet2DConditionModel
    torch.testing.assert_close(draw(pipe), draw(checkpoint.load(written)), rtol=0, atol=2e-3)
    [weights] = (tmp_path / "dense/unet").glob("*.safetensors")
    assert {x.dtype for x in load_file(weights).values()} == {torch.float16}
    files, slim = (
        {p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "dense", written)
    )
    assert slim - files == {"unet/slimdiff_unet.py", "slimdiff/plan.json"} and files < slim
    assert "slim" not in (tmp_path / "dense/model_index.json").read_text()
    assert not any(key.startswith("slim") for key in json.loads((tmp_path / "dense/unet/config.json").read_text()))


def test_what_is_there_stays_and_what_is_not_slim_is_refused(written, model_folder, tmp_path):
    with pytest.raises(OutputError, match="exists"):
        export(written, tmp_path)
    with pytest.raises(OutputError, match="was not written by 'slimdiff dense'"):
        export(written, tmp_path, force=True)
    for write, name in ((export, "dense"), (export_file, "dense.safetensors")):
        with pytest.raises(ModelError, match="not a slim checkpoint"):
            write(model_folder, tmp_path / name)
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        export_file(written, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--single-file",)])
def test_what_an_earlier_run_wrote_is_replaced_only_when_told_to(written, tmp_path, options):
    output = tmp_path / "out.safetensors"
    arguments = ["dense", str(written), "-o", str(output), *options]
    for library in (diffusers, transformers):
        library.utils.logging.enable_progress_bar()
    assert CliRunner().invoke(main, arguments).output == f"{output}: {written} in dense shapes\n"
    inside = output if output.is_file() else output / "unet/config.json"
    whole = inside.read_bytes()
    inside.write_bytes(b"older")
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "pass --force" in again.output and inside.read_bytes() == b"older"
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0
    assert inside.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sd2", "sdxl", "ssd-1b"])
def test_a_single_file_is_the_dense_folder(family, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(**UNETS[family]))
    pipe.save_pretrained(tmp_path / "model")
    checkpoint.write(tmp_path / "slim", make_slim("tied", pipe.unet), pipe, "{}", tmp_path / "model")
    export(tmp_path / "slim", tmp_path / "dense")
    export_file(tmp_path / "slim", tmp_path / "dense.safetensors")
    wanted = pipeline.load(source.find(str(tmp_path / "dense")))
    found = pipeline.load(source.find(str(tmp_path / "dense.safetensors"), config=str(tmp_path / "dense")))
    assert type(found) is type(wanted) and found.components.keys() == wanted.components.keys()
    for name, part in wanted.components.items():
        if isinstance(part, torch.nn.Module):
            state = found.components[name].state_dict()
            assert state.keys() == part.state_dict().keys(), name
            assert all(torch.equal(x, state[key]) for key, x in part.state_dict().items()), name
    if "inpainting" not in family:
        assert torch.equal(draw(found), draw(wanted))


def test_a_single_file_has_the_dtype_of_the_unet(written, tmp_path):
    export_file(written, tmp_path / "dense.safetensors")
    assert {x.dtype for x in load_file(tmp_path / "dense.safetensors").values()} == {torch.float16}
