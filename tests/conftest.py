"""Small seeded models that every test can afford: complete pipelines with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from slimdiff.groups import Group
from slimdiff.solve.solution import Solution
from slimdiff.surgery import truncated

torch.set_num_threads(1)  # models this small are slower on more
TOKENS = 8


def tiny_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """Two levels of 16 and 32 channels, two heads of 8 and 16, five attention layers of each kind."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes}).eval().requires_grad_(False)


def tiny_pipeline(folder: Path, unet: UNet2DConditionModel | None = None, seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline around a tiny UNet; its tokenizer's files go to `folder`."""
    unet = unet if unet is not None else tiny_unet(seed)
    torch.manual_seed(seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS, unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=unet.config.cross_attention_dim, intermediate_size=16, projection_dim=12,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) *
        2, layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense pipeline, saved; tests must not change it."""
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


@torch.no_grad()
def noise(unet: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """What a tiny UNet predicts for two random latents and texts."""
    generator = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 12, generator=generator)
    return unet(sample, torch.tensor([10, 600]), text).sample


def noise_when_cut(
    unet: torch.nn.Module, groups: Sequence[Group], ranks: Mapping[str, int], solutions: Mapping[str, Solution]
) -> torch.Tensor:
    """The dense UNet's `noise` with all of these groups cut at once, in padded form."""
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(truncated(unet, group, solutions[group.name].at(ranks[group.name])))
        return noise(unet)
