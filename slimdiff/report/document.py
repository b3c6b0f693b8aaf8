"""Pages of HTML: the shell that holds the style, and the parts that every page is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from slimdiff.files import replacing, write_json
from slimdiff.report.wording import Row

TEMPLATE = Path(__file__).with_name("page.html.in")


def document(title: str, headline: str, cards: str, sections: Sequence[str]) -> str:
    """A page that refers to nothing outside itself and needs no script. All but `title` is HTML."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), headline=headline, cards=cards, sections="\n\n".join(sections)
    )


def write(folder: Path, name: str, data: dict[str, Any], page: str) -> tuple[Path, Path]:
    """Writes `name.json` and `name.html` into `folder` and returns their paths.

    Raises OutputError if they cannot be written.
    """
    paths = folder / f"{name}.json", folder / f"{name}.html"
    write_json(paths[0], data)
    with replacing(paths[1]) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return paths


def section(title: str, content: str, lead: str = "", legend: Sequence[tuple[str, str]] = ()) -> str:
    """A part of a page: `lead` introduces it, `legend` names styles of its plots, `content` is HTML."""
    introduction = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    marks = "".join(f'<span><i class="{style}"></i>{escape(text)}</span>' for style, text in legend)
    marks = f'<p class="legend">{marks}</p>' if marks else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{introduction}{marks}{content}\n</section>"


def figure(kind: str, title: str, value: str, *under: str) -> str:
    """A number to remember; `kind` is "slim", "drift" or nothing."""
    lines = "".join(f"<span>{typeset(line)}</span>" for line in under)
    return f'<div class="figure {kind}"><h2>{escape(title)}</h2><strong>{typeset(value)}</strong>{lines}</div>'


def card(*figures: str) -> str:
    return f'<div class="card{" pair" if len(figures) > 1 else ""}">{"".join(figures)}</div>'


def typeset(text: str) -> str:
    """Escaped text with real multiplication signs, powers, minus signs and dashes; figures stay with their units."""
    text = re.sub(r"(?<=\d)x\b", "&times;", escape(text))
    text = re.sub(r"(?<=\d)e-0*(\d+)", r"&middot;10<sup>&minus;\1</sup>", text)
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


def details(summary: str, content: str) -> str:
    """HTML that waits to be unfolded."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


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
