"""Single `.safetensors` files in the layout of the original Stable Diffusion code (kohya, Civitai)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from slimdiff.errors import ModelError
from slimdiff.families import PAINTERS, SUPPORTED

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
"""The UNet's first convolution, (channels, input channels, 3, 3)."""


def load(path: str, config: str | None, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    """The pipeline in a file; `config` is a diffusers folder or hub id of the same family, `parts` replace its own.

    Without `config`, diffusers recognises the family and takes its configs from the hub or its cache.

    Raises ModelError for a file that holds no supported pipeline, and what diffusers raises.
    """
    kind = _painter(path)
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
    return pipe


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


def _painter(path: str) -> type[DiffusionPipeline]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        channels = file.get_slice(FIRST).get_shape()[1] if FIRST in names else 0
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
