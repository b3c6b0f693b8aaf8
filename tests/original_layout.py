"""Writes a tiny pipeline as one file in the layout of the original Stable Diffusion code; diffusers only reads it.

The names are those of diffusers' scripts/convert_diffusers_to_original_{stable_diffusion,sdxl}.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

LAYERS = 1
"""Layers of each block of the tiny UNets and VAEs, which decide the numbers of the original's flat lists."""

STEP = LAYERS + 1

Renaming = Sequence[tuple[str, Any]]

RESNET: Renaming = (
    (r"\.norm1\.", ".in_layers.0."), (r"\.conv1\.", ".in_layers.2."), (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."), (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)  # fmt: skip
UNET: Renaming = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{STEP * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{STEP * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{STEP * (int(m[1]) + 1)}.0.op"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{STEP * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{STEP * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{STEP * int(m[1]) + LAYERS}.2"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
)  # fmt: skip
VAE: Renaming = (
    (r"coder\.down_blocks\.(\d)\.resnets\.(\d)", r"coder.down.\1.block.\2"),
    (r"coder\.down_blocks\.(\d)\.downsamplers\.0", r"coder.down.\1.downsample"),
    (r"coder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"coder.up.{1 - int(m[1])}.block.{m[2]}"),
    (r"coder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"coder.up.{1 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"), (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
)  # fmt: skip
OPEN_CLIP: Renaming = (
    (r"^(text_model\.)?", ""), (r"^encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"),
    (r"^final_layer_norm", "ln_final"), (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_projection\.weight", "text_projection"),
)  # fmt: skip


def renamed(module: nn.Module, renaming: Renaming) -> dict[str, Tensor]:
    found = {}
    for name, tensor in module.state_dict().items():
        for pattern, new in renaming:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def unet(model: nn.Module) -> dict[str, Tensor]:
    def resnet(name: str) -> Renaming:
        return RESNET if ".resnets." in name else ()

    names = {}
    for name, tensor in model.state_dict().items():
        new = name
        for pattern, replacement in (*resnet(name), *UNET):
            new = re.sub(pattern, replacement, new)
        names[new] = tensor
    # Without attention in a block, its upsampler comes second, not third.
    for name in [name for name in names if re.search(r"^output_blocks\.\d+\.2\.", name)]:
        block = name.rpartition(".2.")[0]
        if not any(other.startswith(f"{block}.1.") for other in names if other != name):
            names[name.replace(".2.", ".1.", 1)] = names.pop(name)
    return names


def vae(model: nn.Module) -> dict[str, Tensor]:
    """The attention's matrices are 1 x 1 convolutions there."""
    found = renamed(model, VAE)
    matrix = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {name: t[:, :, None, None] if matrix.search(name) else t for name, t in found.items()}


def clip(model: nn.Module) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.state_dict().items()}


def open_clip(model: nn.Module) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix there, and the projection is transposed."""
    found = renamed(model, OPEN_CLIP)
    found["text_projection"] = found["text_projection"].T
    for kind in ("weight", "bias"):
        for name in [name for name in found if name.endswith(f"self_attn.q_proj.{kind}")]:
            block = name.removesuffix(f"self_attn.q_proj.{kind}")
            parts = [found.pop(f"{block}self_attn.{x}_proj.{kind}") for x in "qkv"]
            found[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def save(pipe: DiffusionPipeline, path: Path) -> None:
    """`pipe`, of SD 1.x's or SDXL's kind, as a single file."""
    parts = {"model.diffusion_model": unet(pipe.unet), "first_stage_model": vae(pipe.vae)}
    if hasattr(pipe, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer"] = clip(pipe.text_encoder)
        parts["conditioner.embedders.1.model"] = open_clip(pipe.text_encoder_2)
    else:
        parts["cond_stage_model.transformer"] = clip(pipe.text_encoder)
    save_file({f"{prefix}.{name}": t.contiguous() for prefix, part in parts.items() for name, t in part.items()}, path)
