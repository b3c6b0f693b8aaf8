"""Loading a model, naming it by its content, and running it on a batch of prompts from fixed seeds."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff import families, single_file
from slimdiff.errors import ModelError, SlimdiffError
from slimdiff.lora import merge
from slimdiff.measured import Settings
from slimdiff.recipe import SCHEDULERS, Recipe
from slimdiff.source import DEMO, Source, stored_dtype


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


def device_name(device: torch.device) -> str:
    """The kind of device: the model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def loading_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to load in what is to be `cast` to `dtype`."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def cast(part: Any, dtype: torch.dtype) -> Any:
    """A pipeline or UNet itself, in a dtype: to bfloat16 by way of float16, so that its `fingerprint` stays."""
    return part if part.dtype == dtype else part.to(loading_dtype(dtype)).to(dtype)


def load(source: Source, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The dense pipeline that paints from prompts, on the CPU, its LoRAs merged, quiet, without a safety checker.

    Raises ModelError if it cannot be read, its UNet is not one of Stable Diffusion's, or a LoRA does not fit.
    """
    first = stored_dtype(source) if source.loras else loading_dtype(dtype)  # a LoRA is added to what is stored
    with _readable(source):
        pipe = unchecked(painter(_read(source, first)))
    families.check_unet(pipe.unet.config, source.reference)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    merge(pipe, source.loras)
    return cast(pipe, dtype)


def load_text(source: Source, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline with its tokenizers and text encoders only, which `encode_prompt` needs, on the CPU.

    Raises ModelError if it cannot be read.
    """
    without = dict.fromkeys(("unet", "vae", "safety_checker", "feature_extractor", "image_encoder"))
    with _readable(source):
        if source.folder is None:
            return single_file.load(source.reference, source.options.get("config"), dtype, **without)
        config = json.loads((source.folder / "unet" / "config.json").read_text(encoding="utf-8"))
        kind = families.PAINTERS[families.is_xl(config), False]
        return kind.from_pretrained(
            source.folder, variant=source.variant, torch_dtype=dtype, use_safetensors=True, **without
        )


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Load quietly. Raises ModelError for whatever the libraries raise."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError) as error:
        raise ModelError(
            f"Cannot load {source.reference}: {str(error).strip().splitlines()[0]} "
            "It has to be a complete Stable Diffusion 1.x, 2.x or SDXL pipeline with .safetensors weights."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(
            f"Cannot load {source.reference}: a weight file is damaged ({error}). Download it again."
        ) from error


def _read(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline as it is stored, but for a VAE that was asked for."""
    config, parts = source.options.get("config"), {}
    if vae := source.options.get("vae"):
        parts["vae"] = single_file.load_vae(vae, config or (str(source.folder) if source.folder else None), dtype)
    if source.folder is None:
        return single_file.load(source.reference, config, dtype, **parts)
    return DiffusionPipeline.from_pretrained(
        source.folder, variant=source.variant, torch_dtype=dtype, use_safetensors=True, **parts
    )


def painter(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that paints from prompts with the parts of `pipe`, which may be of image-to-image or other use.

    Not by `from_pipe`, which would cast all parts to one dtype, and `pipe` has them too. Raises ModelError if parts are
    missing.
    """
    config = pipe.unet.config
    kind = families.PAINTERS[families.is_xl(config), families.inpaints(config)]
    if type(pipe) is kind:
        return pipe
    parameters, optional = inspect.signature(kind).parameters, dict.fromkeys(kind._optional_components)
    given = optional | dict(pipe.config) | pipe.components
    needed = [name for name, one in parameters.items() if one.default is one.empty and name not in optional]
    if missing := [name for name in needed if given.get(name) is None]:
        raise ModelError(f"A {type(pipe).__name__} without {missing[0]} cannot paint; a {kind.__name__} needs one.")
    own: DiffusionPipeline = kind(**{name: given[name] for name in parameters if name in given})
    return own


def unchecked(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline itself, without the safety checker it may have: that one blackens pictures, and takes time."""
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    return pipe


def family(pipe: DiffusionPipeline, source: Source) -> str:
    """The key of `calib/recipes.json` that fits a model."""
    return "demo" if source.folder == DEMO else families.family(pipe.unet.config)


def native_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels the model was made for."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def fingerprint(unet: nn.Module) -> str:
    """SHA-256 over names, shapes and values, rounded so that a copy loaded in half precision is the same model.

    They become float16, then bfloat16: what is stored in float16 has one fingerprint in float32, float16 and bfloat16.
    So has what is stored in float32, but where it is rounded to bfloat16 directly, as diffusers does it.

    Raises ModelError if a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        if not torch.isfinite(tensor).all():
            raise ModelError(f"The UNet's weight {name} holds NaN or infinite values; the checkpoint is damaged.")
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.to("cpu", torch.float16).to(torch.bfloat16)
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prompts_at_once(pipe: DiffusionPipeline, height: int, width: int) -> int:
    """As many as keep the device busy, fewer the larger the picture in pixels."""
    pixels = height * width // pipe.vae_scale_factor**2
    return max(1, min(32, (65536 if pipe.unet.device.type == "cuda" else 4608) // pixels))


def use_scheduler(pipe: DiffusionPipeline, name: str | None) -> None:
    """Swap in the scheduler of a recipe, made from the checkpoint's own schedule."""
    if name is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compress in: never narrower than what is stored, and float32 where half precision is slow."""
    return torch.float32 if device.type == "cpu" else stored


Conditioning = dict[str, Tensor]
"""Keyword arguments of a pipeline call that stand for its prompts, or for the pictures it inpaints (see
`inpainting.canvases`), each with the prompts along dimension 0."""


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompts: Sequence[str], negatives: Sequence[str]) -> Conditioning:
    """What the pipeline's text encoders make of prompts and negative prompts.

    An empty negative prompt is what a call without one gets: zeros, if the pipeline has `force_zeros_for_empty_prompt`,
    as SDXL's has.
    """
    parts = pipe.encode_prompt(
        prompt=list(prompts),
        negative_prompt=list(negatives),
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    found: Conditioning = dict(zip(names, parts, strict=False))
    if pipe.config.get("force_zeros_for_empty_prompt"):
        empty = [row for row, negative in enumerate(negatives) if not negative]
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            found[name][empty] = 0
    return found


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

    Returns the pipeline's images: final latents (B, 4, H, W) for `output="latent"`, (B, H, W, 3) in [0, 1] for "np",
    (B, 3, H, W) in [0, 1] for "pt".
    """
    from_noise = {"strength": 1.0} if "mask_image" in conditioning else {}

    def step_end(pipe: DiffusionPipeline, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(index)
        return state

    return pipe(
        **conditioning,
        **from_noise,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        output_type=output,
        callback_on_step_end=step_end,
    ).images


def paint(
    pipe: DiffusionPipeline,
    job: Recipe | Settings,
    chosen: Sequence[int],
    on_step: Callable[[int], None] | None = None,
    *,
    canvas: Conditioning,
    output: str = "latent",
) -> Tensor:
    """What `sample` makes of the job's prompts of these numbers, each from its own seed, on their `canvas`."""
    conditioning = encode(pipe, [job.prompts[i] for i in chosen], [job.negatives[i] for i in chosen])
    images: Tensor = sample(
        pipe, conditioning | canvas, [job.seed + i for i in chosen], steps=job.steps,
        guidance_scale=job.guidance_scale, height=job.height, width=job.width, output=output, on_step=on_step,
    )  # fmt: skip
    return images
