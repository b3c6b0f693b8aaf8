"""The original layout of Stable Diffusion: what diffusers reads from it is what was written, also at full size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNETS, tiny_pipeline, tiny_text, tiny_tokenizer, tiny_unet
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from slimdiff import original_layout

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from architectures import build

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["sd15", "sd15-inpainting", "bk-sdm-base", "bk-sdm-small", "sd21", "sdxl", "ssd-1b"])
def test_diffusers_reads_published_unets_back(name):
    model = build(name)
    written = {f"model.diffusion_model.{name}": x for name, x in original_layout.unet(model).items()}
    assert len(written) == len(model.state_dict())
    read = convert_ldm_unet_checkpoint(dict(written), dict(model.config))
    assert shapes(read) == shapes(model.state_dict())


def test_names_are_those_of_the_original():
    """Some that other programs recognise models by."""
    sd, xl = (shapes(original_layout.unet(build(name))) for name in ("sd15", "sdxl"))
    assert sd["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert sd["output_blocks.11.1.transformer_blocks.0.norm1.bias"] == (320,)
    assert {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "input_blocks.3.0.op.weight"} <= set(sd)
    assert xl["label_emb.0.0.weight"] == (1280, 2816) and "output_blocks.2.2.conv.weight" in xl
    assert xl["middle_block.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert len(sd) == 686 and len(xl) == 1680


def test_diffusers_reads_the_vae_back():
    with torch.device("meta"):
        model = AutoencoderKL(**VAE)
    written = original_layout.vae(model)
    assert written["decoder.up.3.block.0.conv1.weight"].shape == (512, 512, 3, 3)
    assert written["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert written["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    read = convert_ldm_vae_checkpoint({f"first_stage_model.{n}": x for n, x in written.items()}, dict(model.config))
    assert {n: x.numel() for n, x in read.items()} == {n: x.numel() for n, x in model.state_dict().items()}


def test_open_clip_holds_queries_keys_and_values_in_one_matrix_and_its_projection_transposed(tmp_path):
    model = CLIPTextModelWithProjection(tiny_text(tiny_tokenizer(tmp_path), 16, projection_dim=8))
    written, own = original_layout.open_clip(model), original_layout.clip(model)
    layer = "text_model.encoder.layers.0.self_attn"
    matrices = [own[f"{layer}.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(written["transformer.resblocks.0.attn.in_proj_weight"], torch.cat(matrices))
    assert torch.equal(written["text_projection"], model.text_projection.weight.T)
    assert not any("self_attn" in name or "text_model" in name for name in written)


@pytest.mark.parametrize(("family", "marked"), [("sdxl", {"v_pred", "ztsnr"}), ("sd2", set())])
def test_sdxl_models_that_predict_v_say_so(family, marked, tmp_path):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for options, expected in ((schedule, marked), ({}, set())):
        pipe = tiny_pipeline(tmp_path, tiny_unet(**UNETS[family]), **options)
        assert {name for name in original_layout.pipeline(pipe) if "." not in name} == expected
