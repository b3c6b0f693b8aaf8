"""Finding and loading a model, naming it by its content, and running it on a batch of prompts from fixed seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import Tensor, nn

from slimdiff.errors import ModelError, SlimdiffError
from slimdiff.recipe import SCHEDULERS

DEMO = Path(__file__).parent / "demo" / "model"
"""The bundled miniature."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a model came from: `reference` as typed, a short `name` for folders, and its local diffusers folder.

    `folder` is None for a single file. `variant` is the weights' variant, such as "fp16".
    """

    reference: str
    name: str
    folder: Path | None
    variant: str | None = None


def device_of(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises SlimdiffError if CUDA is asked for and not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SlimdiffError(f"'{name}' is not a device; use cpu, cuda, cuda:1 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SlimdiffError(
            f"Device '{name}' was asked for, but this torch ({torch.__version__}) sees no CUDA device. "
            "Use --device cpu, or install a CUDA build of torch and check the driver with nvidia-smi."
        )
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def find(model: str | None, variant: str | None = None, revision: str | None = None) -> Source:
    """Where a model is: a hub id (downloaded into the hub's cache), a folder, a `.safetensors` file, None for the demo.

    Raises ModelError if there is nothing there, or only pickles.
    """
    if model is None or model == "demo":
        return Source("demo", "demo", DEMO, variant)
    path = Path(model).expanduser()
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{model} is a pickle, and loading one can run any code in it. Use the model's .safetensors file, or convert "
            "it on a machine you can afford to lose."
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{model} is a file, but not a .safetensors file; pass a folder, a hub id or .safetensors.")
        return Source(str(path.resolve()), path.stem, None)
    if path.is_dir():
        _check_folder(path, variant)
        return Source(str(path.resolve()), path.resolve().name, path.resolve(), variant)
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".safetensors") or model.count("/") != 1
    if looks_local:
        raise ModelError(f"There is no file or folder {model}, and it is no hub id (those look like owner/name).")
    try:
        folder = DiffusionPipeline.download(model, variant=variant, revision=revision, use_safetensors=True)
    except Exception as error:  # the hub raises a family of its own types, OSError and ValueError for what users mistype
        raise ModelError(
            f"Cannot get {model} from the hub: {str(error).strip().splitlines()[0]} "
            "Check the name, the network, and whether the model offers .safetensors weights."
        ) from error
    return Source(model, model.split("/")[-1], Path(folder), variant)


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
        raise ModelError(f"{unet} has no weights of variant '{variant}'; leave out --variant or pick one that is there.")


def load(source: Source, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The dense pipeline on the CPU, quiet and without a safety checker.

    Raises ModelError if it cannot be read or its UNet is not one of Stable Diffusion's.
    """
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        if source.folder is None:
            pipe = _from_single_file(source.reference, dtype)
        else:
            pipe = DiffusionPipeline.from_pretrained(source.folder, variant=source.variant, **options)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError) as error:
        raise ModelError(
            f"Cannot load {source.reference}: {str(error).strip().splitlines()[0]} "
            "It has to be a complete Stable Diffusion 1.x, 2.x or SDXL pipeline with .safetensors weights."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"Cannot load {source.reference}: a weight file is damaged ({error}). Download it again.") from error
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, diffusers.UNet2DConditionModel):
        found = type(unet).__name__ if unet is not None else type(pipe).__name__
        raise ModelError(
            f"{source.reference} has no UNet2DConditionModel (found {found}); slimdiff supports Stable Diffusion 1.x, "
            "2.x and SDXL."
        )
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    return pipe


def _from_single_file(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    with safe_open(path, framework="pt") as file:
        is_xl = any(name.startswith("conditioner.embedders.1.") for name in file.keys())  # noqa: SIM118
    kind = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    return kind.from_single_file(path, torch_dtype=dtype)


def family(pipe: DiffusionPipeline, source: Source) -> str:
    """The key of `calib/recipes.json` that fits a model."""
    if source.folder == DEMO:
        return "demo"
    if getattr(pipe, "text_encoder_2", None) is not None or pipe.unet.config.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if pipe.unet.config.cross_attention_dim == 1024 else "sd1"


def native_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels the model was made for."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def fingerprint(unet: nn.Module) -> str:
    """SHA-256 over names, shapes and values (as float16, so that a copy loaded in half precision is the same model).

    Raises ModelError if a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        if not torch.isfinite(tensor).all():
            raise ModelError(f"The UNet's weight {name} holds NaN or infinite values; the checkpoint is damaged.")
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


def use_scheduler(pipe: DiffusionPipeline, name: str | None) -> None:
    """Swap in the scheduler of a recipe, made from the checkpoint's own schedule."""
    if name is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)


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
    """The dtype the UNet's weights are stored in."""
    with safe_open(unet_files(source)[0], framework="pt") as file:
        first = next(name for name in file.keys() if not name.startswith(("first_stage", "cond_stage", "conditioner")))
        dtype: torch.dtype = file.get_tensor(first).dtype
    return dtype


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compress in: never narrower than what is stored, and float32 where half precision is slow."""
    return torch.float32 if device.type == "cpu" else stored


Conditioning = dict[str, Tensor]
"""Keyword arguments of a pipeline call that stand for its prompts, each with the prompts along dimension 0."""


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompts: Sequence[str], negatives: Sequence[str]) -> Conditioning:
    """What the pipeline's text encoders make of prompts and negative prompts."""
    parts = pipe.encode_prompt(
        prompt=list(prompts),
        negative_prompt=list(negatives),
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, parts, strict=False))


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    conditioning: Conditioning,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    output: str = "latent",
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """Run the real pipeline from fixed seeds; each picture's noise depends on its own seed only, not on the batch.

    Returns the pipeline's images: final latents (B, 4, H, W) for `output="latent"`, (B, H, W, 3) in [0, 1] for "np".
    """

    def step_end(pipe: DiffusionPipeline, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(index)
        return state

    return pipe(
        **conditioning,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        output_type=output,
        callback_on_step_end=step_end,
    ).images


