"""The slim checkpoint: a diffusers pipeline folder that loads without slimdiff, and the plan it was made by."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedModel

from slimdiff import original_layout
from slimdiff.card import readme
from slimdiff.errors import ModelError, OutputError, SlimdiffError
from slimdiff.files import check_room, replacing_folder
from slimdiff.outputs import PLAN, slim_inside
from slimdiff.plan import Plan
from slimdiff.slim_unet import FORMAT, MODULE, SlimUNet2DConditionModel

# Weights by name: model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors, and with a variant
# model.fp16-00001-of-00002.safetensors or the older model-00001-of-00002.fp16.safetensors; their index likewise.
_WEIGHTS = re.compile(
    r"(?P<stem>\w+?)(?P<shard>-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?(?P<variant_shard>-\d+-of-\d+)?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>\w+)\.safetensors(\.(?P<old_variant>[^.]+))?\.index(\.(?P<variant>[^.]+))?\.json")
_OF_THE_UNET = ("variant", "device_map", "low_cpu_mem_usage", "disable_mmap")
"""Arguments of a pipeline's `from_pretrained` that a model's takes too."""
_OTHER_WEIGHTS = re.compile(r".*\.(bin|ckpt|pt|pth|pkl|pickle|msgpack|h5|onnx|onnx_data|pb|xml)(\..*)?")


def check_output(output: Path, force: bool = False) -> Path:
    """The folder that a checkpoint for `output` goes to, symbolic links followed.

    Raises OutputError if something is there, unless `force` is set and it is a slim checkpoint, or nothing can be
    written beside it.
    """
    folder = Path(output).resolve()
    check_room(output, folder.parent)
    if not folder.exists():
        return folder
    if not force:
        raise OutputError(f"{output} exists. Choose another folder, or pass --force to replace it.")
    if not (folder / PLAN).is_file():
        raise OutputError(
            f"{output} exists and is not a slim checkpoint (it has no {PLAN.as_posix()}), so --force does not replace "
            "it. Choose another folder, or remove this one yourself."
        )
    return folder


def write(
    output: Path,
    unet: SlimUNet2DConditionModel,
    pipe: DiffusionPipeline,
    plan_json: str,
    source: Path | None,
    variant: str | None = None,
    force: bool = False,
    merged: bool = False,
    replaced: Collection[str] = (),
) -> None:
    """Write the complete pipeline folder: `unet`, the other components of the dense `pipe`, and the plan.

    The other components are copied as files from `source`, the local folder that `pipe` was loaded from with
    `variant`, and take plain file names; text encoders name float32 as the dtype to load. Without `source`, and those
    `replaced` since, they are saved anew, in the dtype of `unet`, or as they are if that is the UNet of `pipe`. Only
    safetensors weights are written. The class of the pipeline stays that of `source`, whichever `pipe` has. Text
    encoders get the weights they have in `pipe` if something was `merged` into it.

    The folder appears under its name when it is complete, and only then replaces an older one.

    Raises OutputError if `output` may not be replaced (see `check_output`) or cannot be written, ModelError if `source`
    lacks a component or safetensors weights for it.
    """
    with replacing_folder(output, check_output(output, force), force) as partial:
        _write_components(partial, pipe, source, variant, replaced, None if pipe.unet is unet else unet.dtype)
        if merged and source is not None:
            for name in ("text_encoder", "text_encoder_2"):
                if getattr(pipe, name, None) is not None:
                    _renew(partial / name, getattr(pipe, name).state_dict())
        unet.save_pretrained(partial / "unet")
        _write_json(partial / "unet" / "config.json", _read_json(partial / "unet" / "config.json"))
        (partial / PLAN).parent.mkdir()
        (partial / PLAN).write_text(plan_json, encoding="utf-8")
        (partial / "README.md").write_text(readme(unet.config), encoding="utf-8")


def load(path: str | Path, torch_dtype: Any = torch.float32, **kwargs: Any) -> DiffusionPipeline:
    """Load a slim checkpoint with slimdiff's own UNet class; no code from the checkpoint is run.

    `torch_dtype` (or `dtype`) and `kwargs` are those of `DiffusionPipeline.from_pretrained`. (Left to guess the dtype,
    transformers 5 keeps that of a text encoder's file, which need not be the UNet's.) Raises ModelError if `path` is
    not a slim checkpoint, is of a newer format, or its UNet is damaged, SlimdiffError for what would pass the UNet by.
    """
    folder, torch_dtype = Path(path), kwargs.pop("dtype", torch_dtype)
    if kwargs.get("quantization_config") is not None or kwargs.get("device_map") == "balanced":
        raise SlimdiffError(
            "quantization_config and device_map='balanced' do not reach a UNet that slimdiff loads. Use "
            "DiffusionPipeline.from_pretrained(..., trust_remote_code=True), which runs the class in the checkpoint."
        )
    dtype = torch_dtype.get("unet", torch_dtype.get("default")) if isinstance(torch_dtype, dict) else torch_dtype
    unet = load_unet(folder, dtype, **{name: kwargs[name] for name in _OF_THE_UNET if name in kwargs})
    kwargs = {"use_safetensors": True, "torch_dtype": torch_dtype} | kwargs
    with warnings.catch_warnings():
        # The new name, `dtype`, would be ignored by the older versions of diffusers that are supported too.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        return DiffusionPipeline.from_pretrained(folder, unet=unet, **kwargs)


def load_unet(
    path: str | Path, torch_dtype: torch.dtype | None = None, *, variant: str | None = None, **kwargs: Any
) -> SlimUNet2DConditionModel:
    """The UNet of a slim checkpoint, its weights of `variant` if it has some. Raises as `load` does."""
    folder = Path(path)
    _check_slim(folder)
    kwargs["variant"] = variant if any((folder / "unet").glob(f"*.{variant}*.safetensors")) else None
    kwargs |= {"torch_dtype": torch_dtype, "use_safetensors": True}
    try:
        return SlimUNet2DConditionModel.from_pretrained(folder / "unet", **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"The UNet in {folder} cannot be loaded: {str(error).rstrip('. ')}. Copy the checkpoint "
            "anew from where it was made, or compress again with --force."
        ) from error


def is_slim(path: str | Path) -> bool:
    """Whether `path` is the folder of a slim checkpoint, of whatever format."""
    try:
        return "slim_ranks" in _read_json(Path(path, "unet", "config.json"))
    except (OSError, ValueError):
        return False


def plan_of(path: str | Path) -> Plan:
    """The plan a slim checkpoint was made by. Raises ModelError if there is none, SlimdiffError if it is damaged."""
    return Plan.from_json(read_plan(path), Path(path) / PLAN)


def read_plan(path: str | Path) -> str:
    """The JSON text of the plan a slim checkpoint was made by. Raises ModelError if there is none."""
    _check_slim(Path(path))
    try:
        return (Path(path) / PLAN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is a slim checkpoint, but its plan cannot be read ({error}). A pipeline saved again by diffusers "
            f"leaves {PLAN.as_posix()} behind: copy it over from the original checkpoint."
        ) from error


def size_in_bytes(path: str | Path) -> int:
    """Size of the UNet's weight files. Raises ModelError if `path` has none."""
    files = list(Path(path, "unet").glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no UNet weights: unet/*.safetensors is missing.")
    return sum(file.stat().st_size for file in files)


def _check_slim(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder. Give the folder of a slim checkpoint; one on the Hugging Face Hub loads with "
            "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )
    if not (folder / "model_index.json").exists():
        inside = [str(path) for path in slim_inside(folder)]
        which = f"It holds some: pass {' or '.join(inside)}." if inside else "It holds none either."
        raise ModelError(
            f"{folder} is not a slim checkpoint, a folder that 'slimdiff compress' wrote: it has no model_index.json. "
            f"{which}"
        )
    try:
        _read_json(folder / "model_index.json")
        config = _read_json(folder / "unet" / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is not a complete pipeline folder: {error}") from error
    if "slim_ranks" not in config:
        raise ModelError(
            f"{folder} is not a slim checkpoint: its UNet is a {config.get('_class_name')}. Load it with "
            "DiffusionPipeline.from_pretrained, or compress it first."
        )
    if config.get("slim_format", FORMAT) > FORMAT:
        raise ModelError(
            f"{folder} has slim format {config['slim_format']}, and this version of slimdiff reads formats up to "
            f"{FORMAT}. Upgrade slimdiff."
        )


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Without the local path that diffusers notes as `_name_or_path`: checkpoints get published."""
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_components(
    folder: Path,
    pipe: DiffusionPipeline,
    source: Path | None,
    variant: str | None,
    replaced: Collection[str],
    dtype: torch.dtype | None,
) -> None:
    own = json.loads(pipe.to_json_string())
    components = {name: part for name, part in pipe.components.items() if name != "unet"}
    there = [name for name, part in components.items() if part is not None]
    if source is None:
        index, anew = own, there
    else:
        index, anew = _source_index(source, [name for name in there if name not in replaced]), list(replaced)
        index |= {name: own[name] for name in components if name in replaced or name not in there}
        for name in index:
            if name != "unet" and name not in anew and _is_component(index[name]):
                has_weights = isinstance(components.get(name), torch.nn.Module)
                _copy(source / name, folder / name, variant, has_weights)
        for licence in source.glob("LICEN[CS]E*"):
            shutil.copyfile(licence, folder / licence.name)
    for name in anew:
        _save(components[name], folder / name, dtype)
    for name, component in components.items():
        if isinstance(component, PreTrainedModel):
            _unless_told_float32(folder / name / "config.json")
    index["unet"] = [MODULE, SlimUNet2DConditionModel.__name__]
    _write_json(folder / "model_index.json", index)


def _save(component: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Under the names that every version of transformers reads: version 5 leaves out a prefix that version 4 needs."""
    if dtype is not None and isinstance(component, torch.nn.Module):
        component.to(dtype)
    if isinstance(component, CLIPTextModel):
        component.save_pretrained(folder, state_dict=original_layout.clip(component))
    else:
        component.save_pretrained(folder)


def _unless_told_float32(config: Path) -> None:
    """Have transformers 5 load a model in float32 unless it is told otherwise, as diffusers loads the UNet.

    Of its own accord it takes the dtype of the file, and a pipeline of two dtypes cannot paint.
    """
    content = _read_json(config)
    if content.get("dtype", content.get("torch_dtype")) != "float32":
        content.pop("torch_dtype", None)
        _write_json(config, content | {"dtype": "float32"})


def _is_component(value: Any) -> bool:
    """Whether an entry of model_index.json names the library and class of a part that is there."""
    return isinstance(value, list) and len(value) == 2 and None not in value


def _source_index(source: Path, components: Iterable[str]) -> dict[str, Any]:
    try:
        index = _read_json(source / "model_index.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} is not a complete pipeline folder: {error}") from error
    if missing := [name for name in components if name not in index or not (source / name).is_dir()]:
        raise ModelError(
            f"{source} lacks {', '.join(missing)}, which the pipeline has. Save the pipeline with save_pretrained and "
            "compress that folder."
        )
    return index


def _copy(source: Path, target: Path, variant: str | None, has_weights: bool) -> None:
    """Copy a component's files: of its weights those of `variant`, or the plain ones where it has no such variant."""
    files = [file for file in source.iterdir() if file.is_file() and not file.name.startswith(".")]
    weights = {file: found for file in files if (found := _WEIGHTS.fullmatch(file.name))}
    indices = {file: found for file in files if (found := _INDEX.fullmatch(file.name))}
    if variant not in {found["variant"] for found in weights.values()}:
        variant = None
    weights = {file: found for file, found in weights.items() if found["variant"] == variant}
    if has_weights and not weights:
        there = ", ".join(sorted(file.name for file in files)) or "nothing"
        raise ModelError(
            f"{source} has no safetensors weights (found: {there}). Slim checkpoints hold no pickles: load the model "
            "with diffusers, save it with save_pretrained, and compress that folder; or name the variant in use."
        )
    target.mkdir()
    for file in files:
        if file in weights:
            shutil.copyfile(file, target / _plain(file.name))
        elif found := indices.get(file):
            if (found["variant"] or found["old_variant"]) == variant:
                content = _read_json(file)
                content["weight_map"] = {key: _plain(name) for key, name in content["weight_map"].items()}
                _write_json(target / f"{found['stem']}.safetensors.index.json", content)
        elif file.suffix != ".safetensors" and not _OTHER_WEIGHTS.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def _renew(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Put a text encoder's present weights into its copied files, whose names transformers 5 may have shortened."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, old in tensors.items():
            new = state.get(name, state.get(name.removeprefix("text_model.")))
            tensors[name] = old if new is None else new.to(old.dtype).contiguous()
        save_file(tensors, file, metadata)


def _plain(weights: str) -> str:
    """The file name without its variant."""
    found = _WEIGHTS.fullmatch(weights)
    return weights if found is None else f"{found['stem']}{found['shard'] or found['variant_shard'] or ''}.safetensors"
