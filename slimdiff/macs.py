"""Multiply-accumulates of one UNet forward pass, counted on the meta device: nothing is computed, nothing allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Macs:
    """Of one sample. Papers differ in whether they count the attention core (softmax(QKᵀ)V without projections)."""

    total: int
    core: int

    @property
    def without_core(self) -> int:
        return self.total - self.core


def meta_inputs(
    unet: UNet2DConditionModel, latent_size: tuple[int, int], text_tokens: int, rows: int = 1
) -> dict[str, Any]:
    """Arguments of a forward pass on the meta device; `latent_size` is (height, width)."""
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": torch.empty(rows, config.in_channels, *latent_size),
        "timestep": torch.empty(rows),
        "encoder_hidden_states": torch.empty(rows, text_tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(rows, pooled), "time_ids": torch.empty(rows, 6)}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.empty(rows, config.time_cond_proj_dim)
    return inputs


def count(unet: UNet2DConditionModel, latent_size: tuple[int, int], text_tokens: int = 77) -> Macs:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = type(unet).from_config(unet.config)
        twin(**meta_inputs(unet, latent_size, text_tokens))
    flops = counter.get_flop_counts()["Global"]
    # On the meta device the fused attention runs as two batched products; nothing else in these UNets uses bmm.
    core = sum(n for operation, n in flops.items() if "attention" in str(operation) or "bmm" in str(operation))
    return Macs(counter.get_total_flops() // 2, core // 2)


def _tokens(x: Tensor) -> int:
    """Of (B, n, C), or of a picture (B, C, H, W)."""
    return x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]


def token_counts(
    unet: UNet2DConditionModel, latent_size: tuple[int, int], text_tokens: int = 77
) -> dict[str, tuple[int, int]]:
    """Query and key tokens per sample of every attention and feed-forward layer and ResNet block.

    Of those two both are the tokens, or pixels, of its outputs.
    """
    counts: dict[str, tuple[int, int]] = {}

    def watch(path: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            context = kwargs.get("encoder_hidden_states")
            counts[path] = (_tokens(output), _tokens(output if context is None else context))

        layer.register_forward_hook(hook, with_kwargs=True)

    with torch.device("meta"):
        twin = type(unet).from_config(unet.config)
        for path, layer in twin.named_modules():
            if isinstance(layer, Attention | FeedForward | ResnetBlock2D):
                watch(path, layer)
        twin(**meta_inputs(unet, latent_size, text_tokens))
    return counts
