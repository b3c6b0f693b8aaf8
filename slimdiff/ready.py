"""Pipelines that somebody else loaded: whether they are as calibration, compression and measuring need them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimdiff.errors import ModelError


@contextmanager
def eager() -> Iterator[None]:
    """While inside, or in a function decorated with it, modules that are compiled run as if they were not: compiled
    code skips hooks. Afterwards they run what was compiled before."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check(pipe: DiffusionPipeline) -> None:
    """Raises ModelError unless plain weights lie on their device under their own names, with no LoRA beside them."""
    if isinstance(pipe.unet, OptimizedModule):
        raise ModelError(
            "The UNet is in the wrapper of torch.compile(pipe.unet), which renames its weights. Take it out with "
            "pipe.unet = pipe.unet._orig_mod; pipe.unet.compile() compiles in place, which is fine."
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _check_place(name, part)
            _check_adapters(name, part)
    _check_dtype(pipe.unet)


def _check_place(name: str, part: nn.Module) -> None:
    """Hooks of accelerate and diffusers fetch weights from elsewhere, or from another dtype, when they are called."""
    for module in part.modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"The pipeline's {name} is offloaded, or spread over devices. Call pipe.remove_all_hooks() (after a "
                "device_map pipe.reset_device_map()), and pipe.to() a device that holds all of it."
            )
        if hooks := list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())):
            raise ModelError(
                f"The pipeline's {name} runs under hooks of diffusers ({', '.join(hooks)}). Load the pipeline anew "
                "without them (group offloading, layerwise casting, caches), and pipe.to() a device that holds it."
            )
    if any(tensor.is_meta for tensor in part.state_dict().values()):
        raise ModelError(f"The pipeline's {name} has no weights, only their shapes (meta device). Load it with them.")


def _check_adapters(name: str, part: nn.Module) -> None:
    for path, module in part.named_modules():
        if hasattr(module, "base_layer"):  # of peft
            raise ModelError(
                f"The pipeline's {name} has an adapter loaded beside its weights (at {path}). Merge it with "
                "pipe.fuse_lora() and then pipe.unload_lora_weights(), or only unload it."
            )


def _check_dtype(unet: nn.Module) -> None:
    for path, weight in unet.named_parameters():
        if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point() or weight.element_size() == 1:
            raise ModelError(
                f"The UNet is quantised ({path} is a {type(weight).__name__} of {weight.dtype}). Load it in float32, "
                "float16 or bfloat16; what slimdiff makes of it can be quantised afterwards."
            )
