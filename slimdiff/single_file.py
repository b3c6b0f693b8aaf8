"""Single `.safetensors` files in the layout of the original Stable Diffusion code (kohya, Civitai)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from slimdiff.errors import ModelError
from slimdiff.families import PAINTERS, SUPPORTED, family

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
"""The UNet's first convolution, (channels, input channels, 3, 3)."""

SIDE = 32
"""Height and width of the latents that a UNet is asked with what it predicts."""

MARKS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
"""Tensors by whose names ComfyUI and A1111 know the schedule of an SDXL model, and what they say of it."""


def load(path: str, config: str | None, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    """The pipeline in a file; `config` is a diffusers folder or hub id of the same family, `parts` replace its own.

    Without `config`, diffusers recognises the family and takes its configs from the hub or its cache. What the UNet
    predicts is read off SDXL's marks for it, and asked from the UNet for SD 2.x, whose files diffusers all takes for
    the velocity-predicting model of 768 px.

    Raises ModelError for a file that holds no supported pipeline, and what diffusers raises.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        kind = _painter(path, names, file.get_slice(FIRST).get_shape()[1] if FIRST in names else 0)
    try:
        pipe: DiffusionPipeline = kind.from_single_file(path, config=config, torch_dtype=dtype, **parts)
    except FileNotFoundError as error:
        if config is not None:
            raise
        raise ModelError(
            f"{path} needs the configs of its family (tokenizer, scheduler), and the hub cannot be reached for them. "
            "Pass --config with a diffusers folder of the same family."
        ) from error
    except SingleFileComponentError as error:
        raise ModelError(
            f"{path} is not a complete model: {str(error).strip().splitlines()[0]} Use a file that holds UNet, text "
            "encoders and VAE; a missing VAE can be given with --vae."
        ) from error
    schedule = {key: value for mark in MARKS.keys() & names for key, value in MARKS[mark].items()}
    if config is None and pipe.unet is not None and family(pipe.unet.config) == "sd2" and predicts_noise(pipe.unet):
        schedule["prediction_type"] = "epsilon"
        pipe.unet.register_to_config(sample_size=64)
    if schedule:
        pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **schedule})
    return pipe


@torch.no_grad()
def predicts_noise(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet of SD 1.x or 2.x predicts noise, rather than velocity (Salimans & Ho, arXiv 2202.00512).

    At the last of 1000 timesteps latents are nearly all noise: a UNet that predicts noise returns about its input,
    while velocity is about the negative of clean latents there, which the noise tells next to nothing of.
    """
    generator, dtype = torch.Generator().manual_seed(0), unet.dtype
    latents = torch.randn(1, unet.config.in_channels, SIDE, SIDE, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    found = unet.float()(latents, 999, text).sample  # half precision is slow on the CPU
    unet.to(dtype)
    return bool(torch.corrcoef(torch.stack([latents.flatten(), found.flatten()]))[0, 1] > 0.5)


def load_vae(reference: str, config: str | None, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE from a `.safetensors` file, its own folder, a pipeline's, or the hub.

    `config` is the pipeline's folder or hub id from which a file takes its config.

    Raises ModelError if there is none.
    """
    options: dict[str, Any] = {"torch_dtype": dtype}
    try:
        if reference.endswith(".safetensors"):
            where = {} if config is None else {"config": config, "subfolder": "vae"}
            return AutoencoderKL.from_single_file(reference, **where, **options)
        where = {"subfolder": "vae"} if Path(reference, "vae").is_dir() else {}
        return AutoencoderKL.from_pretrained(reference, use_safetensors=True, **where, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, SingleFileComponentError) as error:
        raise ModelError(
            f"Cannot load the VAE {reference}: {str(error).strip().splitlines()[0]} Pass an AutoencoderKL as a "
            ".safetensors file, a diffusers folder or a hub id."
        ) from error


def _painter(path: str, names: Collection[str], channels: int) -> type[DiffusionPipeline]:
    is_xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    what = None
    if not channels:
        what = f"{len(names)} tensors such as {min(names, default='none')}, but no {FIRST}"
    elif channels not in (4, 9):
        what = f"a UNet with {channels} input channels"
    elif not is_xl and any(name.startswith("conditioner.") for name in names):
        what = "an SDXL refiner, which only finishes the latents of another model"
    if what:
        raise ModelError(f"{path} holds {what}: not supported. {SUPPORTED}")
    return PAINTERS[is_xl, channels == 9]
