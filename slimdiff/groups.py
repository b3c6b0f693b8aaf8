"""The functional groups of a UNet: where they are, how wide, what they cost. The only file that knows a UNet's layout.

An attention layer holds two groups: `<path>.qk` (query and key projections, which meet in the logits) and `<path>.vo`
(value and output projections, which meet in the head outputs). A feed-forward layer is one group, `<path>.ffn`. A
group's width is what compression cuts: the width of one head for `qk` and `vo`, the number of hidden units for `ffn`.
A ResNet block is one group, `<path>.resnet`, cut only where it is asked for: between its two convolutions lies a group
norm, and its width is the number of channels in each group of that norm.

Two more kinds are what other methods cut: `<path>.heads`, whole heads of an attention layer, and `<path>.linear`, the
rank of one matrix alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from slimdiff.errors import ModelError

Kind = Literal["qk", "vo", "ffn", "resnet", "heads", "linear"]
KINDS: tuple[Kind, ...] = ("qk", "vo", "ffn")
"""What slimdiff itself cuts unless told otherwise."""


@dataclass(frozen=True)
class Group:
    """One group of a UNet.

    `module` is the dotted path of its layer; `heads` is 1 for `ffn` and `linear`, for `resnet` the number of groups of
    the norm. `params_per_width` and `macs_per_width` are what one step of width costs over all heads: parameters, and
    multiply-accumulates of one forward pass of one sample, attention core included. Both are linear in the width, but
    for the full width of `linear`, a single matrix, which costs `whole` (parameters, MACs).
    """

    name: str
    kind: Kind
    module: str
    heads: int
    width: int
    params_per_width: int
    macs_per_width: int
    whole: tuple[int, int] | None = None

    @property
    def params(self) -> int:
        return self.params_at(self.width)

    def params_at(self, width: int) -> int:
        return self.whole[0] if self.whole and width == self.width else width * self.params_per_width

    def macs_at(self, width: int) -> int:
        return self.whole[1] if self.whole and width == self.width else width * self.macs_per_width


def find_groups(
    unet: nn.Module, tokens: dict[str, tuple[int, int]] | None = None, kinds: Collection[str] = KINDS
) -> list[Group]:
    """The groups of a UNet in the order data meets them: down, mid, up.

    `tokens` gives each layer's number of query and key tokens per sample (see `macs.token_counts`); without it MACs
    are 0. `linear` among `kinds` stands for the matrices of those layers that no other kind of `kinds` cuts.

    Raises ModelError if there is none, or if a layer has a form that cannot be cut without changing its meaning.
    """
    groups: list[Group] = []
    for path, layer in sorted(unet.named_modules(), key=_place):
        queries, keys = (tokens or {}).get(path, (0, 0))
        if isinstance(layer, Attention):
            found = _attention_groups(path, layer, queries, keys)
        elif isinstance(layer, FeedForward):
            found = _feed_forward_groups(path, layer, queries)
        elif isinstance(layer, ResnetBlock2D):
            found = [_resnet_group(path, layer, queries)]
        else:
            continue
        own = [group for group in found if group.kind in kinds and group.kind != "linear"]
        groups += own or [group for group in found if group.kind in kinds]
    if not any(isinstance(layer, Attention | FeedForward) for layer in unet.modules()):
        raise ModelError(
            f"{type(unet).__name__} has no attention or feed-forward layer of the kind found in Stable Diffusion "
            "1.x, 2.x and SDXL UNets, so there is nothing to compress. Pass a pipeline with a UNet2DConditionModel."
        )
    return groups


def by_name(unet: nn.Module) -> dict[str, Group]:
    """The groups of every kind. Raises as `find_groups` does."""
    every = (*KINDS, "resnet"), ("heads",), ("linear",)
    return {group.name: group for kinds in every for group in find_groups(unet, kinds=kinds)}


def _place(item: tuple[str, nn.Module]) -> tuple[int, ...]:
    """Where data meets a module: stage, block, and layer of the block. Modules are registered in another order."""
    path = item[0].split(".")
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(path[0], 0)
    numbers = [*([0] if stage == 1 else []), *(int(part) for part in path if part.isdigit()), 0, 0]
    return stage, numbers[0], 2 * numbers[1] + ("attentions" in path)


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
    out = layer.to_out[0]
    qk_params = h * (layer.to_q.in_features + layer.to_k.in_features + biases)
    qk_macs = h * (queries * layer.to_q.in_features + keys * layer.to_k.in_features) + core
    vo_params = h * (layer.to_v.in_features + (layer.to_v.bias is not None) + out.out_features)
    vo_macs = h * (keys * layer.to_v.in_features + queries * out.out_features) + core
    return [
        Group(f"{path}.qk", "qk", path, h, d, qk_params, qk_macs),
        Group(f"{path}.vo", "vo", path, h, d, vo_params, vo_macs),
        Group(f"{path}.heads", "heads", path, h, h, (qk_params + vo_params) * d // h, (qk_macs + vo_macs) * d // h),
        _linear_group(f"{path}.to_q", layer.to_q, queries),
        _linear_group(f"{path}.to_k", layer.to_k, keys),
        _linear_group(f"{path}.to_v", layer.to_v, keys),
        _linear_group(f"{path}.to_out.0", out, queries),
    ]


def _feed_forward_groups(path: str, layer: FeedForward, tokens: int) -> list[Group]:
    into, out = _feed_forward_parts(path, layer)
    halves = into.out_features // out.in_features
    per_width = halves * into.in_features + out.out_features
    params = per_width + halves * (into.bias is not None)
    return [
        Group(f"{path}.ffn", "ffn", path, 1, out.in_features, params, tokens * per_width),
        _linear_group(f"{path}.net.0.proj", into, tokens),
        _linear_group(f"{path}.net.2", out, tokens),
    ]


def _resnet_group(path: str, block: ResnetBlock2D, pixels: int) -> Group:
    """`pixels` are those of the block's outputs, where both of its convolutions work."""
    channels, groups = block.norm2.num_channels, block.norm2.num_groups
    weights = block.conv1.weight[0].numel() + block.conv2.weight[:, 0].numel()
    params, macs = weights + 3, pixels * weights  # a bias, and the norm's scale and shift
    if block.time_emb_proj is not None:
        times, rows = block.time_emb_proj.in_features, block.time_emb_proj.out_features // channels
        params, macs = params + rows * (times + 1), macs + rows * times
    return Group(f"{path}.resnet", "resnet", path, groups, channels // groups, groups * params, groups * macs)


def _linear_group(path: str, layer: nn.Linear, tokens: int) -> Group:
    """Two factors of rank r in the place of a matrix; its bias stays."""
    a, b = layer.in_features, layer.out_features
    return Group(f"{path}.linear", "linear", path, 1, min(a, b), a + b, tokens * (a + b), (a * b, tokens * a * b))


def _feed_forward_parts(path: str, layer: FeedForward) -> tuple[nn.Linear, nn.Linear]:
    into, out = getattr(layer.net[0], "proj", None), layer.net[2]
    if not isinstance(into, nn.Linear) or into.out_features != 2 * out.in_features:
        raise ModelError(f"{path} is a {type(layer.net[0]).__name__} feed-forward; slimdiff supports GEGLU only.")
    return into, out


@dataclass(frozen=True)
class Probe:
    """One statistic: where tokens are read (a module's `input` or `output`), as how many heads of which width, whether
    each sample's mean is taken off, and whether the halves of guidance are put together first. `patches` says that it
    is a convolution's, over the pictures it reads. `key` names it in the statistics file; equal keys are equal tokens.
    """

    key: str
    module: nn.Module
    at: Literal["input", "output"]
    heads: int
    width: int
    centred: bool = False
    guided: bool = False
    patches: bool = False


def probes(unet: nn.Module, group: Group, guided: bool = True) -> list[Probe]:
    """What calibration has to record for a group: queries and keys, head outputs, hidden units, a matrix's inputs, or
    the patches under a block's second convolution.

    Hidden units of a feed-forward group are `guided`, or plain as all others are.
    """
    layer: Any = unet.get_submodule(group.module)
    if group.kind == "linear":
        path = _parent(group.module)
        return [Probe(_input_key(unet, path, group.module[len(path) + 1 :]), layer, "input", 1, layer.in_features)]
    if group.kind == "qk":
        return [
            Probe(f"{group.name}:q", layer.to_q, "output", group.heads, group.width),
            Probe(f"{group.name}:k", layer.to_k, "output", group.heads, group.width, centred=True),
        ]
    if group.kind == "resnet":
        _, convolution = inner_layers(unet, group)
        return [Probe(f"{group.name}:p", convolution, "input", 1, convolution.in_channels, guided=True, patches=True)]
    out = output_layer(unet, group)
    if group.kind == "ffn" and guided:
        return [Probe(guided_key(group), out, "input", 1, out.in_features, guided=True)]
    return [Probe(_output_key(group.module, group.kind), out, "input", 1, out.in_features)]


def inputs(unet: nn.Module, group: Group) -> list[str]:
    """Keys of the tokens that each matrix into an attention layer's group multiplies, in the order of `Names.into`."""
    matrices = {"qk": ("to_q", "to_k"), "vo": ("to_v",)}[group.kind]
    return [_input_key(unet, group.module, matrix) for matrix in matrices]


def guided_key(group: Group) -> str:
    """Key of the hidden units of a feed-forward group with the halves of guidance put together."""
    return f"{group.name}:g"


def _parent(linear: str) -> str:
    """Path of the attention or feed-forward layer that a matrix belongs to."""
    for end in (".to_q", ".to_k", ".to_v", ".to_out.0", ".net.0.proj", ".net.2"):
        if linear.endswith(end):
            return linear.removesuffix(end)
    raise ValueError(linear)


def _output_key(path: str, kind: str) -> str:
    """Of the tokens that leave a layer through its last matrix: head outputs z, or hidden units u."""
    return f"{path}.ffn:u" if kind == "ffn" else f"{path}.vo:z"


def _input_key(unet: nn.Module, path: str, matrix: str) -> str:
    """Of the tokens a matrix multiplies: a layer's own inputs x, the text c, or what `_output_key` names."""
    if matrix in ("to_out.0", "net.2"):
        return _output_key(path, "ffn" if matrix == "net.2" else "vo")
    layer: Any = unet.get_submodule(path)
    return f"{path}:c" if matrix in ("to_k", "to_v") and layer.is_cross_attention else f"{path}:x"


@dataclass(frozen=True)
class Names:
    """Names of a group's weights in the UNet's state dict, each bias `None` where the layer has none.

    `into` lists what maps into the cut width (queries and keys; values; the GEGLU projection; a block's first
    convolution and its projection of the time), `out` what maps out, `norm` is what lies between. A `linear` group has
    `out` only.
    """

    into: tuple[tuple[str, str | None], ...]
    out: tuple[str, str | None] | None
    norm: tuple[str, str] | None = None


def names(unet: nn.Module, group: Group) -> Names:
    def of(*path: str) -> tuple[str, str | None]:
        name = ".".join((group.module, *path))
        return f"{name}.weight", f"{name}.bias" if unet.get_submodule(name).bias is not None else None

    match group.kind:
        case "qk":
            return Names((of("to_q"), of("to_k")), None)
        case "vo":
            return Names((of("to_v"),), of("to_out.0"))
        case "heads":
            return Names((of("to_q"), of("to_k"), of("to_v")), of("to_out.0"))
        case "ffn":
            return Names((of("net.0.proj"),), of("net.2"))
        case "resnet":
            time = (of("time_emb_proj"),) if unet.get_submodule(group.module).time_emb_proj is not None else ()
            norm = f"{group.module}.norm2"
            return Names((of("conv1"), *time), of("conv2"), (f"{norm}.weight", f"{norm}.bias"))
        case "linear":
            return Names((), of())


def output_layer(unet: nn.Module, group: Group) -> nn.Linear:
    """The projection through which a group's layer is left."""
    layer: Any = unet.get_submodule(group.module)
    return layer.net[2] if group.kind == "ffn" else layer.to_out[0]


def inner_layers(unet: nn.Module, group: Group) -> tuple[nn.GroupNorm, nn.Conv2d]:
    """Of a `resnet` group: the norm between the convolutions, and the second convolution, through which it is left."""
    block: Any = unet.get_submodule(group.module)
    return block.norm2, block.conv2


def residual_norm(unet: nn.Module, group: Group) -> nn.Module:
    """The norm whose input is the residual stream that a group's layer reads from and adds to."""
    block, _, own = group.module.rpartition(".")
    norm = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}[own]
    return unet.get_submodule(f"{block}.{norm}")
