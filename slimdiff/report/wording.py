"""Numbers as people read them, and columns of them: shared by the terminal's tables and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = tuple[str, ...]
"""Cells of one line of a table, the line's name first."""


def percent(share: float) -> str:
    """Two significant digits of a share, such as an error: 0.0123 -> "1.2%", 1.7 -> "170%"."""
    if not math.isfinite(share):
        return "not finite"
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{100 * share:#.2g}%"


def change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x"


def seconds(time: float, low: float | None = None, high: float | None = None) -> str:
    """Three digits of a time, and of its quartiles in the same unit: "59.5 ms" or "59.5 ms (59.0 - 61.9)"."""
    for unit, letters in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if time >= 0.9995 * unit or letters == "us":
            break
    digits = 2 if time < 9.995 * unit else 1 if time < 99.95 * unit else 0
    spread = "" if low is None or high is None else f" ({low / unit:.{digits}f} - {high / unit:.{digits}f})"
    return f"{time / unit:.{digits}f} {letters}{spread}"


def duration(time: float) -> str:
    """Seconds of a long job, in two units at most: "45 s", "12 min", "1 h 20 min"."""
    if time < 59.5:
        return f"{time:.0f} s"
    hours, minutes = divmod(round(time / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def count(number: float) -> str:
    """1234567 -> "1.23 M"."""
    for unit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes, in decimal units: 1234567 -> "1.23 MB"."""
    text = count(number)
    return f"{text}B" if " " in text else f"{text} B"


def decibels(psnr: float) -> str:
    return "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"


def similarity(ssim: float) -> str:
    return f"{ssim:.4f}"


def ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def columns(rows: Sequence[Row]) -> str:
    """Rows under each other: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
