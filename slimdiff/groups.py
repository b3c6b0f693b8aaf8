"""The functional groups of a UNet: where they are, how wide, what they cost. The only file that knows a UNet's layout.

An attention layer holds two groups: `<path>.qk` (query and key projections, which meet in the logits) and `<path>.vo`
(value and output projections, which meet in the head outputs). A feed-forward layer is one group, `<path>.ffn`. A
group's width is what compression cuts: the width of one head for `qk` and `vo`, the number of hidden units for `ffn`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from slimdiff.errors import ModelError

Kind = Literal["qk", "vo", "ffn"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Group:
    """One group of a UNet.

    `module` is the dotted path of its layer; `heads` is 1 for `ffn`. `params_per_width` and `macs_per_width` are what
    one step of width costs over all heads: parameters, and multiply-accumulates of one forward pass of one sample,
    attention core included. Both are linear in the width.
    """

    name: str
    kind: Kind
    module: str
    heads: int
    width: int
    params_per_width: int
    macs_per_width: int

    @property
    def params(self) -> int:
        return self.width * self.params_per_width


def find_groups(unet: nn.Module, tokens: dict[str, tuple[int, int]] | None = None) -> list[Group]:
    """The groups of a UNet in the order data meets them: down, mid, up.

    `tokens` gives each layer's number of query and key tokens per sample (see `macs.token_counts`); without it
    `macs_per_width` is 0.

    Raises ModelError if there is none, or if a layer has a form that cannot be cut without changing its meaning.
    """
    groups: list[Group] = []
    for path, layer in sorted(unet.named_modules(), key=_stage):
        queries, keys = (tokens or {}).get(path, (0, 0))
        if isinstance(layer, Attention):
            groups += _attention_groups(path, layer, queries, keys)
        elif isinstance(layer, FeedForward):
            groups.append(_feed_forward_group(path, layer, queries))
    if not groups:
        raise ModelError(
            f"{type(unet).__name__} has no attention or feed-forward layer of the kind found in Stable Diffusion "
            "1.x, 2.x and SDXL UNets, so there is nothing to compress. Pass a pipeline with a UNet2DConditionModel."
        )
    return groups


def _stage(item: tuple[str, nn.Module]) -> int:
    """Modules are registered in another order than data meets them."""
    return {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(item[0].split(".")[0], 0)


def _attention_groups(path: str, layer: Attention, queries: int, keys: int) -> list[Group]:
    if layer.fused_projections:
        raise ModelError(f"{path} has fused projections; call unfuse_qkv_projections() before calibrating.")
    if layer.norm_q is not None or layer.norm_k is not None or layer.added_kv_proj_dim is not None:
        raise ModelError(
            f"{path} normalises its queries and keys or has added projections; slimdiff supports the plain attention "
            "of Stable Diffusion 1.x, 2.x and SDXL."
        )
    h, biases = layer.heads, (layer.to_q.bias is not None) + (layer.to_k.bias is not None)
    d = layer.to_q.out_features // h
    core = queries * keys * h
    qk_params = h * (layer.to_q.in_features + layer.to_k.in_features + biases)
    qk_macs = h * (queries * layer.to_q.in_features + keys * layer.to_k.in_features) + core
    vo_params = h * (layer.to_v.in_features + (layer.to_v.bias is not None) + layer.to_out[0].out_features)
    vo_macs = h * (keys * layer.to_v.in_features + queries * layer.to_out[0].out_features) + core
    return [
        Group(f"{path}.qk", "qk", path, h, d, qk_params, qk_macs),
        Group(f"{path}.vo", "vo", path, h, d, vo_params, vo_macs),
    ]


def _feed_forward_group(path: str, layer: FeedForward, tokens: int) -> Group:
    into, out = _feed_forward_parts(path, layer)
    halves = into.out_features // out.in_features
    per_width = halves * into.in_features + out.out_features
    params = per_width + halves * (into.bias is not None)
    return Group(f"{path}.ffn", "ffn", path, 1, out.in_features, params, tokens * per_width)


def _feed_forward_parts(path: str, layer: FeedForward) -> tuple[nn.Linear, nn.Linear]:
    into, out = getattr(layer.net[0], "proj", None), layer.net[2]
    if not isinstance(into, nn.Linear) or into.out_features != 2 * out.in_features:
        raise ModelError(f"{path} is a {type(layer.net[0]).__name__} feed-forward; slimdiff supports GEGLU only.")
    return into, out


@dataclass(frozen=True)
class Probe:
    """Where one statistic of a group is read: a module's `input` or `output`, and how its tokens are centred."""

    statistic: str
    module: nn.Module
    at: Literal["input", "output"]
    per_head: bool
    centred: bool


def probes(unet: nn.Module, group: Group) -> list[Probe]:
    """What calibration has to record for a group: queries and keys, head outputs, or hidden units."""
    layer: Any = unet.get_submodule(group.module)
    if group.kind == "qk":
        return [
            Probe("q", layer.to_q, "output", per_head=True, centred=False),
            Probe("k", layer.to_k, "output", per_head=True, centred=True),
        ]
    if group.kind == "vo":
        return [Probe("z", output_layer(unet, group), "input", per_head=False, centred=False)]
    return [Probe("u", output_layer(unet, group), "input", per_head=False, centred=False)]


@dataclass(frozen=True)
class Names:
    """Names of a group's weights in the UNet's state dict, each `None` where the layer has no bias.

    `into` lists what maps into the cut width (queries and keys; values; the GEGLU projection), `out` what maps out.
    """

    into: tuple[tuple[str, str | None], ...]
    out: tuple[str, str | None] | None


def names(unet: nn.Module, group: Group) -> Names:
    def of(path: str) -> tuple[str, str | None]:
        linear = unet.get_submodule(f"{group.module}.{path}")
        return f"{group.module}.{path}.weight", f"{group.module}.{path}.bias" if linear.bias is not None else None

    if group.kind == "qk":
        return Names((of("to_q"), of("to_k")), None)
    if group.kind == "vo":
        return Names((of("to_v"),), of("to_out.0"))
    return Names((of("net.0.proj"),), of("net.2"))


def select(groups: Iterable[Group], kinds: Iterable[str]) -> list[Group]:
    wanted = set(kinds)
    return [group for group in groups if group.kind in wanted]


def output_layer(unet: nn.Module, group: Group) -> nn.Linear:
    """The projection through which a value-output or feed-forward group leaves its layer."""
    layer: Any = unet.get_submodule(group.module)
    return layer.to_out[0] if group.kind == "vo" else layer.net[2]


def residual_norm(unet: nn.Module, group: Group) -> nn.Module:
    """The norm whose input is the residual stream that a group's layer reads from and adds to."""
    block, _, own = group.module.rpartition(".")
    norm = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}[own]
    return unet.get_submodule(f"{block}.{norm}")
