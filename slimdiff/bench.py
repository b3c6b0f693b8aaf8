"""`slimdiff bench`: dense against slim in one process, at equal seeds, in turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from slimdiff.fidelity import compare
from slimdiff.inpainting import canvases
from slimdiff.macs import count
from slimdiff.measured import Settings, Size, Timing
from slimdiff.pairs import check_alike, provenance, quiet
from slimdiff.pipeline import paint
from slimdiff.plan import Plan
from slimdiff.report.results import Report
from slimdiff.timing import paired, peak_growth

__all__ = ["Report", "Settings", "measure"]

MEMORY_STEPS = 4
"""Most steps of the picture whose memory is measured: multistep schedulers keep up to four predictions."""


def measure(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    plan: Plan,
    settings: Settings,
    *,
    sizes: tuple[int, int] | None = None,
) -> Report:
    """Compare two pipelines on the same device; `sizes` are the bytes of their checkpoints, dense first, if any.

    Raises SlimdiffError if they differ in device, precision or scheduler, which would compare something else.
    """
    check_alike(dense, slim)
    with quiet(dense), quiet(slim):
        fidelity, pictures = compare(dense, slim, settings)
        speed = [_unet_timing(dense, slim, settings, prompts) for prompts in settings.batch_sizes]
        speed.append(_picture_timing(dense, slim, settings))
        size = _size(dense, slim, settings, sizes)
    return Report(settings, plan, size, tuple(speed), fidelity, tuple(pictures), provenance(dense))


def _unet_timing(dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings, prompts: int) -> Timing:
    inputs = _unet_inputs(dense, settings, prompts)
    rows = prompts * settings.rows_per_prompt
    what = f"UNet, {prompts} {'prompt' if prompts == 1 else 'prompts'} ({rows} {'row' if rows == 1 else 'rows'})"

    def call(unet: nn.Module) -> None:
        with torch.no_grad():
            unet(*inputs[0], **inputs[1])

    device = dense.unet.device
    return paired(what, lambda: call(dense.unet), lambda: call(slim.unet), pairs=settings.repeats, device=device)


class _Stop(Exception):
    """Ends a pipeline's run once its first UNet call has been seen."""


def _unet_inputs(pipe: DiffusionPipeline, settings: Settings, prompts: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the UNet's first call for a batch of prompts, from a real run, so that they fit any model.

    Prompts are taken from the start of the list, and round again where it is too short.
    """
    chosen = [i % len(settings.prompts) for i in range(prompts)]
    canvas = canvases(pipe, settings, chosen)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        paint(pipe, settings, chosen, canvas=canvas)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _picture_timing(dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings) -> Timing:
    canvas = canvases(dense, settings, [0])

    def call(pipe: DiffusionPipeline) -> None:
        paint(pipe, settings, [0], canvas=canvas, output="np")

    what = f"1 picture, {settings.steps} {'step' if settings.steps == 1 else 'steps'}"
    return paired(what, lambda: call(dense), lambda: call(slim), pairs=settings.repeats, device=dense.unet.device)


def _size(dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings, sizes: tuple[int, int] | None) -> Size:
    latent = settings.height // dense.vae_scale_factor, settings.width // dense.vae_scale_factor
    short, canvas = replace(settings, steps=min(MEMORY_STEPS, settings.steps)), canvases(dense, settings, [0])

    def memory(pipe: DiffusionPipeline) -> int | None:
        modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        growth = peak_growth(lambda: paint(pipe, short, [0], canvas=canvas, output="np"), pipe.unet.device)
        return None if growth is None else growth + _bytes(*modules)

    def both(measure: Any) -> tuple[Any, Any]:
        return measure(dense), measure(slim)

    peaks = both(memory)
    return Size(
        parameters=both(lambda pipe: sum(p.numel() for p in pipe.unet.parameters())),
        macs=both(lambda pipe: count(pipe.unet, latent, pipe.tokenizer.model_max_length)),
        weights=both(lambda pipe: _bytes(pipe.unet)),
        checkpoint=sizes,
        memory=None if None in peaks else peaks,
    )


def _bytes(*modules: nn.Module) -> int:
    """Of all parameters and buffers, each storage once."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
