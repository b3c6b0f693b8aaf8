"""A Stable Diffusion UNet with some attention and feed-forward layers narrower than in the dense model.

Needs torch and diffusers only: this very file travels inside every slim checkpoint as `unet/slimdiff_unet.py`, and
diffusers runs it from there when it is told to trust the checkpoint's code.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
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
]

FORMAT = 1
MODULE = "slimdiff_unet"


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

    What was projected last is kept as long as that tensor lives and neither it nor the weights are written to. While
    gradients are recorded or the model is compiled, nothing is kept. Only writing to `weight.data`, past torch's count
    of versions, goes unseen; `forget` is for those who do, as merging a LoRA does.
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
        versions = [x._version for x in (text, *self.parameters())]
        if self._seen is None or self._seen[0]() is not text or self._seen[1] != versions:
            self._seen = weakref.ref(text, self.forget), versions, super().forward(text)
        return self._seen[2]

    def forget(self, *_: Any) -> None:
        self._seen = None


class SlimUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel` with cut layers.

    Takes the arguments of the dense UNet and

    `slim_ranks`: width of each cut group by name: `<path of an Attention>.qk` and `.vo` (width of one head), `<path of
    a FeedForward>.ffn` (hidden units), `<path of an Attention>.heads` (number of heads), `<path of a Linear>.linear`
    (rank of a matrix, as two factors). What is not listed keeps its dense width. Weights fit the usual softmax scale
    `1 / sqrt(width)`: a factor that keeps the dense logits belongs into the query weights.
    `slim_format`: version of this description.

    Cut layers are the stock ones with smaller matrices; only attention with two different widths has its own class,
    `UnequalAttention`, and matrices in factors, `LowRank`. Raises ValueError for groups or widths that the dense UNet
    does not have.
    """

    code = Path(__file__).read_bytes()

    def __init__(
        self, *args: Any, slim_ranks: Mapping[str, int] | None = None, slim_format: int = FORMAT, **kwargs: Any
    ) -> None:
        if slim_format > FORMAT:
            raise ValueError(
                f"This model has slim format {slim_format}, and the installed code reads formats up to {FORMAT}. "
                "Upgrade slimdiff."
            )
        super().__init__(*args, **kwargs)
        self.register_to_config(
            slim_ranks=dict(slim_ranks or {}),
            slim_format=slim_format,
            auto_map={"AutoModel": f"{MODULE}.{type(self).__name__}"},
        )
        _narrow(self, slim_ranks or {})
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

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; ValueError if the adapter was trained on the dense model and touches cut layers."""
        try:
            super().load_lora_adapter(*args, **kwargs)
        except RuntimeError as error:
            if not self.config["slim_ranks"] or "size mismatch" not in str(error):
                raise
            if not getattr(self, "peft_config", None):
                self.unload_lora()
            raise ValueError(
                "This LoRA does not fit: it was trained on the dense model, and it touches layers that were cut. Merge "
                "it into the dense model (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained) and "
                "compress the result."
            ) from error

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        if cut := [name for name in self.config["slim_ranks"] if ".attn2." in name]:
            raise ValueError(
                "An IP-Adapter brings keys and values for the dense cross-attention, and this model's is cut "
                f"({len(cut)} groups, {cut[0]} among them): the pictures would be wrong. Use the dense model, or "
                "compress feed-forward layers only."
            )
        super()._load_ip_adapter_weights(*args, **kwargs)

    def _unequal(self) -> dict[str, Any]:
        return {path: layer for path, layer in self.named_modules() if getattr(layer, "unequal_widths", False)}


def _narrow(unet: nn.Module, ranks: Mapping[str, int]) -> None:
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
            _narrow_feed_forward(layers[path], widths["ffn"])
        elif "linear" in widths:
            parent, _, name = path.rpartition(".")
            setattr(layers[parent], name, LowRank(layers[path], widths["linear"]))
        else:
            _narrow_attention(layers[path], widths["heads"], widths["qk"], widths["vo"])


def _dense_widths(layer: Any) -> dict[str, int]:
    if isinstance(layer, Attention) and layer.norm_q is None and layer.added_kv_proj_dim is None:
        return {"heads": layer.heads, **dict.fromkeys(("qk", "vo"), layer.to_q.out_features // layer.heads)}
    if isinstance(layer, FeedForward) and isinstance(layer.net[0], GEGLU):
        return {"ffn": layer.net[0].proj.out_features // 2}
    if isinstance(layer, nn.Linear):
        return {"linear": min(layer.in_features, layer.out_features)}
    return {}


def _narrow_attention(layer: Any, heads: int, qk: int, vo: int) -> None:
    """Leaves what `Attention(heads, dim_head=qk)` would be, and everything else of the dense layer as it was."""
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


def _narrow_feed_forward(layer: Any, width: int) -> None:
    layer.net[0].proj = _linear(layer.net[0].proj, layer.net[0].proj.in_features, 2 * width)
    layer.net[2] = _linear(layer.net[2], width, layer.net[2].out_features)


def _linear(dense: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=dense.bias is not None)


def _reusing(matrix: nn.Linear) -> nn.Linear:
    return TextProjection.of(matrix) if type(matrix) is nn.Linear else matrix


def _signature() -> inspect.Signature:
    dense = inspect.signature(UNet2DConditionModel.__init__)
    slim = inspect.signature(SlimUNet2DConditionModel.__init__).parameters
    return dense.replace(parameters=[*dense.parameters.values(), slim["slim_ranks"], slim["slim_format"]])


# diffusers reads the configuration's keys off the signature, the library's name in `model_index.json` off `__module__`,
# and looks that name up among the imported modules when a UNet is passed to a pipeline.
SlimUNet2DConditionModel.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
SlimUNet2DConditionModel.__module__ = MODULE
sys.modules.setdefault(MODULE, sys.modules[__name__])
