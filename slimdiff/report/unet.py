"""The allocation as a picture of the UNet: its blocks stand as a U, each group is a bar of the width it keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from slimdiff.plan import Entry
from slimdiff.report.wording import percent

KINDS = {
    "qk": "Queries and keys", "vo": "Values and outputs", "ffn": "Feed-forward", "resnet": "ResNet blocks",
    "heads": "Heads", "linear": "Matrices",
}  # fmt: skip
LEGEND = (("kept", "kept"), ("full", "full width"))
LEAD = (
    "What each group keeps of its width, where it stands in the UNet: data goes down on the left and up on the right. "
    "attn1 is attention within the picture, attn2 to the text. Point at a bar for the errors."
)


def place(group: str) -> tuple[str, str, str]:
    """A group's block, its row there and its column: "up_blocks.1", "attentions.0.transformer_blocks.2.", "attn1.qk".

    A row is the chain of numbered lists that leads to the group's layer; it may be empty.
    """
    found = re.fullmatch(r"(\w+(?:\.\d+)?)\.((?:\w+\.\d+\.)*)(.+)", group)
    return found.groups() if found else ("", "", group)  # type: ignore[return-value]


def kept_by_kind(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Each kind of group in words, and how much of all its widths is kept."""
    rows = []
    for kind in dict.fromkeys(entry.kind for entry in entries):
        width, rank = (sum(getattr(e, of) for e in entries if e.kind == kind) for of in ("width", "rank"))
        rows.append((KINDS.get(kind, kind), f"{rank / width:.0%} of widths kept" if rank < width else "not cut"))
    return rows


def picture(entries: Sequence[Entry]) -> str:
    """Left the down blocks, the first above; right the up blocks, the last above; below them what is between."""
    blocks: dict[str, list[Entry]] = {}
    for entry in entries:
        blocks.setdefault(place(entry.group)[0], []).append(entry)
    down = [name for name in blocks if name.startswith("down")]
    up = [name for name in blocks if name.startswith("up")][::-1]
    depth = max(len(down), len(up)) + 1
    drawn = []
    for name, members in blocks.items():
        if name in down:
            area, arrow = f"{down.index(name) + 1} / 1", "↓ "
        elif name in up:
            area, arrow = f"{up.index(name) + depth - len(up)} / 2", "↑ "
        else:
            area, arrow = f"{depth} / 1 / auto / 3", ""
        side = "" if arrow else " middle"
        drawn.append(
            f'<div class="block{side}" style="--area:{area}"><h4>{arrow}{escape(name)}</h4>{_cells(members)}</div>'
        )
    summary = " &middot; ".join(f"{kind} <b>{kept}</b>" for kind, kept in kept_by_kind(entries))
    return f'<p class="kinds">{summary}</p><div class="unet">{"".join(drawn)}</div>'


def _cells(entries: Sequence[Entry]) -> str:
    """A block: a row for each layer list, a column for each group in it; rows of unlike columns stand apart."""
    rows: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        _, row, column = place(entry.group)
        rows.setdefault(row, {})[column] = entry
    shapes: dict[tuple[str, ...], list[str]] = {}
    for row, cells in rows.items():
        shapes.setdefault(tuple(cells), []).append(row)
    return "".join(
        f'<div class="cells" style="--columns:{len(columns)}"><span></span>'
        + "".join(f'<span class="column" title="{escape(c)}">{escape(c.replace(".", " "))}</span>' for c in columns)
        + "".join(
            f'<span class="row">{".".join(re.findall(r"[0-9]+", row))}</span>' + "".join(map(_cell, rows[row].values()))
            for row in here
        )
        + "</div>"
        for columns, here in shapes.items()
    )


def said(entry: Entry) -> str:
    """A group in words, for those who point at it."""
    share = percent(entry.local_error)
    text = f"{entry.group}\nwidth {entry.width} to {entry.rank} ({entry.rank / entry.width:.0%})\nlocal error {share}"
    return text if entry.final_error is None else f"{text}\npredicted final error {percent(entry.final_error)}"


def _cell(entry: Entry) -> str:
    widths = f"<s>{entry.width} → </s>{entry.rank}" if entry.rank < entry.width else f"{entry.width}"
    share = 100 * entry.rank / entry.width
    return f'<span class="cell" title="{escape(said(entry))}"><i style="width:{share:.1f}%"></i><b>{widths}</b></span>'
