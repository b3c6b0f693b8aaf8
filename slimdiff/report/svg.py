"""Plots as HTML with inline SVG: the curves stretch to the page's width, the lettering around them keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from slimdiff.report.wording import percent

MARKS = 7
"""Most marks along an axis."""


def drawing(width: float, height: float, content: str, label: str) -> str:
    """An SVG that fills its frame, whatever the frame's shape."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{content}</svg>"
    )


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{style}"/>'


def path(points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> str:
    steps = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return f'<path d="M{steps}{"Z" if closed else ""}" class="{style}"/>'


def dot(x: float, y: float, style: str) -> str:
    """A line of no length with round ends: it stays round in a drawing that is stretched."""
    return f'<path d="M{x:.2f} {y:.2f}h0" class="dot {style}"/>'


def hover(content: str, text: str) -> str:
    return f"<g><title>{escape(text)}</title>{content}</g>"


@dataclass(frozen=True)
class Axis:
    """Values between `low` and `high`, in equal steps or, if `logarithmic`, in equal ratios; `marks` are lettered."""

    title: str
    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    @staticmethod
    def decades(title: str, values: Sequence[float], show: Callable[[float], str]) -> Axis:
        """Powers of ten around the values that are positive and finite, at least one decade."""
        shown = [value for value in values if 0 < value < math.inf] or [1.0]
        low = math.floor(math.log10(min(shown)))
        powers = range(low, max(math.ceil(math.log10(max(shown))), low + 1) + 1)
        marks = [(10.0**p, show(10.0**p)) for p in powers[:: math.ceil(len(powers) / MARKS)]]
        return Axis(title, 10.0 ** powers[0], 10.0 ** powers[-1], tuple(marks), logarithmic=True)

    @staticmethod
    def even(title: str, low: float, high: float, show: Callable[[float], str]) -> Axis:
        """Round numbers around a range: steps of 1, 2 or 5 times a power of ten."""
        least = (high - low or abs(high) or 1) / (MARKS - 2)
        power = 10.0 ** math.floor(math.log10(least))
        step = power * next(round_one for round_one in (1, 2, 5, 10) if round_one * power >= least * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        marks = [(i * step, show(i * step)) for i in range(first, last + 1)]
        return Axis(title, first * step, last * step, tuple(marks))

    def place(self, value: float) -> float:
        """Where a value lies, in [0, 1]; what is beyond the axis lies at its end."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def frame(svg: str, up: Axis, along: str, along_title: str = "", height: int = 240) -> str:
    """A drawing with its axes. `along` is what stands under it."""
    places = [(100 * up.place(value), text) for value, text in up.marks]
    marks = "".join(f'<span style="bottom:{y:.2f}%">{escape(text)}</span>' for y, text in places)
    lines = "".join(f'<i style="bottom:{y:.2f}%"></i>' for y, _ in places)
    title = f'<div class="up-title">{escape(up.title)}</div>' if up.title else ""
    under = f'<div class="along-title">{escape(along_title)}</div>' if along_title else ""
    return (
        f'{title}<div class="plot"><div class="up" style="height:{height}px">{marks}</div>'
        f'<div class="area" style="height:{height}px">{lines}{svg}</div><div class="along">{along}</div>{under}</div>'
    )


def letters(marks: Sequence[tuple[float, str]]) -> str:
    """What stands under a plot, by its place in [0, 1]."""
    spans = "".join(
        f'<span style="left:{100 * x:.2f}%"{" class=end" if x == 1 else ""}>{escape(text)}</span>' for x, text in marks
    )
    return f'<div class="marks">{spans}</div>'


@dataclass(frozen=True)
class Series:
    """Points (x, y), each with what is said of it when pointed at (one text for all of them if `dots` is off).

    `style` is a class of the page's style. The points are joined by a line unless `line` is off.
    """

    points: tuple[tuple[float, float], ...]
    texts: tuple[str, ...]
    style: str
    line: bool = True
    dots: bool = True


def chart(series: Sequence[Series], along: Axis, up: Axis, height: int = 240) -> str:
    """Lines and dots over two axes; what lies beyond an axis is drawn at its end."""
    drawn = []
    for one in series:
        places = [(100 * along.place(x), 100 * (1 - up.place(y))) for x, y in one.points]
        if one.line:
            line = path(places, f"line {one.style}")
            drawn.append(line if one.dots else hover(line, one.texts[0]))
        if one.dots:
            drawn += [hover(dot(*at, one.style), text) for at, text in zip(places, one.texts, strict=True)]
    svg = drawing(100, 100, "".join(drawn), f"{up.title} against {along.title}")
    return frame(svg, up, letters([(along.place(x), text) for x, text in along.marks]), along.title, height)


def error_plot(timesteps: Sequence[float], median: Sequence[float], upper: Sequence[float]) -> str:
    """Errors of each step on a logarithmic axis: a line at the median, a band from there to the 90th percentile.

    Errors of zero lie on the floor, infinite ones on the ceiling.
    """
    if not any(0 < error < math.inf for error in (*median, *upper)):
        return '<p class="empty">No error at any step: the predictions are equal.</p>'
    up = Axis.decades("relative squared error, logarithmic", [*median, *upper], percent_power)
    n = len(timesteps)
    line, top = ([(i + 0.5, 100 * (1 - up.place(e))) for i, e in enumerate(errors)] for errors in (median, upper))
    strips = "".join(
        hover(rectangle(i, 0, 1, 100, "strip"), f"timestep {t:.0f}: median {percent(m)}, 9 in 10 within {percent(u)}")
        for i, (t, m, u) in enumerate(zip(timesteps, median, upper, strict=True))
    )
    svg = drawing(
        n, 100, path([*line, *top[::-1]], "band", closed=True) + path(top, "edge") + path(line, "median") + strips,
        "Guided noise error by timestep",
    )  # fmt: skip
    shown = sorted({round(k * (n - 1) / 4) for k in range(5)})
    along = letters([((i + 0.5) / n, f"{timesteps[i]:.0f}") for i in shown])
    return frame(svg, up, along, "timestep, from noise to picture")


def power(number: float) -> str:
    """A power of ten as people write it: 0.001, 100, 10⁻⁵."""
    exponent = round(math.log10(number))
    return (
        f"{number:g}"
        if abs(exponent) < 4
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def percent_power(share: float) -> str:
    """A power of ten as a percentage: 0.0001 -> "0.01%"."""
    return f"{power(100 * share)}%"


def percents(share: float) -> str:
    return f"{100 * share:g}%"
