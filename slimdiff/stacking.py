"""What other projects put on top of a pipeline, slim or dense: int8 weights, cached features, merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from importlib.util import find_spec
from typing import TYPE_CHECKING

from slimdiff.errors import SlimdiffError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

INTERVAL = 3
"""Steps of which DeepCache computes the whole UNet once; 3 is what its authors show."""

RATIO = 0.5
"""Share of the tokens that ToMe merges; the most that its authors recommend."""


def stacked(pipe: DiffusionPipeline, stack: str) -> DiffusionPipeline:
    """The pipeline with a stack on top, "int8" or several as in "int8+tome"; `pipe` stays as it is.

    Both share every weight that is not replaced. Raises SlimdiffError as `check` does.
    """
    check(pipe, stack)
    other = copy(pipe)
    shared = (*pipe.unet.parameters(), *pipe.unet.buffers())
    other.unet = deepcopy(pipe.unet, {id(tensor): tensor for tensor in shared})
    for name, put_on in _PUT_ON.items():
        if name in stack.split("+"):
            put_on(other)
    return other


def check(pipe: DiffusionPipeline, stack: str) -> None:
    """Raises SlimdiffError if a part of the stack is unknown, not installed, or does not work on this UNet."""
    for name in stack.split("+"):
        if name not in PACKAGES:
            raise SlimdiffError(f"'{name}' cannot be put on top; choose from {', '.join(PACKAGES)}.")
        if find_spec(PACKAGES[name]) is None:
            raise SlimdiffError(
                f"{name} needs the package {PACKAGES[name]}, which is not installed: pip install 'slimdiff[{name}]' or "
                f"pip install {PACKAGES[name]}."
            )
    if "deepcache" in stack.split("+") and pipe.unet.config.mid_block_type is None:
        raise SlimdiffError("DeepCache does not work on a UNet without a middle block, as this one. Leave it out.")


def _int8(pipe: DiffusionPipeline) -> None:
    """torchao's int8 weights in the linear layers; convolutions stay as they are.

    Two scales for each row, because torchao then scales before it multiplies. With one it does so afterwards, and
    float16 overflows.
    """
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    for layer in pipe.unet.modules():
        if isinstance(layer, nn.Linear) and layer.in_features % 2 == 0:
            halves = PerGroup(layer.in_features // 2)
            quantize_(layer, Int8WeightOnlyConfig(granularity=halves, set_inductor_config=False))


def _deepcache(pipe: DiffusionPipeline) -> None:
    """Two of three steps run the outermost layers only, on the inner features of the step before them."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    helper.enable()


def _tome(pipe: DiffusionPipeline) -> None:
    """Similar tokens merged before self-attention, where the UNet has most of them.

    ToMe's own random numbers choose which tokens others are merged into; they start from a fixed seed.
    """
    import tomesd
    import torch

    finest = next(level for level, kind in enumerate(pipe.unet.config.down_block_types) if "CrossAttn" in kind)
    tomesd.apply_patch(pipe, ratio=RATIO, max_downsample=2**finest)
    pipe.unet._tome_info["args"]["generator"] = torch.Generator(pipe.unet.device).manual_seed(0)


PACKAGES = {"int8": "torchao", "deepcache": "DeepCache", "tome": "tomesd"}
"""What can be put on top, and the package that does it."""

_PUT_ON: dict[str, Callable[[DiffusionPipeline], None]] = {"int8": _int8, "deepcache": _deepcache, "tome": _tome}
