"""A slim model and the dense one that it was made from, side by side: loaded alike, checked, described."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from slimdiff import __version__, checkpoint, pipeline, source
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan


def load(
    slim: Path,
    plan: Plan,
    dense: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
) -> tuple[DiffusionPipeline, DiffusionPipeline, source.Source]:
    """The dense and the slim pipeline, with calibration's scheduler, and where the dense one is.

    `dense` is by default the model that the checkpoint `slim` was made from, by this `plan`. Raises ModelError if
    either cannot be read, or they do not belong together.
    """
    on = pipeline.device_of(device)
    in_dtype = pipeline.dtype_of(dtype, on)
    made = plan.provenance
    found = source.again(made["model"], made.get("model_options", {}), dense, variant)
    found = found.with_loras(made.get("loras", ()))
    dense_pipe = pipeline.load(found, in_dtype)
    slim_pipe = checkpoint.load(slim, torch_dtype=pipeline.loading_dtype(in_dtype))
    pipes = dense_pipe, pipeline.unchecked(pipeline.painter(slim_pipe))
    plan.check_model(pipeline.fingerprint(pipes[0].unet), found.reference)
    for pipe in pipes:
        pipeline.use_scheduler(pipe, made["recipe"]["scheduler"])
        pipeline.cast(pipe, in_dtype).to(on)
    return *pipes, found


def conditions(pipe: DiffusionPipeline) -> dict[str, str]:
    """What pictures depend on beside the weights and the prompts."""
    options = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "device": str(pipe.unet.device),
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        "scheduler": f"{type(pipe.scheduler).__name__} {options}",
    }


def check_alike(dense: DiffusionPipeline, slim: DiffusionPipeline) -> None:
    """Raises SlimdiffError if they differ in device, precision or scheduler."""
    ours, theirs = conditions(dense), conditions(slim)
    for what, value in ours.items():
        if value != theirs[what]:
            raise SlimdiffError(
                f"The dense and the slim pipeline differ in {what} ({value} against {theirs[what]}), so their times "
                f"and pictures cannot be compared. Load both with the same {what}."
            )


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without progress bars."""
    before = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def provenance(pipe: DiffusionPipeline, others: Sequence[str] = ()) -> dict[str, Any]:
    """How the figures were made, with `others` among the packages. Names the kind of machine, not the machine."""
    device = pipe.unet.device
    packages = ("torch", "diffusers", "transformers", "numpy", *others)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": pipeline.device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__,
        "pipeline": type(pipe).__name__,
        "versions": {
            "slimdiff": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
        },
        "system": f"{platform.system()} {platform.machine()}",
    }
