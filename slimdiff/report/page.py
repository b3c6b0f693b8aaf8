"""The benchmark's report: `report.json` for machines, one self-contained `report.html` for people, and a sheet of
pictures to show around."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from slimdiff.measured import Picture, quantile
from slimdiff.report import document, sheet, svg, unet
from slimdiff.report.document import card, definitions, figure, section, table, typeset
from slimdiff.report.of_plan import picture
from slimdiff.report.results import Report
from slimdiff.report.wording import change, count, decibels, factor, percent, seconds, similarity, size

GAIN = 4
"""What the difference of two pictures is multiplied by to be seen; the same for all of them."""

LARGEST_SIDE = 384
"""Pixels of a picture in the page; larger ones are scaled down, or one report would weigh tens of megabytes."""

PIXELATED = 128
"""Side below which pictures are enlarged pixel by pixel."""


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `folder` and returns their paths; if there are pictures, a sheet of
    some beside them.

    Raises OutputError if they cannot be written.
    """
    if report.pictures:
        sheet.write(report.pictures, folder)
    return document.write(folder, "report", report.to_json(), html(report))


def html(report: Report) -> str:
    """The page. It refers to nothing outside itself and needs no script."""
    name = str(report.plan.provenance.get("model", "UNet")).rstrip("/").split("/")[-1]
    headline = "".join(
        f'<b class="{kind}">{typeset(text)}</b>' if kind else typeset(text) for text, kind in report.headline()
    )
    sections = [
        section("Measurements", measurements(report)),
        section(
            "Pictures", gallery(report.pictures),
            "The worst pairs first, then typical ones. Both models start from the same noise.",
        ),
        errors(report),
        section("Widths", picture(report.plan), unet.LEAD, unet.LEGEND),
        section("Provenance", definitions({**report.provenance, "plan": report.plan.provenance})),
    ]  # fmt: skip
    return document.document(f"{name}, slim against dense", headline, cards(report), sections)


def cards(report: Report) -> str:
    """The figures to remember, of the UNet and of a picture; the speed-up and the drift share one card."""
    found, picture = report.size, report.speed[-1]
    macs = [m.total for m in found.macs]

    def both(title: str, pair: Sequence[int], show: Callable[[float], str]) -> str:
        return card(figure("slim", title, change(*pair), f"{show(pair[0])} to {show(pair[1])}"))

    typical, worst = (percent(quantile(report.fidelity.drift, q)) for q in (0.5, 1))
    times = f"{seconds(picture.dense.median)} to {seconds(picture.slim.median)}"
    ideal = f"ideal by MACs {factor(found.ideal_speedup)}"
    speed = figure("slim", "Speed-up of a picture", factor(picture.speedup.median), times, ideal)
    drift = figure("drift", "Drift of its latents", typical, "typically", f"{worst} at worst")
    return (
        both("Parameters", found.parameters, count)
        + both("MACs", macs, count)
        + (both("On disk", found.checkpoint, size) if found.checkpoint else both("Weights", found.weights, size))
        + card(speed, drift)
    )


def measurements(report: Report) -> str:
    attributes, stacks = report.attribute_rows(), report.stack_rows()
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*report.doubts(), *report.notes()))
    return (
        f'<div class="speed">{table(report.speed_rows())}</div>{table(stacks) if stacks else ""}<div class="halves">'
        f"<div>{table(report.size_rows())}</div><div>{table(report.fidelity_rows())}</div>"
        f'<div>{table(attributes) if attributes else ""}</div><div class="notes">{notes}</div></div>'
    )


def errors(report: Report) -> str:
    noise = report.fidelity.noise
    median, upper = ([quantile(e, q) for e in noise] for q in (0.5, 0.9))
    return section(
        "Error by timestep", svg.error_plot(report.fidelity.timesteps, median, upper),
        "Both models predict from the same latents of the dense model; the error is that of the guided prediction.",
        (("line-mark", "median prompt"), ("band-mark", "up to 9 in 10 prompts")),
    )  # fmt: skip


def gallery(pictures: Sequence[Picture]) -> str:
    """The pairs, in the order they are given."""
    if not pictures:
        return '<p class="empty">No pictures were asked for.</p>'
    return f'<div class="gallery">{"".join(pair(one) for one in pictures)}</div>'


def pair(picture: Picture) -> str:
    difference = (GAIN * np.abs(picture.dense.astype(int) - picture.slim)).clip(0, 255).astype(np.uint8)
    sides = {"dense": picture.dense, "slim": picture.slim, f"difference × {GAIN}": difference}
    style = ' class="pixels"' if max(picture.dense.shape[:2]) <= PIXELATED else ""
    images = "".join(
        f'<figure><img src="{data_uri(side)}" alt="{escape(f"{name}: {picture.prompt}")}"{style}>'
        f"<figcaption>{name}</figcaption></figure>"
        for name, side in sides.items()
    )
    figures = [decibels(picture.psnr), f"SSIM {similarity(picture.ssim)}", f"seed {picture.seed}"]
    without = f' <span class="soft">without {escape(picture.negative)}</span>' if picture.negative else ""
    kind = "typical" if picture.label == "typical" else "worst"
    return (
        f'<article class="card"><div class="trio">{images}</div><p class="tags"><b class="{kind}">{picture.label}</b>'
        f'<b class="drift">drift {percent(picture.drift)}</b>{"".join(f"<span>{f}</span>" for f in figures)}</p>'
        f"<p>{escape(picture.prompt)}{without}</p></article>"
    )


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a PNG inside the page."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
