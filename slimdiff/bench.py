"""`slimdiff bench`: dense against slim in one process, at equal seeds, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimdiff.families import is_told_guidance
from slimdiff.fidelity import Painted, compare
from slimdiff.inpainting import canvases
from slimdiff.macs import count
from slimdiff.measured import Settings, Size, Stack, Stacked, Timing
from slimdiff.pairs import check_alike, provenance, quiet
from slimdiff.pipeline import paint
from slimdiff.plan import Plan
from slimdiff.ready import eager
from slimdiff.report.results import Report
from slimdiff.stacking import PACKAGES, check, stacked
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

    Raises SlimdiffError if they differ in device, precision or scheduler, which would compare something else, or a
    stack cannot be put on top.
    """
    check_alike(dense, slim)
    settings = replace(settings, is_told_guidance=is_told_guidance(dense.unet.config))
    for stack in settings.stacks:
        check(slim, stack)
    with quiet(dense), quiet(slim):
        fidelity, pictures = compare(dense, slim, settings)
        speed = [_unet_timing(dense, slim, settings, prompts) for prompts in settings.batch_sizes]
        speed.append(_picture_timing(dense, slim, settings))
        size = _size(dense, slim, settings, sizes)
        stacks = _stacks(dense, slim, settings) if settings.stacks else ()
    packages = sorted({PACKAGES[name] for stack in settings.stacks for name in stack.split("+")})
    made = provenance(dense, packages)
    return Report(settings, plan, size, tuple(speed), fidelity, tuple(pictures), made, stacks)


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


@eager()
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


def _picture_timing(
    dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings, what: str = "1 picture"
) -> Timing:
    canvas = canvases(dense, settings, [0])

    def call(pipe: DiffusionPipeline) -> None:
        paint(pipe, settings, [0], canvas=canvas, output="np")

    what = f"{what}, {settings.steps} {'step' if settings.steps == 1 else 'steps'}"
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
    tensors = [part for module in modules for t in (*module.parameters(), *module.buffers()) for part in _parts(t)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """What is stored of a tensor: itself, or of a quantised one its integers and scales."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _stacks(dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings) -> tuple[Stack, ...]:
    """The settings' stacks on both models, each against the dense one without."""
    reference = Painted.by(dense, settings, dense, "dense")

    def measured(pipe: DiffusionPipeline, what: str) -> Stacked:
        apart = Painted.by(pipe, settings, dense, what).apart(reference)
        time = _picture_timing(dense, pipe, settings, what)
        return Stacked(time.slim, time.speedup, _bytes(pipe.unet), *apart)

    return tuple(
        Stack(name, measured(stacked(dense, name), f"dense + {name}"), measured(stacked(slim, name), f"slim + {name}"))
        for name in settings.stacks
    )
