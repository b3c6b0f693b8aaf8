"""The pictures that metrics look at: painted by both models at equal seeds, in files, so that runs can go on."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from slimdiff.errors import OutputError
from slimdiff.families import inpaints
from slimdiff.fidelity import decode
from slimdiff.files import replacing, write_json
from slimdiff.inpainting import canvases
from slimdiff.measured import Settings
from slimdiff.metrics.pictures import FILTER
from slimdiff.pairs import conditions
from slimdiff.pipeline import fingerprint, paint

SIDES = ("dense", "slim")
RECORD = "pictures.json"
FORMAT = 1

Size = tuple[int, int]
"""Width and height in pixels."""


def shrunk(settings: Settings, side: int) -> Size:
    """The size of pictures whose shorter side is at most `side` pixels."""
    share = min(1.0, side / min(settings.width, settings.height))
    return round(settings.width * share), round(settings.height * share)


def paint_both(
    dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings, folder: Path, size: Size, batch: int
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of both models' pictures, by prompt, in `folder`/dense and `folder`/slim; what is there stays.

    Raises OutputError if pictures are there that were painted otherwise, or files cannot be written.
    """
    prompts = len(settings.prompts)
    _claim(folder, dense, slim, settings, size)
    paths = tuple(tuple(folder / side / f"{i:06}.png" for i in range(prompts)) for side in SIDES)
    missing = [i for i in range(prompts) if not all(side[i].exists() for side in paths)]
    with tqdm(total=prompts, initial=prompts - len(missing), unit="prompt", disable=None, desc="paint") as bar:
        for first in range(0, len(missing), batch):
            chosen = missing[first : first + batch]
            canvas = canvases(dense, settings, chosen)
            for pipe, side in zip((dense, slim), paths, strict=True):
                _save(pipe, paint(pipe, settings, chosen, canvas=canvas), [side[i] for i in chosen], size)
            bar.update(len(chosen))
    return paths[0], paths[1]


def remove(folder: Path) -> None:
    """All pictures, and the record of what they are."""
    (folder / RECORD).unlink()
    for side in SIDES:
        shutil.rmtree(folder / side)


def _save(pipe: DiffusionPipeline, latents: Any, paths: Sequence[Path], size: Size) -> None:
    for picture, path in zip(decode(pipe, latents), paths, strict=True):
        with replacing(path) as temporary:
            Image.fromarray(picture).resize(size, FILTER).save(temporary, "PNG")


def _claim(folder: Path, dense: DiffusionPipeline, slim: DiffusionPipeline, settings: Settings, size: Size) -> None:
    """Write down what the pictures in `folder` are of. Raises OutputError if other ones are there."""
    now: dict[str, Any] = {
        "dense model": fingerprint(dense.unet),
        "slim model": fingerprint(slim.unet),
        "steps": settings.steps,
        "guidance scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "size": list(size),
        "seed": settings.seed,
        **{what: value for what, value in conditions(dense).items() if what != "device"},
    }
    prompts = list(settings.prompts)
    if (folder / RECORD).exists():
        before, old = _read(folder)
        differing = [what for what in now if before.get(what) != now[what]]
        shared = max(len(old), len(prompts)) if inpaints(dense.unet.config) else min(len(old), len(prompts))
        if differing or old[:shared] != prompts[:shared]:
            raise OutputError(
                f"{folder} holds pictures painted with other {', '.join(differing) or 'prompts'}"
                f"{_change(before, now, differing)}. Choose another folder with -o, or remove this one."
            )
        prompts = max(old, prompts, key=len)
    elif any((folder / side).exists() for side in SIDES):
        raise OutputError(f"{folder} holds pictures but no {RECORD} that says what they are. Choose another with -o.")
    write_json(folder / RECORD, {"format": FORMAT, "painted": now, "prompts": prompts})


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return data["painted"], data["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder / RECORD} cannot be read ({error}). Choose another folder with -o.") from error


def _change(before: dict[str, Any], now: dict[str, Any], differing: Sequence[str]) -> str:
    """Of a single setting, from what to what."""
    if len(differing) != 1:
        return ""
    old, new = (textwrap.shorten(str(side.get(differing[0])), 40, placeholder=" ...") for side in (before, now))
    return f" ({old}, not {new})"
