"""Where a model is: the bundled miniature, a hub id, a diffusers folder or a single file, and what its files say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from slimdiff.errors import ModelError
from slimdiff.families import SUPPORTED, check_index, check_unet

DEMO = Path(__file__).parent / "demo" / "model"
"""The bundled miniature."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a model came from: `reference` as typed, a short `name` for folders, and its local diffusers folder.

    `folder` is None for a single file. `options` are those of `find` that were given. `loras` are files of LoRAs to
    merge into it when it is loaded, each with its scale.
    """

    reference: str
    name: str
    folder: Path | None
    options: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def variant(self) -> str | None:
        return self.options.get("variant")

    def with_loras(self, loras: Iterable[tuple[str, float]]) -> Source:
        """The model with these LoRAs, also in its name. Raises ModelError if one is no `.safetensors` file."""
        found = tuple((str(Path(file).expanduser().resolve()), float(scale)) for file, scale in loras)
        for file, _ in found:
            if not Path(file).is_file() or Path(file).suffix != ".safetensors":
                raise ModelError(f"There is no .safetensors file {file} with a LoRA to merge.")
        return replace(self, name="+".join([self.name, *(Path(file).stem for file, _ in found)]), loras=found)


def find(
    model: str | None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    vae: str | None = None,
) -> Source:
    """Where a model is: a hub id (downloaded into the hub's cache), a folder, a `.safetensors` file, None for the demo.

    `variant` is that of the weights, such as "fp16", `revision` one of the hub's. `config` is a diffusers folder or hub
    id that a single file takes its configs from, `vae` a file, folder or hub id of a VAE in the place of the model's.

    Raises ModelError if there is nothing there, only pickles, or a model that slimdiff does not support.
    """
    asked = {"variant": variant, "revision": revision, "config": _absolute(config), "vae": _absolute(vae)}
    given = {key: value for key, value in asked.items() if value}
    if model is None or model == "demo":
        return Source("demo", "demo", DEMO, given)
    path = Path(model).expanduser()
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{model} is a pickle, and loading one can run any code in it. Use the model's .safetensors file, or "
            "convert it on a machine you can afford to lose."
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(
                f"{model} is a file, but not a .safetensors file; pass a folder, a hub id or .safetensors."
            )
        return Source(str(path.resolve()), path.stem, None, given)
    if config:
        raise ModelError(f"--config is for a single .safetensors file; {model} brings its own configs.")
    if path.is_dir():
        _check_folder(path, variant)
        return Source(str(path.resolve()), path.resolve().name, path.resolve(), given)
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".safetensors") or model.count("/") != 1
    if looks_local:
        raise ModelError(f"There is no file or folder {model}, and it is no hub id (those look like owner/name).")
    return Source(model, model.split("/")[-1], _download(model, variant, revision), given)


def again(recorded: str, options: Mapping[str, str], elsewhere: str | None, variant: str | None) -> Source:
    """The model that statistics or a plan have `recorded`, with its options; `elsewhere` if it lies there now.

    There its revision means nothing, nor does its config but for a single file, nor its variant where a folder lacks
    it. `variant`, if there is one, takes the place of the recorded one. Raises as `find` does.
    """
    kept = dict(options)
    if elsewhere is not None:
        path = Path(elsewhere).expanduser()
        kept.pop("revision", None)
        if not path.is_file():
            kept.pop("config", None)
        if path.is_dir() and not any((path / "unet").glob(f"*.{kept.get('variant')}*.safetensors")):
            kept.pop("variant", None)
    return find(elsewhere or recorded, **kept | ({"variant": variant} if variant else {}))


def _absolute(path: str | None) -> str | None:
    """A local path made absolute, so that it can be found from elsewhere; a hub id as it is."""
    return str(local.resolve()) if path and (local := Path(path).expanduser()).exists() else path


def _download(model: str, variant: str | None, revision: str | None) -> Path:
    """The pipeline's folder in the hub's cache. What the model is gets checked before its weights are fetched."""
    try:
        for name, check in (("model_index.json", check_index), ("unet/config.json", check_unet)):
            check(_read(Path(hf_hub_download(model, name, revision=revision))), model)
        return Path(DiffusionPipeline.download(model, variant=variant, revision=revision, use_safetensors=True))
    except ModelError:
        raise
    except Exception as error:  # the hub raises types of its own, OSError and ValueError for what users mistype
        root = _root(error)
        raise ModelError(
            f"Cannot get {model} from the hub ({type(root).__name__}: {_first_words(root)}). Check the name, the "
            "network, your access to the model, and whether it offers .safetensors weights."
        ) from error


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, all the way back."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _first_words(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "no reason given")
    return line if len(line) <= 120 else line[:117] + "..."


def _check_folder(path: Path, variant: str | None) -> None:
    if not (path / "model_index.json").is_file():
        alone = _read(path / "config.json").get("_class_name") if (path / "config.json").is_file() else None
        what = f"a lone {alone}, not a diffusers pipeline folder" if alone else "not a diffusers pipeline folder"
        raise ModelError(
            f"{path} is {what}: it has no model_index.json. Pass the folder that holds model_index.json, unet/, vae/ "
            "and the others, or a single .safetensors file."
        )
    check_index(_read(path / "model_index.json"), str(path))
    unet = path / "unet"
    if not (unet / "config.json").is_file():
        raise ModelError(f"{path} is incomplete: it has no unet/config.json. {SUPPORTED}")
    check_unet(_read(unet / "config.json"), str(path))
    if not any(unet.glob("*.safetensors")):
        pickles = sorted(p.name for p in unet.iterdir() if p.suffix in PICKLES)
        found = f"only pickles ({', '.join(pickles)}), which slimdiff does not read" if pickles else "no weights"
        raise ModelError(
            f"{unet} holds {found}. Save the pipeline with save_pretrained(..., safe_serialization=True) and pass that."
        )
    if variant and not any(unet.glob(f"*.{variant}*.safetensors")):
        raise ModelError(
            f"{unet} has no weights of variant '{variant}'; leave out --variant or pick one that is there."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); the model is damaged.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object; the model is damaged.")
    return content


def unet_files(source: Source) -> list[Path]:
    """The files that hold the UNet's weights (and everything else's, for a single file)."""
    if source.folder is None:
        return [Path(source.reference)]
    unet = source.folder / "unet"
    if source.variant:
        return sorted(unet.glob(f"*.{source.variant}*.safetensors"))
    plain = [path for path in unet.glob("*.safetensors") if path.name.count(".") == 1]
    return sorted(plain or unet.glob("*.safetensors"))


def unet_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in unet_files(source))


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype the UNet's weights are stored in. Raises ModelError if a single file holds no UNet."""
    prefix = "model.diffusion_model." if source.folder is None else ""
    path = unet_files(source)[0]
    with safe_open(path, framework="pt") as file:
        first = next((name for name in file.keys() if name.startswith(prefix)), None)  # noqa: SIM118
        if first is None:
            raise ModelError(f"{path} holds no tensor named {prefix}..., so no UNet: not supported. {SUPPORTED}")
        dtype: torch.dtype = file.get_tensor(first).dtype
    return dtype
