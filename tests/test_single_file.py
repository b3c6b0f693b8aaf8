"""Single .safetensors files in the original layout: the same model, and the same slim checkpoint, as from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import UNETS, tiny_pipeline, tiny_unet
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimdiff import checkpoint, original_layout, pipeline, single_file, source
from slimdiff.cli import main
from slimdiff.errors import ModelError
from slimdiff.prompts import embeddings


@pytest.fixture(scope="module", params=["sd1", "sd1-inpainting", "sd2", "sdxl"])
def model(request, tmp_path_factory) -> tuple[Path, Path]:
    """The same tiny model as a folder and as a single file."""
    work = tmp_path_factory.mktemp(request.param)
    pipe = tiny_pipeline(work / "tokenizer", tiny_unet(**UNETS[request.param]))
    pipe.save_pretrained(work / "tiny")
    save_file(original_layout.pipeline(pipe), work / "tiny.safetensors")
    return work / "tiny", work / "tiny.safetensors"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_single_file_is_the_model_of_its_folder(model):
    folder, file = model
    ours, theirs = pipeline.load(source.find(str(file), config=str(folder))), pipeline.load(source.find(str(folder)))
    assert type(ours) is type(theirs)
    for name, part in theirs.components.items():
        if isinstance(part, nn.Module):
            assert equal(part.state_dict(), ours.components[name].state_dict()), name


@pytest.mark.parametrize("model", ["sd1", "sdxl"], indirect=True)
def test_a_single_file_gives_the_slim_checkpoint_of_its_folder(model, tmp_path):
    folder, file = model
    for reference, options, name in ((folder, (), "a"), (file, ("--config", folder), "b")):
        statistics = tmp_path / f"{name}.safetensors"
        run("calibrate", reference, *options, "--num-prompts", 2, "--steps", 2, "--device", "cpu", "-o", statistics)
        run("compress", statistics, "--influence", "local", "--device", "cpu", "-o", tmp_path / name)
    for part in ("unet", "vae", "text_encoder"):
        copied, made = (load_file(next((tmp_path / name / part).glob("*.safetensors"))) for name in "ab")
        if part == "text_encoder":  # transformers 5 wrote the folder's, without a prefix that version 4 needs
            assert all(name.startswith("text_model.") for name in made)
            copied = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in copied.items()}
        assert equal(copied, made), part
    pipe = checkpoint.load(tmp_path / "b")
    assert all(torch.isfinite(tensor).all() for tensor in pipe.text_encoder.state_dict().values())
    plans = [json.loads((tmp_path / name / "slimdiff/plan.json").read_text()) for name in "ab"]
    assert plans[0]["entries"] == plans[1]["entries"]
    assert plans[1]["provenance"]["model_options"] == {"config": str(folder)}


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
def test_a_model_that_was_moved_keeps_the_options_it_was_calibrated_with(model, tmp_path, monkeypatch):
    folder, file = model
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options, few = ("--config", folder, "--vae", tmp_path / "vae"), ("--num-prompts", 1, "--steps", 1)
    run("calibrate", file, *options, *few, "--device", "cpu", "-o", tmp_path / "s.safetensors")
    moved = file.rename(tmp_path / "moved.safetensors")
    try:
        run("compress", tmp_path / "s.safetensors", "--model", moved, "--influence", "local", "-o", tmp_path / "slim")
    finally:
        moved.rename(file)
    assert equal(vae.state_dict(), load_file(tmp_path / "slim/vae/diffusion_pytorch_model.safetensors"))


def test_what_a_model_elsewhere_keeps_of_its_options(model_folder, tmp_path):
    options = {"variant": "fp16", "revision": "main", "config": "owner/name", "vae": "owner/vae"}
    found = source.again("owner/name", options, str(model_folder), None)
    assert found.folder == model_folder.resolve() and found.options == {"vae": "owner/vae"}
    (tmp_path / "m.safetensors").touch()
    kept = source.again("old.safetensors", options, str(tmp_path / "m.safetensors"), "ema").options
    assert kept == {"variant": "ema", "config": "owner/name", "vae": "owner/vae"}
    tiny_pipeline(tmp_path / "tokenizer").save_pretrained(tmp_path / "fp16", variant="fp16")
    assert source.again("owner/name", options, str(tmp_path / "fp16"), None).variant == "fp16"


def test_the_text_encoders_of_a_single_file_are_those_of_its_folder(model):
    folder, file = model
    ours = pipeline.load_text(source.find(str(file), config=str(folder)))
    theirs = pipeline.load_text(source.find(str(folder)))
    assert ours.unet is None and ours.vae is None
    assert (embeddings(ours, ["a cat"]) == embeddings(theirs, ["a cat"])).all()


def test_the_stored_dtype_of_a_single_file_is_that_of_its_unet(tmp_path):
    tensors = {
        "alphas_cumprod": torch.ones(1000), "first_stage_model.encoder.conv_in.bias": torch.ones(8),
        "model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.float16), "model_ema.decay": torch.ones(1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors")
    assert source.stored_dtype(source.find(str(tmp_path / "m.safetensors"))) == torch.float16
    save_file({"alphas_cumprod": torch.ones(1000)}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"holds no tensor named model\.diffusion_model"):
        source.stored_dtype(source.find(str(tmp_path / "m.safetensors")))


def test_the_marks_of_a_file_set_its_schedule(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(**UNETS["sdxl"]))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "tiny")
    file, tensors = tmp_path / "tiny.safetensors", original_layout.pipeline(pipe)
    asked = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for marks, says in (((), 0), (("v_pred",), 1), (("v_pred", "ztsnr"), 3)):
        save_file(tensors | dict.fromkeys(marks, torch.zeros(0)), file)
        scheduler = pipeline.load(source.find(str(file), config=str(tmp_path / "tiny"))).scheduler
        assert [scheduler.config[key] == value for key, value in asked.items()] == [i < says for i in range(3)]
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **asked)
    assert torch.equal(scheduler.alphas_cumprod, euler.alphas_cumprod)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999 and scheduler.sigmas[0] > 1000


def that_predicts_noise(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """It returns its latents, but for their mean and scale: they go past all blocks through the last skip connection,
    once as they are and once negative, because silu(x) - silu(-x) = x."""
    last, attention = unet.up_blocks[-1].resnets[-1], unet.up_blocks[-1].attentions[-1]
    for layer in (unet.conv_in, unet.conv_out, last.conv2, last.conv_shortcut, attention.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for i, sign in enumerate((1, 1, 1, 1, -1, -1, -1, -1)):
        unet.conv_in.weight[i, i % 4, 1, 1] = unet.conv_out.weight[i % 4, i, 1, 1] = sign
        last.conv_shortcut.weight[i, unet.config.block_out_channels[0] + i] = 1
    return unet


@pytest.mark.parametrize("noise", [True, False])
def test_a_file_of_sd2_is_asked_what_it_predicts(tmp_path, monkeypatch, noise):
    unet = tiny_unet(**UNETS["sd2"], sample_size=96)
    pipe = tiny_pipeline(
        tmp_path / "tokenizer", that_predicts_noise(unet) if noise else unet, prediction_type="v_prediction"
    )
    pipe.save_pretrained(tmp_path / "v2")
    file = tmp_path / "v2.safetensors"
    save_file(original_layout.pipeline(pipe), file)
    config = {"pretrained_model_name_or_path": str(tmp_path / "v2")}  # as diffusers finds for every file of SD 2.x
    monkeypatch.setattr("diffusers.loaders.single_file.fetch_diffusers_config", lambda checkpoint: config)
    loaded = pipeline.load(source.find(str(file)), torch.float16)
    assert loaded.scheduler.config.prediction_type == ("epsilon" if noise else "v_prediction")
    assert pipeline.native_size(loaded) == ((128, 128) if noise else (192, 192))
    assert equal(loaded.unet.state_dict(), unet.half().state_dict())
    given = pipeline.load(source.find(str(file), config=str(tmp_path / "v2")))
    assert given.scheduler.config.prediction_type == "v_prediction"


def test_the_miniature_is_found_to_predict_noise():
    assert single_file.predicts_noise(pipeline.load(source.find(None)).unet)


def test_without_network_a_single_file_asks_for_configs(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"the hub cannot be reached for them\. Pass --config"):
        pipeline.load(source.find(str(model[1])))


def test_configs_are_for_single_files_only(model):
    with pytest.raises(ModelError, match="brings its own configs"):
        source.find(str(model[0]), config=str(model[0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": None}, "but no model.diffusion_model.input_blocks.0.0"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 8, 3, 3)}, "8 input channels"),
        ({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(4)}, "an SDXL refiner"),
    ],
    ids=["flux", "editing", "refiner"],
)
def test_a_file_of_another_kind_is_refused_before_it_is_read(tmp_path, change, said):
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 4, 3, 3)} | change
    save_file(
        {name: t for name, t in (tensors | {"x": torch.zeros(1)}).items() if t is not None}, tmp_path / "m.safetensors"
    )
    with pytest.raises(ModelError, match=said):
        pipeline.load(source.find(str(tmp_path / "m.safetensors")))


def test_another_vae_paints_and_goes_into_the_slim_checkpoint(model_folder, tmp_path):
    torch.manual_seed(7)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(model_folder / "vae"))
    other.save_pretrained(tmp_path / "folder")
    other.save_pretrained(tmp_path / "pipeline/vae")
    tensors = {name: tensor.contiguous() for name, tensor in original_layout.vae(other).items()}
    save_file(tensors, tmp_path / "file.safetensors")
    for form in ("folder", "pipeline", "file.safetensors"):
        pipe = pipeline.load(source.find(str(model_folder), vae=str(tmp_path / form)))
        assert equal(other.state_dict(), pipe.vae.state_dict()), form
    statistics, few = tmp_path / "s.safetensors", ("--num-prompts", 1, "--steps", 1, "--device", "cpu")
    run("calibrate", model_folder, "--vae", tmp_path / "folder", *few, "-o", statistics)
    run("compress", statistics, "--influence", "local", "--device", "cpu", "-o", tmp_path / "slim")
    assert equal(other.state_dict(), load_file(tmp_path / "slim/vae/diffusion_pytorch_model.safetensors"))


def test_a_vae_that_is_none_is_refused(model_folder, tmp_path):
    for path in (tmp_path, model_folder / "unet/diffusion_pytorch_model.safetensors"):
        with pytest.raises(ModelError, match="Cannot load the VAE"):
            pipeline.load(source.find(str(model_folder), vae=str(path)))


def test_a_file_without_vae_can_be_given_one(model, tmp_path):
    folder, file = model
    tensors = {name: t for name, t in load_file(file).items() if not name.startswith("first_stage_model")}
    save_file(tensors, tmp_path / "m.safetensors")
    found = source.find(str(tmp_path / "m.safetensors"), config=str(folder))
    with pytest.raises(ModelError, match=r"AutoencoderKL.*--vae"):
        pipeline.load(found)
    found = source.find(str(tmp_path / "m.safetensors"), config=str(folder), vae=str(folder))
    ours, whole = pipeline.load(found).vae, AutoencoderKL.from_pretrained(folder / "vae")
    assert equal(whole.state_dict(), ours.state_dict())
