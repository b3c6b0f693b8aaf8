"""A slim model in dense shapes: the same function, padded with zeros, for programs that build UNets of fixed shapes.

It is no smaller and no faster than the dense model, and paints what the slim one paints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from slimdiff import original_layout
from slimdiff.checkpoint import load, load_unet
from slimdiff.errors import ModelError, OutputError
from slimdiff.files import replacing, replacing_folder, write_json
from slimdiff.groups import Group, by_name, names
from slimdiff.outputs import PLAN
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.source import Source, stored_dtype

_README = """---
library_name: diffusers
tags: [slimdiff]
---
A text-to-image model compressed with slimdiff, in the shapes of the model that it was made from: what was cut is filled
with zeros. It paints what the compressed model paints and loads like the original, but it is no smaller and no faster.
It is there to judge the pictures in programs that load dense shapes only.

LoRAs of the original load without an error here, and paint something else: merge them before compressing, or use the
slim checkpoint, which maps them. The licence of the original model applies.
"""


def export(slim: Path, output: Path, force: bool = False) -> None:
    """Write a slim checkpoint as a folder that stock diffusers loads: all parts as they are, the UNet `padded`.

    Raises OutputError if `output` is there, unless `force` is set and it is such a folder, or cannot be written;
    ModelError if `slim` is no slim checkpoint, or one that cannot be padded.
    """
    _check_folder(output, force)
    unet = padded(load_unet(slim, _dtype(slim)))
    with replacing_folder(output, output.resolve(), force) as partial:
        for part in slim.iterdir():
            if part.name not in ("unet", PLAN.parts[0], "README.md") and not part.name.startswith("."):
                (shutil.copytree if part.is_dir() else shutil.copyfile)(part, partial / part.name)
        index = json.loads((slim / "model_index.json").read_text(encoding="utf-8"))
        write_json(partial / "model_index.json", index | {"unet": ["diffusers", UNet2DConditionModel.__name__]})
        unet.save_pretrained(partial / "unet")
        (partial / "README.md").write_text(_README, encoding="utf-8")


def export_file(slim: Path, output: Path, force: bool = False) -> None:
    """Write a slim checkpoint as one file in the layout of the original code, in the dtype of its UNet, which is
    `padded`.

    Raises OutputError if `output` is there, unless `force` is set and it is a file, has another suffix than
    .safetensors, or cannot be written; ModelError as `export` does.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"{output} is to be a single file: give it a name that ends in .safetensors.")
    if output.exists() and not (force and output.is_file()):
        raise OutputError(f"{output} exists. Choose another name, or pass --force to replace a file.")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = load(slim, _dtype(slim))
    pipe.unet = padded(pipe.unet)
    with replacing(output) as temporary:
        save_file(original_layout.pipeline(pipe), temporary, {"format": "pt"})


def _dtype(slim: Path) -> torch.dtype:
    return stored_dtype(Source(str(slim), slim.name, slim))


def _check_folder(output: Path, force: bool) -> None:
    """Raises OutputError if something is there, unless `force` is set and it says that `export` wrote it."""
    if not output.exists():
        return
    if not force:
        raise OutputError(f"{output} exists. Choose another folder, or pass --force to replace it.")
    readme = output / "README.md"
    if not readme.is_file() or readme.read_text(encoding="utf-8", errors="replace") != _README:
        raise OutputError(
            f"{output} exists and was not written by 'slimdiff dense', so --force does not replace it. Choose another "
            "folder, or remove this one yourself."
        )


def padded(slim: SlimUNet2DConditionModel) -> UNet2DConditionModel:
    """The stock UNet that computes what `slim` computes, in its dtype: heads and hidden units that are gone are zeros,
    two factors one matrix.

    Queries lose the factor `√(r / d)` that heads of width r in the place of d needed: the softmax scale is that of d
    again. Raises ModelError if a group cannot be padded.
    """
    config = {key: value for key, value in slim.config.items() if not key.startswith(("slim_", "_", "auto_map"))}
    with torch.device("meta"):
        dense = UNet2DConditionModel.from_config(config)
    groups = by_name(dense)
    ranks: dict[str, int] = slim.config["slim_ranks"]
    if blocks := [name for name in ranks if groups[name].kind == "resnet"]:
        raise ModelError(
            f"{blocks[0]} ({len(blocks)} such groups) cannot be filled with zeros: the normalisation inside a ResNet "
            "block would see them. Compress without --groups resnet."
        )
    state = slim.state_dict()
    for name, rank in sorted(ranks.items(), key=lambda item: item[0].endswith(".heads")):  # heads have their full width
        group = groups[name]
        state |= _padded(dense, group, rank, ranks.get(f"{group.module}.heads", group.heads), state)
    dense.load_state_dict({name: state[name] for name in dense.state_dict()}, assign=True)
    return dense.requires_grad_(False).eval()


def _padded(
    dense: UNet2DConditionModel, group: Group, rank: int, heads: int, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A group's weights in dense shapes, by name; `heads` are left of the dense layer's."""
    where = names(dense, group)
    if group.kind == "linear":
        assert where.out is not None
        outer, inner = state[where.out[0]], state[where.out[0].removesuffix("weight") + "inner.weight"]
        return {where.out[0]: (outer.float() @ inner.float()).to(outer.dtype)}
    more, wider = (group.width - rank, 0) if group.kind == "heads" else (0, group.width - rank)
    rows, columns = (2, 1) if group.kind == "ffn" else (heads, heads)
    found = {name: _filled(state[name], 0, rows, more, wider) for pair in where.into for name in pair if name}
    if group.kind == "qk":
        for name in filter(None, where.into[0]):
            found[name] = (found[name].float() * (group.width / rank) ** 0.5).to(found[name].dtype)
    if where.out is not None:
        found[where.out[0]] = _filled(state[where.out[0]], 1, columns, more, wider)
    return found


def _filled(x: Tensor, dim: int, parts: int, more: int, wider: int) -> Tensor:
    """`x` with `parts` equal parts along `dim`, each `wider` by so many zeros, and `more` parts of zeros."""
    split = x.unflatten(dim, (parts, -1))
    behind = split.dim() - dim - 2
    return F.pad(split, (0, 0) * behind + (0, wider, 0, more)).flatten(dim, dim + 1)
