"""How far a slim model's predictions, latents and pictures are from the dense model's, at equal seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.demo import scenes
from slimdiff.guidance import guided
from slimdiff.influence import relative_error
from slimdiff.inpainting import canvases
from slimdiff.measured import Fidelity, Picture, Settings, psnr_of
from slimdiff.pipeline import paint
from slimdiff.ready import eager
from slimdiff.report.wording import ordinal

LARGEST_BATCH = 16
LATENTS_AT_ONCE = 16_384
"""Latent positions of one batch: 16 of the miniature's pictures, 4 of Stable Diffusion 1.x, 1 of XL."""

SIGMA, REACH = 1.5, 5
"""Of the SSIM's Gaussian window, in pixels: 11 x 11, as in Wang et al. 2004."""


@eager()
def compare(dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings) -> tuple[Fidelity, list[Picture]]:
    """Sample every prompt with both models, and along the dense trajectory compare their guided predictions."""
    drift: list[float] = []
    noise: list[list[float]] = []
    timesteps: list[float] = []
    pictures: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with tqdm(total=2 * len(settings.prompts), unit="picture", disable=None, desc="compare") as bar:
        for chosen in batches(dense, settings):
            canvas = canvases(dense, settings, chosen)
            calls: list[tuple[float, Tensor]] = []
            with compared(dense.unet, slim.unet, len(chosen), settings.guidance_scale, calls):
                reference = paint(dense, settings, chosen, canvas=canvas)
            bar.update(len(chosen))
            latents = paint(slim, settings, chosen, canvas=canvas)
            bar.update(len(chosen))
            drift += finite(relative_error(latents, reference))
            timesteps = [timestep for timestep, _ in calls]
            noise = noise or [[] for _ in calls]
            for values, (_, error) in zip(noise, calls, strict=True):
                values += finite(error)
            for pipe, final, side in zip((dense, slim), (reference, latents), pictures, strict=True):
                side += list(decode(pipe, final))
    mse = [mean_squared_error(a, b) for a, b in zip(*pictures, strict=True)]
    ssim = [structural_similarity(a, b) for a, b in zip(*pictures, strict=True)]
    found = Fidelity(
        tuple(drift), tuple(map(tuple, noise)), tuple(timesteps), tuple(mse), tuple(ssim),
        _attributes(pictures, settings.prompts),
    )  # fmt: skip
    return found, [
        Picture(
            label, settings.prompts[i], settings.negatives[i], settings.seed + i, drift[i], psnr_of(mse[i]), ssim[i],
            pictures[0][i], pictures[1][i],
        )
        for i, label in pick(drift, settings.pictures)
    ]  # fmt: skip


def pictures_at_once(pipe: DiffusionPipeline, settings: Settings) -> int:
    """A batch that fits most devices."""
    scale = pipe.vae_scale_factor
    positions = (settings.height // scale) * (settings.width // scale)
    return max(1, min(LARGEST_BATCH, LATENTS_AT_ONCE // positions))


def batches(pipe: DiffusionPipeline, settings: Settings) -> Iterator[range]:
    """The numbers of the prompts that are painted at once."""
    prompts, size = len(settings.prompts), pictures_at_once(pipe, settings)
    return (range(first, min(first + size, prompts)) for first in range(0, prompts, size))


@dataclass(frozen=True)
class Painted:
    """Of every prompt the final latents, (prompts, C, h, w), and the 8-bit picture, (H, W, 3)."""

    latents: Tensor
    pictures: list[np.ndarray]

    @staticmethod
    def by(pipe: DiffusionPipeline, settings: Settings, dense: DiffusionPipeline, what: str) -> Painted:
        """Inpainting pipelines paint on canvases of the dense one."""
        latents: list[Tensor] = []
        pictures: list[np.ndarray] = []
        with tqdm(total=len(settings.prompts), unit="picture", disable=None, leave=False, desc=what) as bar:
            for chosen in batches(pipe, settings):
                found = paint(pipe, settings, chosen, canvas=canvases(dense, settings, chosen))
                latents.append(found.cpu())
                pictures += list(decode(pipe, found))
                bar.update(len(chosen))
        return Painted(torch.cat(latents), pictures)

    def apart(self, other: Painted) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Drift of these latents from the other's, and mean squared errors of the pictures, by prompt."""
        pairs = zip(self.pictures, other.pictures, strict=True)
        return tuple(finite(relative_error(self.latents, other.latents))), tuple(mean_squared_error(*p) for p in pairs)


def finite(error: Tensor) -> list[float]:
    """Errors as numbers; a model whose outputs are not finite is infinitely wrong."""
    values: list[float] = error.nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()
    return values


@contextmanager
def compared(
    dense: nn.Module, slim: nn.Module, prompts: int, guidance_scale: float, calls: list[tuple[float, Tensor]]
) -> Iterator[None]:
    """While inside, each call of the dense UNet on a batch of prompts runs the slim one on the same arguments too.

    Adds to `calls` the timestep and the relative squared error of the guided prediction, (prompts,).
    """
    running = False  # a model compared with itself must not compare the comparison

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            changed = slim(*args, **kwargs)[0]
        finally:
            running = False
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        error = relative_error(*(guided(side, prompts, guidance_scale) for side in (changed, output[0])))
        calls.append((float(timestep), error.cpu()))

    handle = dense.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> np.ndarray:
    """Latents (B, C, h, w) -> 8-bit pictures (B, H, W, 3), as the pipeline itself does it."""
    vae, config = pipe.vae, pipe.vae.config
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(config, "force_upcast", False)  # the decoder of XL overflows in float16
    if upcast:
        vae.to(torch.float32)
    try:
        latents = latents.to(vae.device, vae.dtype) / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (latents.new_tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
            latents = latents * std + mean
        pictures = vae.decode(latents, return_dict=False)[0].float()
    finally:
        if upcast:
            vae.to(dtype)
    bits = (pictures / 2 + 0.5).nan_to_num(nan=0).clamp(0, 1).mul(255).round().to(torch.uint8)
    array: np.ndarray = bits.permute(0, 2, 3, 1).cpu().numpy()
    return array


def mean_squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def structural_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean SSIM (Wang et al. 2004) of two 8-bit pictures (H, W, C): 1 for equal ones.

    Channels are compared one by one; the margin that the window does not fill is left out where the picture is larger.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(picture: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(picture, (SIGMA, SIGMA, 0), truncate=REACH / SIGMA)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    inner = index[REACH:-REACH, REACH:-REACH] if min(a.shape[:2]) > 2 * REACH else index
    return float(inner.mean())


def _attributes(
    pictures: tuple[list[np.ndarray], list[np.ndarray]], prompts: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]] | None:
    of_grammar = all(scenes.parse(prompt) for prompt in prompts)
    if not of_grammar or pictures[0][0].shape != (scenes.SIDE, scenes.SIDE, 3):
        return None
    dense, slim = (scenes.mean_scores(side, list(prompts)) for side in pictures)
    return dense, slim


def pick(drift: Sequence[float], count: int) -> list[tuple[int, str]]:
    """Prompts to show and what to call them: the worst half of `count`, worst first, then those nearest the median."""
    order = sorted(range(len(drift)), key=lambda i: -drift[i])
    count = min(count, len(order))
    worst = order[: (count + 1) // 2]
    rest, middle = order[len(worst) :], (len(order) - 1) / 2
    place = {i: rank for rank, i in enumerate(order)}
    typical = sorted(sorted(rest, key=lambda i: abs(place[i] - middle))[: count - len(worst)], key=place.__getitem__)
    names = ["worst", *(f"{ordinal(n)} worst" for n in range(2, len(worst) + 1))]
    return [*zip(worst, names, strict=False), *((i, "typical") for i in typical)]
