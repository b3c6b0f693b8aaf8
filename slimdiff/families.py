"""Which models slimdiff can compress, by what their JSON files say, and the pipeline that paints with each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from slimdiff.errors import ModelError

SUPPORTED = (
    "slimdiff compresses the UNets of Stable Diffusion 1.x, 2.x and SDXL, their inpainting models, and models trimmed "
    "from them."
)

PAINTERS = {
    (False, False): StableDiffusionPipeline,
    (False, True): StableDiffusionInpaintPipeline,
    (True, False): StableDiffusionXLPipeline,
    (True, True): StableDiffusionXLInpaintPipeline,
}
"""The pipeline that paints from prompts alone, by whether a UNet is of SDXL's kind and whether it inpaints."""


def is_xl(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") == "text_time"


def inpaints(config: Mapping[str, Any]) -> bool:
    """Whether a UNet sees, beside the latents, a mask and the latents of the masked picture."""
    return bool(config["in_channels"] == 2 * config["out_channels"] + 1)


def is_told_guidance(config: Mapping[str, Any]) -> bool:
    """Whether a UNet gets the guidance scale as an input, as LCM does; the pipelines then run it without negatives."""
    return config.get("time_cond_proj_dim") is not None


def family(config: Mapping[str, Any]) -> str:
    """The key of `calib/recipes.json` that fits a UNet's config."""
    base = "sdxl" if is_xl(config) else "sd2" if config["cross_attention_dim"] == 1024 else "sd1"
    return f"{base}-inpainting" if inpaints(config) else base


def check_index(index: Mapping[str, Any], reference: str) -> None:
    """Raises ModelError unless a pipeline's model_index.json names a UNet that slimdiff may support."""
    name = index.get("_class_name")
    _, unet = index.get("unet") or (None, None)
    if unet == "SlimUNet2DConditionModel":
        raise ModelError(f"{reference} is a slim checkpoint already; pass the dense model it was made from.")
    if index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{reference} is an SDXL refiner: it only finishes the latents of another model, so prompts alone cannot "
            f"calibrate it. Compress the base model. {SUPPORTED}"
        )
    if unet == "UNet2DConditionModel":
        return
    parts = [part for key in ("transformer", "unet", "decoder", "prior") if (part := (index.get(key) or (0, 0))[1])]
    around = f" around a {parts[0]}" if parts else ", which has no UNet"
    raise ModelError(f"{reference} is a {name}{around}: not supported. {SUPPORTED}")


def check_unet(config: Mapping[str, Any], reference: str) -> None:
    """Raises ModelError unless a UNet2DConditionModel of this config is one of Stable Diffusion's."""
    given = {
        key: config[key] for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type") if config.get(key)
    }
    if config.get("addition_embed_type") not in (None, "text_time"):
        given["addition_embed_type"] = config["addition_embed_type"]
    latents = config.get("out_channels", 4)
    if config.get("in_channels", 4) not in (latents, 2 * latents + 1):
        given["in_channels"] = config["in_channels"]
    blocks = {*config.get("down_block_types", ()), config.get("mid_block_type")}
    if added := sorted(block for block in blocks if block and "SimpleCrossAttn" in block):
        given["block types"] = ", ".join(added)
    if given:
        found = ", ".join(f"{key} {value}" for key, value in given.items())
        raise ModelError(
            f"The UNet of {reference} is not one that prompts alone can drive ({found}), as in upscalers, depth and "
            f"editing models, Kandinsky, Kolors and DeepFloyd IF: not supported. {SUPPORTED}"
        )
