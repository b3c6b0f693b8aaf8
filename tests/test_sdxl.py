"""The whole way on a tiny Stable Diffusion XL: two text encoders, pooled embeddings, sizes as conditions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TOKENS, tiny_pipeline, tiny_unet
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from slimdiff import checkpoint, compress, pipeline, recipe, source
from slimdiff.calibrate import calibrate
from slimdiff.compress import Options
from slimdiff.statistics import StatisticsFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    unet = tiny_unet(
        cross_attention_dim=12 + 16, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4, attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    work = tmp_path_factory.mktemp("sdxl")
    one = tiny_pipeline(work / "tokenizer", tiny_unet())  # its text encoder is 12 wide
    torch.manual_seed(3)
    second = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(one.tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=len(one.tokenizer) - 2,
        eos_token_id=len(one.tokenizer) - 1, pad_token_id=len(one.tokenizer) - 1,
    ))  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=one.vae, text_encoder=one.text_encoder, text_encoder_2=second.eval(), tokenizer=one.tokenizer,
        tokenizer_2=one.tokenizer, unet=unet, scheduler=EulerDiscreteScheduler.from_config(one.scheduler.config),
        add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(work / "xl")
    return work / "xl"


@pytest.mark.parametrize("independent", [False, True])
def test_calibrate_compress_and_reload(folder, tmp_path, independent):
    found = source.find(str(folder))
    pipe = pipeline.load(found)
    assert pipeline.family(pipe, found) == "sdxl"
    words = ("a cat", "hill", "red", "dogs")
    job = recipe.family_recipe("sdxl", pipeline.native_size(pipe), prompts=words, steps=3)
    calibrate(pipe, found, job, tmp_path / "s.safetensors", batch_size=2)
    options = Options(0.3, probe_prompts=2, probe_steps=2, independent_ranks=independent)
    slim, plan = compress(pipe, StatisticsFile(tmp_path / "s.safetensors"), options)
    assert plan.achieved >= 0.3 and all(entry.final_error is not None for entry in plan.entries)
    checkpoint.write(tmp_path / "slim", slim, pipe, plan.to_json(), found.folder)
    loaded = checkpoint.load(tmp_path / "slim")
    loaded.set_progress_bar_config(disable=True)
    conditioning = pipeline.encode(pipe, ["old boat"], [""])
    run = {"steps": 3, "guidance_scale": 5.0, "height": job.height, "width": job.width}
    dense = pipeline.sample(pipe, conditioning, [1], **run)
    pipe.unet = slim
    here = pipeline.sample(pipe, conditioning, [1], **run)
    assert torch.equal(here, pipeline.sample(loaded, conditioning, [1], **run))
    assert 0 < (here - dense).norm() / dense.norm() < 0.5
