"""Small seeded models that every test can afford: complete pipelines with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from slimdiff.families import PAINTERS, inpaints, is_xl
from slimdiff.groups import Group
from slimdiff.metrics import inception, lpips
from slimdiff.solve.solution import Solution
from slimdiff.surgery import truncated

torch.set_num_threads(1)  # models this small are slower on more
TOKENS = 8

XL: dict[str, Any] = {
    "block_out_channels": (16, 32, 32), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 12 + 16, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16 + 6 * 4,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd1-inpainting": {"in_channels": 9},
    "bk-sdm": {"mid_block_type": None},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": XL | {"transformer_layers_per_block": (1, 1, 2)},
    "sdxl-inpainting": XL | {"transformer_layers_per_block": 1, "in_channels": 9},
    "ssd-1b": XL | {
        "transformer_layers_per_block": (1, (2,), (2,)), "reverse_transformer_layers_per_block": ((1, 3), (2, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
}  # fmt: skip
"""What makes a tiny UNet one of each family."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


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


def tiny_pipeline(
    folder: Path, unet: UNet2DConditionModel | None = None, seed: int = 0, **scheduler: object
) -> DiffusionPipeline:
    """A pipeline around a tiny UNet, of the kind that fits it; its tokenizer's files go to `folder`."""
    unet = unet if unet is not None else tiny_unet(seed)
    torch.manual_seed(seed + 1)
    tokenizer = tiny_tokenizer(folder)
    xl, text_width = is_xl(unet.config), unet.config.cross_attention_dim
    text = CLIPTextModel(tiny_text(tokenizer, 12 if xl else text_width))
    parts: dict[str, Any] = {"feature_extractor": None, "requires_safety_checker": False, "safety_checker": None}
    if xl:
        second = CLIPTextModelWithProjection(
            tiny_text(tokenizer, text_width - 12, projection_dim=16, num_hidden_layers=2)
        )
        parts = {"text_encoder_2": second.eval(), "tokenizer_2": tokenizer}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) *
        2, layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    schedule = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    pipe = PAINTERS[xl, inpaints(unet.config)](
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(**schedule | scheduler), **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters one by one; its files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS, unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip


def tiny_text(tokenizer: CLIPTokenizer, width: int, **changes: object) -> CLIPTextConfig:
    words = len(tokenizer)
    return CLIPTextConfig(**{
        "vocab_size": words, "hidden_size": width, "intermediate_size": 16, "projection_dim": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": TOKENS,
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1, **changes,
    })  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense pipeline, saved; tests must not change it."""
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


def stand_in(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a network of metrics that take no space in a file: all are windows on the same numbers.

    Variances of normalisations are such that outputs neither vanish nor grow.
    """
    numbers = torch.randn(700_000, generator=torch.Generator().manual_seed(0))
    state = {name: torch.zeros_like(x) for name, x in network.state_dict().items() if x.ndim == 1}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            state[f"{name}.weight"] = numbers.as_strided(layer.weight.shape, (1009, 101, 11, 1))
        if isinstance(layer, torch.nn.BatchNorm2d):
            before = network.get_submodule(name.removesuffix(".bn") + ".conv").weight[0].numel()
            state[f"{name}.weight"] = torch.ones(layer.num_features)
            state[f"{name}.running_var"] = torch.full((layer.num_features,), before / 2)
    return state


@pytest.fixture(scope="session")
def metric_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files in the place of the published weights of FID and LPIPS."""
    folder = tmp_path_factory.mktemp("weights")
    for network, url in ((inception.Inception(), inception.URL), (lpips.Lpips(), lpips.URL)):
        state = {name: x for name, x in stand_in(network).items() if not name.startswith("heads")}
        torch.save(state, folder / url.rpartition("/")[2])
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with its processor, saved as transformers does."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    text = tiny_text(tokenizer, 16).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**sizes), tokenizer=tokenizer).save_pretrained(folder)
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
