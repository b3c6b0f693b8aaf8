"""Pipelines in the layout of the original Stable Diffusion code, as A1111, ComfyUI and kohya load it from one file.

The names are those of diffusers' `scripts/convert_diffusers_to_original_stable_diffusion.py` and `..._sdxl.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.families import family, is_xl

Renaming = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions and what takes their place, one after the other."""

_RESNET: Renaming = (
    (r"(resnets\.\d+)\.norm1\.", r"\1.in_layers.0."), (r"(resnets\.\d+)\.conv1\.", r"\1.in_layers.2."),
    (r"(resnets\.\d+)\.norm2\.", r"\1.out_layers.0."), (r"(resnets\.\d+)\.conv2\.", r"\1.out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."), (r"(resnets\.\d+)\.conv_shortcut\.", r"\1.skip_connection."),
)  # fmt: skip
_OPEN_CLIP: Renaming = (
    (r"^(text_model\.)?", ""), (r"^encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"),
    (r"^final_layer_norm", "ln_final"), (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_projection\.weight", "text_projection"),
)  # fmt: skip


def pipeline(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline of SD 1.x, 2.x or SDXL, under the original's names."""
    parts = {"model.diffusion_model": unet(pipe.unet), "first_stage_model": vae(pipe.vae)}
    if is_xl(pipe.unet.config):
        parts["conditioner.embedders.0.transformer"] = clip(pipe.text_encoder)
        parts["conditioner.embedders.1.model"] = open_clip(pipe.text_encoder_2)
    elif family(pipe.unet.config).startswith("sd2"):
        parts["cond_stage_model.model"] = open_clip(pipe.text_encoder)
    else:
        parts["cond_stage_model.transformer"] = clip(pipe.text_encoder)
    found = {f"{prefix}.{name}": x.contiguous() for prefix, part in parts.items() for name, x in part.items()}
    return found | _marks(pipe)


def _marks(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Empty tensors by whose names ComfyUI and A1111 know what an SDXL model predicts and how its noise ends."""
    schedule = pipe.scheduler.config
    marks = {
        "v_pred": schedule.get("prediction_type") == "v_prediction",
        "ztsnr": bool(schedule.get("rescale_betas_zero_snr")),
    }
    return {name: torch.zeros(0) for name, holds in marks.items() if holds and is_xl(pipe.unet.config)}


def unet(model: Any) -> dict[str, Tensor]:
    """Its blocks are one flat list on the way down and one on the way up, each layer's parts numbered."""
    step = model.config.layers_per_block + 1
    attends = ["CrossAttn" in kind for kind in model.config.up_block_types]

    def down(part: int) -> Callable[[re.Match[str]], str]:
        return lambda m: f"input_blocks.{step * int(m[1]) + int(m[2]) + 1}.{part}"

    def up(part: int) -> Callable[[re.Match[str]], str]:
        return lambda m: f"output_blocks.{step * int(m[1]) + int(m[2])}.{part}"

    renaming: Renaming = (
        *_RESNET,
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", down(0)), (r"^down_blocks\.(\d+)\.attentions\.(\d+)", down(1)),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{step * (int(m[1]) + 1)}.0.op"),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", up(0)), (r"^up_blocks\.(\d+)\.attentions\.(\d+)", up(1)),
        (r"^up_blocks\.(\d+)\.upsamplers\.0",
         lambda m: f"output_blocks.{step * int(m[1]) + step - 1}.{1 + attends[int(m[1])]}"),
        (r"^mid_block\.resnets\.(\d+)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
    )  # fmt: skip
    return _renamed(model.state_dict(), renaming)


def vae(model: Any) -> dict[str, Tensor]:
    """Its decoder's blocks are numbered from the finest, its attention's matrices are 1 x 1 convolutions."""
    last = len(model.config.block_out_channels) - 1
    renaming: Renaming = (
        (r"coder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"coder.down.\1.block.\2"),
        (r"coder\.down_blocks\.(\d+)\.downsamplers\.0", r"coder.down.\1.downsample"),
        (r"coder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"coder.up.{last - int(m[1])}.block.{m[2]}"),
        (r"coder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"coder.up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"), (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    )  # fmt: skip
    matrix = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    found = _renamed(model.state_dict(), renaming)
    return {name: x[:, :, None, None] if matrix.search(name) else x for name, x in found.items()}


def clip(model: nn.Module) -> dict[str, Tensor]:
    """As in transformers 4; version 5 leaves out a prefix."""
    return {f"text_model.{name.removeprefix('text_model.')}": x for name, x in model.state_dict().items()}


def open_clip(model: nn.Module) -> dict[str, Tensor]:
    """Its queries, keys and values are one matrix, and its projection is transposed."""
    found = _renamed(model.state_dict(), _OPEN_CLIP)
    if "text_projection" in found:
        found["text_projection"] = found["text_projection"].T
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        block, kind = name.split(".self_attn.q_proj.")
        parts = [found.pop(f"{block}.self_attn.{x}_proj.{kind}") for x in "qkv"]
        found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def _renamed(state: Mapping[str, Tensor], renaming: Renaming) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for pattern, new in renaming:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found
