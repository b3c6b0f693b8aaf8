"""The benchmark's report: `report.json` for machines and one self-contained `report.html` for people."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from slimdiff.files import replacing, write_json
from slimdiff.measured import Picture, quantile
from slimdiff.report import svg
from slimdiff.report.results import Report
from slimdiff.report.wording import Row, change, count, decibels, factor, percent, seconds, similarity, size

TEMPLATE = Path(__file__).with_name("page.html.in")

GAIN = 4
"""What the difference of two pictures is multiplied by to be seen; the same for all of them."""

LARGEST_SIDE = 384
"""Pixels of a picture in the page; larger ones are scaled down, or one report would weigh tens of megabytes."""

PIXELATED = 128
"""Side below which pictures are enlarged pixel by pixel."""


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `folder` and returns their paths.

    Raises OutputError if they cannot be written.
    """
    data, page = folder / "report.json", folder / "report.html"
    write_json(data, report.to_json())
    with replacing(page) as temporary:
        temporary.write_text(html(report), encoding="utf-8")
    return data, page


def html(report: Report) -> str:
    """The page. It refers to nothing outside itself and needs no script."""
    noise = report.fidelity.noise
    name = str(report.plan.provenance.get("model", "UNet")).rstrip("/").split("/")[-1]
    attributes = report.attribute_rows()
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        headline="".join(
            f'<b class="{kind}">{typeset(text)}</b>' if kind else typeset(text) for text, kind in report.headline()
        ),
        cards=cards(report),
        size=table(report.size_rows()),
        speed=table(report.speed_rows()),
        fidelity=table(report.fidelity_rows()),
        attributes=table(attributes) if attributes else "",
        notes="".join(f"<p>{escape(note)}</p>" for note in report.notes()),
        pictures=gallery(report.pictures),
        errors=svg.error_plot(
            report.fidelity.timesteps, [quantile(e, 0.5) for e in noise], [quantile(e, 0.9) for e in noise]
        ),
        widths=svg.width_plots(report.plan.entries),
        plan=escape(report.plan.table()) if report.plan.entries else "",
        provenance=definitions({**report.provenance, "plan": report.plan.provenance}),
    )


def cards(report: Report) -> str:
    """The figures to remember, of the UNet and of a picture; the speed-up and the drift share one card."""
    found, picture = report.size, report.speed[-1]
    macs = [m.total for m in found.macs]

    def figure(kind: str, title: str, value: str, *under: str) -> str:
        lines = "".join(f"<span>{typeset(line)}</span>" for line in under)
        return f'<div class="figure {kind}"><h2>{escape(title)}</h2><strong>{typeset(value)}</strong>{lines}</div>'

    def both(kind: str, title: str, pair: Sequence[int], show: Any) -> str:
        after = f"{show(pair[0])} to {show(pair[1])}"
        return f'<div class="card">{figure(kind, title, change(*pair), after)}</div>'

    typical, worst = (percent(quantile(report.fidelity.drift, q)) for q in (0.5, 1))
    times = f"{seconds(picture.dense.median)} to {seconds(picture.slim.median)}"
    ideal = f"ideal by MACs {factor(found.ideal_speedup)}"
    speed = figure("slim", "Speed-up of a picture", factor(picture.speedup.median), times, ideal)
    drift = figure("drift", "Drift of its latents", typical, "typically", f"{worst} at worst")
    return (
        both("slim", "Parameters", found.parameters, count)
        + both("slim", "MACs", macs, count)
        + both("slim", "On disk", found.checkpoint, size)
        + f'<div class="card pair">{speed}{drift}</div>'
    )


def typeset(text: str) -> str:
    """Escaped text with real multiplication signs, minus signs and dashes; figures stay with their units."""
    text = re.sub(r"(?<=\d)x\b", "&times;", escape(text))
    text = re.sub(r"(?<!\S)-(?=\d)", "&minus;", text)
    text = re.sub(r"(?<=\d) - (?=\d)", "&#8201;&ndash;&#8201;", text)
    return re.sub(r"(?<=\d) (?=(?:[mu]?s|[kMGT]?B|[kMGT]|dB)\b)", "&nbsp;", text)


def table(rows: Sequence[Row]) -> str:
    head, *body = rows
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row"{" class=sub" if name.startswith(" ") else ""}>{escape(name.strip())}</th>'
        + "".join(f'<td data-of="{escape(of)}">{typeset(cell)}</td>' for of, cell in zip(head[1:], cells, strict=True))
        + "</tr>"
        for name, *cells in body
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def gallery(pictures: Sequence[Picture]) -> str:
    """The pairs, in the order they are given."""
    if not pictures:
        return '<p class="empty">No pictures were asked for.</p>'
    return f'<div class="gallery">{"".join(card(picture) for picture in pictures)}</div>'


def card(picture: Picture) -> str:
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


def definitions(data: dict[str, Any]) -> str:
    """Nested names and values as a definition list; lists and inner dictionaries in one line, None left out."""

    def line(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {line(inner)}" for key, inner in value.items() if inner is not None)
        return ", ".join(map(line, value)) if isinstance(value, list | tuple) else str(value)

    def row(name: str, value: Any) -> str:
        return f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(line(value))}</dd>" if value is not None else ""

    rows = []
    for name, value in data.items():
        deep = isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
        rows += [row(f"{name}: {key}", inner) for key, inner in value.items()] if deep else [row(name, value)]
    return f"<dl>{''.join(rows)}</dl>"
