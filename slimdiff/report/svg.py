"""Plots as HTML with inline SVG: the curves stretch to the page's width, the lettering around them keeps its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from slimdiff.plan import Entry
from slimdiff.report.wording import percent

KINDS = {
    "qk": "Queries and keys", "vo": "Values and outputs", "ffn": "Feed-forward", "heads": "Heads", "linear": "Matrices",
}  # fmt: skip
PARTS = ("down", "mid", "up")


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


def hover(content: str, text: str) -> str:
    return f"<g><title>{escape(text)}</title>{content}</g>"


def frame(svg: str, up: Sequence[tuple[float, str]], along: str, up_title: str, along_title: str, height: int) -> str:
    """A drawing with its axes. `up` are marks by their height in [0, 1]; `along` is what stands under it."""
    marks = "".join(f'<span style="bottom:{100 * y:.2f}%">{escape(text)}</span>' for y, text in up)
    lines = "".join(f'<i style="bottom:{100 * y:.2f}%"></i>' for y, _ in up)
    title = f'<div class="up-title">{escape(up_title)}</div>' if up_title else ""
    under = f'<div class="along-title">{escape(along_title)}</div>' if along_title else ""
    return (
        f'{title}<div class="plot"><div class="up" style="height:{height}px">{marks}</div>'
        f'<div class="area" style="height:{height}px">{lines}{svg}</div><div class="along">{along}</div>{under}</div>'
    )


def decades(smallest: float, largest: float) -> list[int]:
    """Powers of ten around a range, at least one decade."""
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    return list(range(low, max(high, low + 1) + 1))


def error_plot(timesteps: Sequence[float], median: Sequence[float], upper: Sequence[float]) -> str:
    """Errors of each step on a logarithmic axis: a line at the median, a band from there to the 90th percentile.

    Errors of zero lie on the floor, infinite ones on the ceiling.
    """
    shown = [e for e in (*median, *upper) if 0 < e < math.inf]
    if not shown:
        return '<p class="empty">No error at any step: the predictions are equal.</p>'
    powers = decades(min(shown), max(shown))
    low, high = powers[0], powers[-1]

    def y(error: float) -> float:
        place = math.log10(min(max(error, 10.0**low), 10.0**high))
        return 100 * (high - place) / (high - low)

    n = len(timesteps)
    line, top = ([(i + 0.5, y(e)) for i, e in enumerate(errors)] for errors in (median, upper))
    strips = "".join(
        hover(rectangle(i, 0, 1, 100, "strip"), f"timestep {t:.0f}: median {percent(m)}, 9 in 10 within {percent(u)}")
        for i, (t, m, u) in enumerate(zip(timesteps, median, upper, strict=True))
    )
    svg = drawing(
        n, 100, path([*line, *top[::-1]], "band", closed=True) + path(top, "edge") + path(line, "median") + strips,
        "Guided noise error by timestep",
    )  # fmt: skip
    every = math.ceil(len(powers) / 7)
    up = [((p - low) / (high - low), f"{10.0 ** (p + 2):g}%") for p in powers[::every]]
    along = "".join(
        f'<span style="left:{100 * (i + 0.5) / n:.2f}%">{timesteps[i]:.0f}</span>'
        for i in sorted({round(k * (n - 1) / 4) for k in range(5)})
    )
    title = "timestep, from noise to picture"
    return frame(svg, up, f'<div class="marks">{along}</div>', "relative squared error, logarithmic", title, 240)


def part_of(group: str) -> str:
    """Where in the UNet a group is: "down", "mid" or "up"; the first part of its name elsewhere."""
    return next((part for part in PARTS if group.startswith(part)), group.partition(".")[0])


def width_plots(entries: Sequence[Entry]) -> str:
    """A bar for each group: the width it keeps, before its full width; one panel a kind, in the order of the UNet."""
    panels = []
    for kind in dict.fromkeys(entry.kind for entry in entries):
        here = [entry for entry in entries if entry.kind == kind]
        names = [part for part in PARTS if any(part_of(e.group) == part for e in here)]
        names += [part for part in dict.fromkeys(part_of(e.group) for e in here) if part not in names]
        parts = {name: [e for e in here if part_of(e.group) == name] for name in names}
        panels.append(_widths(KINDS.get(kind, kind), parts))
    return "".join(panels)


def _widths(title: str, parts: Mapping[str, Sequence[Entry]]) -> str:
    gap = max(0.6, 0.02 * sum(map(len, parts.values())))
    x, bars = 0.0, []
    for entries in parts.values():
        for e in entries:
            share = 100 * e.rank / e.width
            text = f"{e.group}\nwidth {e.width} to {e.rank} ({share:.0f}%)\nlocal error {percent(e.local_error)}"
            if e.final_error is not None:
                text += f"\npredicted in the picture {percent(e.final_error)}"
            bar = rectangle(x + 0.1, 0, 0.8, 100, "full") + rectangle(x + 0.1, 100 - share, 0.8, share, "kept")
            bars.append(hover(bar, text))
            x += 1
        x += gap
    svg = drawing(x - gap, 100, "".join(bars), f"Widths kept: {title}")
    spacer = f'<span style="flex:{gap:g} 1 0"></span>'
    along = spacer.join(f'<span style="flex:{len(e)} 1 0">{escape(name)}</span>' for name, e in parts.items())
    width, rank = (sum(getattr(e, of) for entries in parts.values() for e in entries) for of in ("width", "rank"))
    kept = f"{rank / width:.0%} of all widths kept" if rank < width else "not cut"
    plot = frame(svg, [(0, "0"), (0.5, "50%"), (1, "100%")], f'<div class="parts">{along}</div>', "", "", 120)
    return f"<h3>{escape(title)} <small>{kept}</small></h3>{plot}"
