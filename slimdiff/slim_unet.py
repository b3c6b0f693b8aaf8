"""A Stable Diffusion UNet with some layers narrower than in the dense model.

Needs torch and diffusers only: this very file travels inside every slim checkpoint as `unet/slimdiff_unet.py`, and
diffusers runs it from there when it is told to trust the checkpoint's code.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import peft
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import nn

__all__ = [
    "FORMAT",
    "MODULE",
    "LowRank",
    "ModelMixin",
    "SlimAttnProcessor",
    "SlimUNet2DConditionModel",
    "TextProjection",
    "UnequalAttention",
    "narrow",
]

FORMAT = 1
MODULE = "slimdiff_unet"

Map = Callable[[torch.Tensor], torch.Tensor]


class SlimAttnProcessor:
    """Fused attention for query-key heads and value heads of different widths.

    The narrower side is padded with zeros, because the fused kernels want equal widths. The result is exact: zeros add
    nothing to the logits, and the padded outputs are cut off again.
    """

    unequal_widths = True

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Tokens `(batch, tokens, channels)` or an image `(batch, channels, height, width)` to the same shape."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention_mask is not None:
            batch, keys = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross is not None:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        projected = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        qk, vo = query.shape[-1], value.shape[-1]
        if qk > vo:
            value = F.pad(value, (0, qk - vo))
        elif qk < vo:
            query, key = F.pad(query, (0, vo - qk)), F.pad(key, (0, vo - qk))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)
        output = output[..., :vo].transpose(1, 2).flatten(2)

        output = attn.to_out[1](attn.to_out[0](output))
        if image is not None:
            output = output.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


class UnequalAttention(Attention):
    """An attention layer whose query-key and value heads differ in width; `SlimAttnProcessor` runs it.

    Processors that are right for it are taken as they are, fused and sliced ones become `SlimAttnProcessor`, which
    computes the same in the same memory. Any other is refused when it is set, since most would silently compute
    something else.
    """

    unequal_widths = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.fitting(value) if name == "processor" else value)

    @staticmethod
    def fitting(processor: Any) -> Any:
        """The processor to use where `processor` is asked for. Raises ValueError if there is none."""
        # A mark, not the class: diffusers executes a checkpoint's code anew at each load, which makes new classes.
        if getattr(processor, "unequal_widths", False) or type(processor) in (AttnProcessor, XFormersAttnProcessor):
            return processor
        if type(processor) in (AttnProcessor2_0, SlicedAttnProcessor):
            return SlimAttnProcessor()
        raise ValueError(
            f"{type(processor).__name__} cannot run attention whose query-key and value heads differ in width. Keep "
            "the model's own processors, or compress with equal widths for both (the default)."
        )


class LowRank(nn.Linear):
    """A matrix in two factors: `inner` maps to `rank` features, this layer on to the dense layer's outputs."""

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__(rank, dense.out_features, bias=dense.bias is not None)
        self.inner = nn.Linear(dense.in_features, rank, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(x))


class TextProjection(nn.Linear):
    """Keys or values of the text, projected once for a picture: the text is the same tensor at every step of it.

    What was projected last is kept as long as that tensor lives and neither it nor the weights are written to, and the
    weights are not replaced. While gradients are recorded or the model is compiled, nothing is kept. Only writing to
    `weight.data`, past torch's count of versions, goes unseen; `forget` is for those who do, as merging a LoRA does.
    """

    reuse = True
    _seen: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, dense: nn.Linear) -> TextProjection:
        projection = cls(dense.in_features, dense.out_features, dense.bias is not None)
        projection.load_state_dict(dense.state_dict(), assign=True)
        return projection

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        if not self.reuse or torch.compiler.is_compiling() or torch.is_grad_enabled() or text.is_inference():
            return super().forward(text)
        versions = [(id(x), x._version) for x in (text, *self.parameters())]
        seen = self._seen  # read and written once each: other threads may paint with the same UNet
        if seen is None or seen[0]() is not text or seen[1] != versions:
            self._seen = seen = weakref.ref(text, self.forget), versions, super().forward(text)
        return seen[2]

    def forget(self, *_: Any) -> None:
        self._seen = None


class SlimUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel` with cut layers.

    Takes the arguments of the dense UNet and

    `slim_ranks`: width of each cut group by name: `<path of an Attention>.qk` and `.vo` (width of one head), `<path of
    a FeedForward>.ffn` (hidden units), `<path of a ResnetBlock2D>.resnet` (channels between its convolutions, in each
    group of the norm there), `<path of an Attention>.heads` (number of heads), `<path of a Linear>.linear` (rank of a
    matrix, as two factors). What is not listed keeps its dense width. Weights fit the usual softmax scale
    `1 / sqrt(width)`: a factor that keeps the dense logits belongs into the query weights.
    `slim_maps`: rank of the maps that make adapters of the dense model fit cut layers; 0 if there are none. They are
    buffers of those layers. `slim_q`, `slim_k`, `slim_v`, (heads, width, dense width), are what became of the rows of
    each head; `slim_kept`, (hidden units,), lists the hidden units that are left; `slim_left @ slim_right`, (dense
    inputs, inputs), is what the inputs left to a layer's last matrix tell of the others.
    `slim_format`: version of this description.

    Cut layers are the stock ones with smaller matrices; only attention with two different widths has its own class,
    `UnequalAttention`, and matrices in factors, `LowRank`. Raises ValueError for groups or widths that the dense UNet
    does not have.
    """

    code = Path(__file__).read_bytes()

    def __init__(
        self,
        *args: Any,
        slim_ranks: Mapping[str, int] | None = None,
        slim_maps: int = 0,
        slim_format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        if slim_format > FORMAT:
            raise ValueError(
                f"This model has slim format {slim_format}, and the installed code reads formats up to {FORMAT}. "
                "Upgrade slimdiff."
            )
        super().__init__(*args, **kwargs)
        self.register_to_config(
            slim_ranks=dict(slim_ranks or {}),
            slim_maps=slim_maps,
            slim_format=slim_format,
            auto_map={"AutoModel": f"{MODULE}.{type(self).__name__}"},
        )
        narrow(self, slim_ranks or {}, slim_maps)
        for layer in self.modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                layer.to_k, layer.to_v = (_reusing(matrix) for matrix in (layer.to_k, layer.to_v))

    def reuse_text_projections(self, reuse: bool = True) -> None:
        """Whether keys and values of the text are projected once for a picture (the default) or at every step."""
        for projection in self._text_projections():
            projection.reuse = reuse
            projection.forget()

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        super().fuse_lora(*args, **kwargs)
        self._forget_text()

    def unfuse_lora(self) -> None:
        super().unfuse_lora()
        self._forget_text()

    def _text_projections(self) -> Iterator[TextProjection]:
        return (layer for layer in self.modules() if isinstance(layer, TextProjection))

    def _forget_text(self) -> None:
        for projection in self._text_projections():
            projection.forget()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers, with this file beside the configuration: without it the checkpoint would not load."""
        folder = Path(save_directory)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{MODULE}.py").write_bytes(self.code)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def set_attn_processor(self, processor: Any) -> None:
        """As in diffusers; ValueError, before anything changes, if a layer of unequal widths cannot use it."""
        for path, layer in self._unequal().items():
            layer.fitting(processor[f"{path}.processor"] if isinstance(processor, dict) else processor)
        super().set_attn_processor(processor)

    def set_default_attn_processor(self) -> None:
        """As in diffusers, which means the plain, unfused `AttnProcessor` everywhere; it is right for any widths."""
        for layer in self._unequal().values():
            layer.set_processor(AttnProcessor())
        super().set_default_attn_processor()

    def fuse_qkv_projections(self) -> None:
        """As in diffusers; ValueError, before anything changes, if a layer has unequal widths or factors."""
        if unequal := list(self._unequal()):
            raise ValueError(
                f"Projections cannot be fused: query-key and value heads differ in width in {len(unequal)} layers, "
                f"{unequal[0]} among them. Compress with equal widths for both (the default) to fuse them."
            )
        if any(isinstance(layer, LowRank) for layer in self.modules()):
            raise ValueError("Projections cannot be fused: some of their matrices are in two factors.")
        super().fuse_qkv_projections()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, after raising torch's recompile limit: blocks that differ in width compile one by one."""
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        blocks = sum(type(module).__name__ in self._repeated_blocks for module in self.modules())
        setattr(config, limit, max(getattr(config, limit), 4 * blocks))
        super().compile_repeated_blocks(*args, **kwargs)

    def load_lora_adapter(self, lora: Any, prefix: str | None = "transformer", *args: Any, **kwargs: Any) -> None:
        """As in diffusers, after `mapped_lora` where `lora` is a state dict, as it is from a pipeline."""
        if isinstance(lora, dict):
            lora = self.mapped_lora(lora, prefix)
        super().load_lora_adapter(lora, prefix, *args, **kwargs)

    def mapped_lora(self, lora: Mapping[str, torch.Tensor], prefix: str | None = "unet") -> dict[str, torch.Tensor]:
        """A LoRA of the dense model as one of this model: tensors named `prefix...` mapped, under the names of peft.

        With `W + B A` in the dense layer, `B` loses the rows that the layer's matrix lost, and `A` its columns: the
        layer becomes `W' + (R B) A` or `W' + B (A L)`. Tensors that fit as they are stay: they are of a LoRA of this
        model. Raises ValueError if something does not fit: there is no map for it, or it is no plain LoRA.
        """
        start = f"{prefix}." if prefix else ""
        own = {name.removeprefix(start): x for name, x in lora.items() if name.startswith(start)}
        if own and "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        maps, layers = _lora_maps(self), dict(self.named_modules())
        mapped = {name: maps[key](x) if (key := name.rpartition(".")[0]) in maps else x for name, x in own.items()}
        is_plain = not any("lora_magnitude_vector" in name for name in own)
        for name, x in mapped.items():
            path, _, part = name.partition(".lora_")
            if (x is not own[name] and not is_plain) or not _fits(layers.get(path), part, x):
                raise ValueError(
                    f"This LoRA does not fit: it was trained on the dense model, and it changes {path}, which was cut"
                    + (" and has no map for it. " if is_plain else " and has no map for DoRAs. ")
                    + "Merge it into the dense model (load_lora_weights, fuse_lora, unload_lora_weights, "
                    "save_pretrained) and compress the result."
                )
        others = {name: x for name, x in lora.items() if not name.startswith(start)}
        return others | {f"{start}{name}": x for name, x in mapped.items()}

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        layers = dict(self.named_modules())
        cut = {name: layers[name.rpartition(".")[0]] for name in self.config["slim_ranks"] if ".attn2." in name}
        maps: dict[str, Any] = {
            name: getattr(layer, "slim_k" if name.endswith(".qk") else "slim_v", None) for name, layer in cut.items()
        }
        if bare := [name for name, map_ in maps.items() if map_ is None]:
            raise ValueError(
                "An IP-Adapter brings keys and values for the dense cross-attention, and this model's is cut "
                f"({len(bare)} groups, {bare[0]} among them, and no maps): the pictures would be wrong. Use the dense "
                "model, or compress feed-forward layers only."
            )
        super()._load_ip_adapter_weights(*args, **kwargs)
        for name, layer in cut.items():
            for matrix in layer.processor.to_k_ip if name.endswith(".qk") else layer.processor.to_v_ip:
                rows = _head_rows(maps[name], matrix.weight)
                matrix.weight, matrix.out_features = nn.Parameter(rows, requires_grad=False), len(rows)

    def _unequal(self) -> dict[str, Any]:
        return {path: layer for path, layer in self.named_modules() if getattr(layer, "unequal_widths", False)}


def _lora_maps(unet: nn.Module) -> dict[str, Map]:
    """What makes the matrices of a LoRA of the dense model fit: `<path>.lora_B` where rows of the layer's matrix were
    cut, `<path>.lora_A` where columns were."""
    maps: dict[str, Map] = {}
    for path, layer in unet.named_modules():
        own = dict(layer.named_buffers(recurse=False))
        if "slim_q" in own:
            maps[f"{path}.to_q.lora_B"] = partial(_head_rows, own["slim_q"])
            maps[f"{path}.to_k.lora_B"] = partial(_head_rows, own["slim_k"])
        if "slim_v" in own:
            keep = partial(_head_rows, own["slim_v"])
            maps[f"{path}.to_v.lora_B"] = keep
            maps[f"{path}.to_out.0.lora_A"] = partial(_columns, keep, own["slim_left"], own["slim_right"])
        if "slim_kept" in own:
            keep = partial(_kept_rows, own["slim_kept"], len(own["slim_left"]))
            maps[f"{path}.net.0.proj.lora_B"] = partial(keep, 2)
            maps[f"{path}.net.2.lora_A"] = partial(_columns, partial(keep, 1), own["slim_left"], own["slim_right"])
    return maps


def _fits(layer: Any, part: str, x: torch.Tensor) -> bool:
    """Whether a LoRA's matrix `part`, A or B, has the columns or rows of the layer; others are not judged."""
    if layer is None or part not in ("A.weight", "B.weight"):
        return True
    sides = ("in_features", "in_channels") if part == "A.weight" else ("out_features", "out_channels")
    return x.shape[part == "A.weight"] == next(getattr(layer, side) for side in sides if hasattr(layer, side))


def _head_rows(maps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`maps`, (heads, width, dense width), on the rows of every head of x; x itself if it has other rows."""
    heads, width, dense = maps.shape
    if len(x) != heads * dense:
        return x
    mapped = maps.to(x.device, torch.float32) @ x.float().reshape(heads, dense, -1)
    return mapped.reshape(heads * width, *x.shape[1:]).to(x.dtype)


def _kept_rows(kept: torch.Tensor, dense: int, parts: int, x: torch.Tensor) -> torch.Tensor:
    """The rows left in each of the `parts` of x that have a row for each hidden unit; x itself if it has other rows."""
    if len(x) != parts * dense:
        return x
    return x.unflatten(0, (parts, dense))[:, kept.to(x.device)].flatten(0, 1)


def _columns(keep: Map, left: torch.Tensor, right: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The columns that `keep` leaves of x, and what they tell of the others; x itself if it has other columns."""
    if x.shape[1] != len(left):
        return x
    told = x.float() @ left.to(x.device, torch.float32) @ right.to(x.device, torch.float32)
    return (keep(x.float().mT).mT + told).to(x.dtype)


def narrow(unet: nn.Module, ranks: Mapping[str, int], maps: int = 0) -> None:
    """Give the groups of a dense model, or of a part of one, these widths, with weights that are yet to be set."""
    layers = dict(unet.named_modules())
    cuts: dict[str, dict[str, int]] = {}
    for name, width in ranks.items():
        path, _, kind = name.rpartition(".")
        dense = _dense_widths(layers.get(path))
        if kind not in dense:
            raise ValueError(f"slim_ranks names {name}, but this UNet has no such group: they belong to another model.")
        full = dense[kind]
        if type(width) is not int or not 1 <= width <= full:
            raise ValueError(f"slim_ranks: {name} is {width!r}; expected an integer from 1 to its dense width {full}.")
        cuts.setdefault(path, dense)[kind] = width
    for path, widths in cuts.items():
        if "ffn" in widths:
            _narrow_feed_forward(layers[path], widths["ffn"], maps)
        elif "resnet" in widths:
            _narrow_resnet(layers[path], widths["resnet"])
        elif "linear" in widths:
            parent, _, name = path.rpartition(".")
            setattr(layers[parent], name, LowRank(layers[path], widths["linear"]))
        else:
            _narrow_attention(layers[path], widths["heads"], widths["qk"], widths["vo"], maps)


def _dense_widths(layer: Any) -> dict[str, int]:
    if isinstance(layer, Attention) and layer.norm_q is None and layer.added_kv_proj_dim is None:
        return {"heads": layer.heads, **dict.fromkeys(("qk", "vo"), layer.to_q.out_features // layer.heads)}
    if isinstance(layer, FeedForward) and isinstance(layer.net[0], GEGLU):
        return {"ffn": layer.net[0].proj.out_features // 2}
    if isinstance(layer, ResnetBlock2D):
        return {"resnet": layer.norm2.num_channels // layer.norm2.num_groups}
    if isinstance(layer, nn.Linear):
        return {"linear": min(layer.in_features, layer.out_features)}
    return {}


def _narrow_attention(layer: Any, heads: int, qk: int, vo: int, maps: int) -> None:
    """Leaves what `Attention(heads, dim_head=qk)` would be, and everything else of the dense layer as it was."""
    dense = layer.to_q.out_features // layer.heads
    if maps and heads == layer.heads and qk < dense:
        _add_buffers(layer, q=(heads, qk, dense), k=(heads, qk, dense))
    if maps and heads == layer.heads and vo < dense:
        _add_buffers(layer, v=(heads, vo, dense), **_thin(maps, heads * dense, heads * vo))
    layer.heads = layer.sliceable_head_dim = heads
    layer.inner_dim = layer.inner_kv_dim = layer.heads * qk
    layer.scale = qk**-0.5 if layer.scale_qk else 1.0
    layer.to_q = _linear(layer.to_q, layer.to_q.in_features, layer.heads * qk)
    layer.to_k = _linear(layer.to_k, layer.to_k.in_features, layer.heads * qk)
    layer.to_v = _linear(layer.to_v, layer.to_v.in_features, layer.heads * vo)
    layer.to_out[0] = _linear(layer.to_out[0], layer.heads * vo, layer.to_out[0].out_features)
    if qk != vo:
        layer.__class__ = UnequalAttention
        layer.set_processor(SlimAttnProcessor())


def _narrow_feed_forward(layer: Any, width: int, maps: int) -> None:
    dense = layer.net[2].in_features
    if maps and width < dense:
        _add_buffers(layer, **_thin(maps, dense, width))
        layer.register_buffer("slim_kept", torch.arange(width))
    layer.net[0].proj = _linear(layer.net[0].proj, layer.net[0].proj.in_features, 2 * width)
    layer.net[2] = _linear(layer.net[2], width, layer.net[2].out_features)


def _narrow_resnet(layer: Any, width: int) -> None:
    norm, time = layer.norm2, layer.time_emb_proj
    channels = width * norm.num_groups
    layer.conv1 = nn.Conv2d(layer.conv1.in_channels, channels, 3, padding=1)
    layer.conv2 = nn.Conv2d(channels, layer.conv2.out_channels, 3, padding=1)
    layer.norm2 = nn.GroupNorm(norm.num_groups, channels, norm.eps)
    if time is not None:
        layer.time_emb_proj = _linear(time, time.in_features, time.out_features // norm.num_channels * channels)


def _thin(rank: int, dense: int, width: int) -> dict[str, tuple[int, int]]:
    """Shapes of what `width` inputs tell of the `dense - width` others and of their mean."""
    rank = min(rank, dense - width + 1)
    return {"left": (dense, rank), "right": (rank, width)}


def _add_buffers(layer: nn.Module, **shapes: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        layer.register_buffer(f"slim_{name}", torch.zeros(shape))


def _linear(dense: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=dense.bias is not None)


def _reusing(matrix: nn.Linear) -> nn.Linear:
    return TextProjection.of(matrix) if type(matrix) is nn.Linear else matrix


def _signature() -> inspect.Signature:
    dense = inspect.signature(UNet2DConditionModel.__init__)
    slim = inspect.signature(SlimUNet2DConditionModel.__init__).parameters
    own = [slim[name] for name in ("slim_ranks", "slim_maps", "slim_format")]
    return dense.replace(parameters=[*dense.parameters.values(), *own])


# diffusers reads the configuration's keys off the signature, the library's name in `model_index.json` off `__module__`,
# and looks that name up among the imported modules when a UNet is passed to a pipeline.
SlimUNet2DConditionModel.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
SlimUNet2DConditionModel.__module__ = MODULE
sys.modules.setdefault(MODULE, sys.modules[__name__])

# How LoRA scales by block are read, which diffusers looks up by the name of the class.
if "UNet2DConditionModel" in (_scales := getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", {})):
    _scales[SlimUNet2DConditionModel.__name__] = _scales["UNet2DConditionModel"]
