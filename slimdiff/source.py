"""Where a model is: the bundled miniature, a hub id, a diffusers folder or a single file, and what its files say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from slimdiff.errors import ModelError

DEMO = Path(__file__).parent / "demo" / "model"
"""The bundled miniature."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a model came from: `reference` as typed, a short `name` for folders, and its local diffusers folder.

    `folder` is None for a single file. `variant` is the weights' variant, such as "fp16". `loras` are files of LoRAs to
    merge into it when it is loaded, each with its scale.
    """

    reference: str
    name: str
    folder: Path | None
    variant: str | None = None
    loras: tuple[tuple[str, float], ...] = ()

    def with_loras(self, loras: Iterable[tuple[str, float]]) -> Source:
        """The model with these LoRAs, also in its name. Raises ModelError if one is no `.safetensors` file."""
        found = tuple((str(Path(file).expanduser().resolve()), float(scale)) for file, scale in loras)
        for file, _ in found:
            if not Path(file).is_file() or Path(file).suffix != ".safetensors":
                raise ModelError(f"There is no .safetensors file {file} with a LoRA to merge.")
        return replace(self, name="+".join([self.name, *(Path(file).stem for file, _ in found)]), loras=found)


def find(model: str | None, variant: str | None = None, revision: str | None = None) -> Source:
    """Where a model is: a hub id (downloaded into the hub's cache), a folder, a `.safetensors` file, None for the demo.

    Raises ModelError if there is nothing there, or only pickles.
    """
    if model is None or model == "demo":
        return Source("demo", "demo", DEMO, variant)
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
        return Source(str(path.resolve()), path.stem, None)
    if path.is_dir():
        _check_folder(path, variant)
        return Source(str(path.resolve()), path.resolve().name, path.resolve(), variant)
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".safetensors") or model.count("/") != 1
    if looks_local:
        raise ModelError(f"There is no file or folder {model}, and it is no hub id (those look like owner/name).")
    try:
        folder = DiffusionPipeline.download(model, variant=variant, revision=revision, use_safetensors=True)
    except Exception as error:  # the hub raises types of its own, OSError and ValueError for what users mistype
        root = _root(error)
        raise ModelError(
            f"Cannot get {model} from the hub ({type(root).__name__}: {_first_words(root)}). Check the name, the "
            "network, your access to the model, and whether it offers .safetensors weights."
        ) from error
    return Source(model, model.split("/")[-1], Path(folder), variant)


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
        raise ModelError(
            f"{path} is not a diffusers pipeline folder: it has no model_index.json. Pass the folder that holds "
            "model_index.json, unet/, vae/ and the others, or a single .safetensors file."
        )
    unet = path / "unet"
    if not unet.is_dir():
        raise ModelError(
            f"{path} has no unet/ folder. slimdiff compresses UNets of Stable Diffusion 1.x, 2.x and SDXL; transformer "
            "models (SD3, Flux, PixArt) are not supported."
        )
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


_NOT_UNET = ("first_stage", "cond_stage", "conditioner")


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype the UNet's weights are stored in."""
    with safe_open(unet_files(source)[0], framework="pt") as file:
        first = next(name for name in file.keys() if not name.startswith(_NOT_UNET))  # noqa: SIM118
        dtype: torch.dtype = file.get_tensor(first).dtype
    return dtype
