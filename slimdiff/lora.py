"""LoRAs: merged into a dense pipeline, or converted from a dense model's into its slim one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimdiff.errors import ModelError, OutputError
from slimdiff.files import replacing
from slimdiff.slim_unet import SlimUNet2DConditionModel

_FOREIGN = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "oft_")
"""Parts of tensor names in adapters that are no plain LoRAs: DoRA, LoHa, LoKr, OFT."""

_PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What LoRAs of Stable Diffusion change: diffusers begins the names of their tensors with it."""


def convert(lora: Path, unet: SlimUNet2DConditionModel, output: Path, force: bool = False) -> None:
    """Write a LoRA of the dense model as one of its slim `unet`.

    The new file has the names of peft for the UNet's part, and scales by alpha folded into the weights, so that tools
    need nothing but it. What is for text encoders stays.

    Raises ModelError if `lora` cannot be read, is no plain LoRA, or does not fit the model, OutputError if `output`
    exists and `force` is not set, or if it cannot be written.
    """
    if output.exists() and not force:
        raise OutputError(f"{output} exists. Choose another file, or pass --force to replace it.")
    dense, metadata = read(lora, unet.config)
    with torch.device("meta"):
        uncut = SlimUNet2DConditionModel.from_config(unet.config, slim_ranks={}, slim_maps=0)
    if (wrong := misfit(dense, unet=uncut)) and misfit(dense, unet=unet):
        raise ModelError(
            f"{lora} does not fit the dense model that the slim one was made from: {wrong}. It was trained on another "
            "model; convert it for a slim checkpoint of that one."
        )
    try:
        slim = unet.mapped_lora(dense)
    except ValueError as error:
        raise ModelError(f"{lora}: {error}") from error
    with replacing(output) as temporary:
        save_file({name: x.contiguous() for name, x in slim.items()}, temporary, metadata)


def merge(pipe: DiffusionPipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Add LoRAs, files and their scales, to the weights of a dense pipeline for good, its text encoders' among them.

    Sums are rounded once, from float64, so that the merged model is the same, and has the same fingerprint, wherever it
    is made. Raises ModelError if a file is no plain LoRA or does not fit, or if peft is missing.
    """
    if loras and find_spec("peft") is None:
        raise ModelError("LoRAs need the package peft, which is not installed: pip install 'slimdiff[lora]' or peft.")
    parts = {name: part for name in _PARTS if (part := getattr(pipe, name, None)) is not None}
    for file, scale in loras:
        try:
            if wrong := misfit(read(Path(file), pipe.unet.config)[0], **parts):
                raise ModelError(
                    f"The LoRA {file} cannot be merged: {wrong}. It was trained on another model; take one of this "
                    "model, or calibrate the model that it was trained on."
                )
            pipe.load_lora_weights(file, adapter_name="merged")
        except (OSError, SafetensorError, ValueError, RuntimeError, ImportError) as error:
            raise ModelError(f"The LoRA {file} cannot be merged: {str(error).strip().splitlines()[0]}") from error
        for component in pipe.components.values():
            layers: Any = component.modules() if isinstance(component, nn.Module) else ()
            for layer in layers:
                if "merged" in getattr(layer, "lora_A", ()):
                    for side in (layer.lora_A, layer.lora_B):
                        side.double()
                    weight = layer.get_base_layer().weight
                    weight.data = (weight.double() + scale * layer.get_delta_weight("merged")).to(weight.dtype)
        pipe.unload_lora_weights()


def read(lora: Path, unet_config: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA's tensors as diffusers names them, alpha folded in, and the file's metadata.

    Raises ModelError if it cannot be read, is no plain LoRA, or none of Stable Diffusion.
    """
    try:
        with safe_open(lora, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        check_plain(lora, names)
        tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(lora), unet_config=unet_config, use_safetensors=True
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{lora} cannot be read as a LoRA in a .safetensors file: {error}") from error
    if not any(name.partition(".")[0] in _PARTS for name in tensors):
        many = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
        found = f"{many} such as {names[0]}" if names else "no tensor"
        raise ModelError(
            f"{lora} holds {found}, none of a LoRA for a UNet or text encoder of Stable Diffusion. Pass a LoRA in the "
            "format of diffusers, peft or kohya."
        )
    for name, alpha in (alphas or {}).items():
        down = name.removesuffix(".alpha")
        down = down if down in tensors else f"{down}.lora.down.weight"
        tensors[down] = tensors[down] * (alpha / len(tensors[down]))
    return tensors, metadata


def misfit(tensors: Mapping[str, Tensor], **parts: nn.Module) -> str | None:
    """Why a LoRA, its tensors named as `read` does, does not fit these parts of a pipeline: its first layer that is not
    there, or has other sides. None if it fits."""
    for part, module in parts.items():
        layers = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
        own = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
        if own and "lora_A" not in next(iter(own)):
            own = (convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft)(own)
        for name, x in own.items():
            path, _, matrix = name.partition(".lora_")
            weight = getattr(layers.get(path.removeprefix("text_model.")), "weight", None)
            if weight is None:
                return f"it changes {path}, which is not there"
            side = {"A.weight": 1, "B.weight": 0}.get(matrix)
            if side is not None and x.shape[side] != weight.shape[side]:
                what = ("outputs", "inputs")[side]
                return f"it changes {path} with {x.shape[side]} {what}, and there are {weight.shape[side]}"
    return None


def check_plain(lora: Path, names: list[str]) -> None:
    """Raises ModelError unless these names of tensors are those of a plain LoRA."""
    if foreign := next((name for name in names if any(part in name for part in _FOREIGN)), None):
        raise ModelError(
            f"{lora} is no plain LoRA ({foreign}): a DoRA, LoHa, LoKr or OFT changes layers in ways that cut layers "
            "cannot follow. Merge it into the dense model with the tool that made it, and compress the result."
        )
