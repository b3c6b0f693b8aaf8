"""A few pairs of pictures as one picture, for where no page of HTML can go: model cards, issues, chats."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slimdiff.files import replacing
from slimdiff.measured import Picture
from slimdiff.report.wording import percent

FILE = "pictures.png"
SIDE = 320
"""Pixels that a picture is brought to; smaller ones are enlarged pixel by pixel."""

MARGIN, LINE = 12, 16
LETTERS = 110
"""Of a caption under two pictures, so that it is no wider than they are."""


def write(pictures: Sequence[Picture], folder: Path) -> None:
    """`sheet` as `pictures.png` in a folder. Raises OutputError if it cannot be written."""
    with replacing(folder / FILE) as temporary:
        sheet(pictures).save(temporary, "PNG", optimize=True)


def sheet(pictures: Sequence[Picture], most: int = 4) -> Image.Image:
    """Dense left, slim right, at most `most` pairs: half of them the worst, the others typical."""
    typical = [picture for picture in pictures if picture.label == "typical"]
    worst = [picture for picture in pictures if picture.label != "typical"]
    shown = worst[: most - min(len(typical), most // 2)]
    shown += typical[: most - len(shown)]
    pairs = [(fitted(one.dense), fitted(one.slim)) for one in shown]
    width = 2 * SIDE + 3 * MARGIN
    heights = [dense.height + 2 * LINE + MARGIN for dense, _ in pairs]
    page = Image.new("RGB", (width, sum(heights) + LINE + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for column, name in enumerate(("dense", "slim")):
        draw.text((MARGIN + column * (SIDE + MARGIN), MARGIN // 2), name, "black", font)
    top = LINE + MARGIN
    for one, pair, height in zip(shown, pairs, heights, strict=True):
        for column, side in enumerate(pair):
            page.paste(side, (MARGIN + column * (SIDE + MARGIN), top))
        drift, prompt = f"{one.label}: latents drift by {percent(one.drift)}", ascii(one.prompt)[1:-1]
        text = f"{drift}\n{textwrap.shorten(prompt, LETTERS, placeholder=' ...')}"
        draw.multiline_text((MARGIN, top + pair[0].height + 2), text, "black", font, spacing=2)
        top += height
    return page


def fitted(picture: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) uint8, its longer side SIDE or, enlarged by a whole number, the next below."""
    image = Image.fromarray(picture)
    enlarged = max(1, SIDE // max(image.size))
    image = image.resize((enlarged * image.width, enlarged * image.height), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
