"""The configs of published UNets, and what they weigh: parameters, groups and multiply-accumulates, on no memory.

python benchmarks/architectures.py
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from slimdiff.capture import footprint
from slimdiff.groups import KINDS, find_groups
from slimdiff.macs import count, token_counts

TEXT_TOKENS = 77

_SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2: dict[str, Any] = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True, "upcast_attention": True,
}  # fmt: skip
_XL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD1,
    "sd15-inpainting": _SD1 | {"in_channels": 9},
    "bk-sdm-base": _SD1 | {"layers_per_block": 1},
    "bk-sdm-small": _SD1 | {"layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": _SD1 | {
        "layers_per_block": 1, "mid_block_type": None, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "sd21-base": _SD2 | {"sample_size": 64, "upcast_attention": False},
    "sd21": _SD2,
    "sd2-inpainting": _SD2 | {"sample_size": 64, "in_channels": 9, "upcast_attention": False},
    "sdxl": _XL | {"transformer_layers_per_block": (1, 2, 10)},
    "sdxl-inpainting": _XL | {"transformer_layers_per_block": (1, 2, 10), "in_channels": 9},
    "sdxl-refiner": _XL | {
        "block_out_channels": (384, 768, 1536, 1536), "attention_head_dim": (6, 12, 24, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4, "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560,
    },
    "ssd-1b": _XL | {
        "transformer_layers_per_block": (1, (2, 2), (4, 4)), "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    },
}  # fmt: skip
"""Keyword arguments of UNet2DConditionModel where the published unet/config.json differs from its defaults."""


def build(name: str) -> UNet2DConditionModel:
    """One of CONFIGS on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name])


@torch.no_grad()
def randomised(module: nn.Module, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Any:
    """A module of the meta device with seeded random weights: norms are neutral, matrices keep the variance."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module.eval()


def main() -> None:
    """Print the table; multiply-accumulates are of one forward at the native resolution, attention core included.

    GB are what the sums of calibration take on its device: without options, with --baselines, with --resnets.
    """
    print(
        "| architecture | pixels | parameters | qk / vo / ffn groups | parameters in them | GMACs | in them "
        "| GB of sums |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in CONFIGS:
        unet = build(name)
        side = unet.config.sample_size
        groups = find_groups(unet, token_counts(unet, (side, side), TEXT_TOKENS))
        total = sum(p.numel() for p in unet.parameters())
        numbers = " / ".join(str(sum(group.kind == kind for group in groups)) for kind in KINDS)
        share = sum(group.params for group in groups) / total
        macs = count(unet, (side, side), TEXT_TOKENS).total
        inside = sum(group.macs_at(group.width) for group in groups) / macs
        more = ([], *(find_groups(unet, kinds=(kind,)) for kind in ("linear", "resnet")))
        sums = " / ".join(f"{footprint(unet, groups + others) / 1e9:.2f}" for others in more)
        print(
            f"| {name} | {8 * side} | {total / 1e6:.1f}M | {numbers} | {share:.1%} | {macs / 1e9:.1f} | {inside:.1%} "
            f"| {sums} |"
        )


if __name__ == "__main__":
    main()
