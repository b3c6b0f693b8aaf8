"""What `slimdiff inspect` says of a statistics file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from slimdiff.influence import FLOOR, Points
from slimdiff.recipe import Shard
from slimdiff.report.document import card, definitions, details, document, figure, section, table
from slimdiff.report.svg import Axis, Series, chart, percents, power
from slimdiff.report.unet import KINDS, place
from slimdiff.report.wording import Row, columns, count, percent
from slimdiff.spectra import Spectrum
from slimdiff.timesteps import TENTHS

ABOUT = ("format", "model", "model_options", "fingerprint", "recipe", "shard", "done")
"""What of the metadata is shown."""

STATISTICS = {
    "q": "Queries", "k": "Keys, centred over each picture", "z": "Head outputs", "g": "Hidden units, guided",
    "u": "Hidden units", "p": "Inputs of convolutions, guided", "x": "Inputs of layers", "c": "Text",
}  # fmt: skip
PARTS = ("down", "mid", "up")
LEGEND = tuple((f"series-{i}", f"{part} blocks" if part != "mid" else "middle") for i, part in enumerate(PARTS))
POINTS = 48
"""Most points of a curve."""


@dataclass(frozen=True)
class StatisticsView:
    """A statistics file's `metadata` and `spectra`, and what influence was probed on it, by the settings of the run."""

    metadata: Mapping[str, Any]
    spectra: Sequence[Spectrum]
    runs: Mapping[str, Points]

    def summary(self) -> list[tuple[str, str]]:
        recipe = self.metadata["recipe"]
        done, of = self.metadata["done"], len(recipe["prompts"])
        return [
            ("model", str(self.metadata["model"])),
            ("prompts", f"{done}" if done == of else f"{done} of {of}, {self._why_not_all()}"),
            (
                "recipe",
                f"{recipe['steps']} steps, guidance {recipe['guidance_scale']:g}, {recipe['width']}x{recipe['height']} "
                f"px, family {recipe['family']}",
            ),
            ("statistics", f"{len(self.spectra)}, of {count(sum(s.tokens for s in self.spectra))} tokens together"),
            ("influence", "; ".join(self.runs) or "not probed yet"),
        ]

    def _why_not_all(self) -> str:
        shard, of = Shard(*self.metadata.get("shard", (1, 1))), len(self.metadata["recipe"]["prompts"])
        part = f"part {shard}" if shard.parts > 1 else ""
        return part if self.metadata["done"] == len(shard.of(of)) else f"{part} unfinished".strip()

    def spectrum_rows(self) -> list[Row]:
        head = ("statistic", "heads", "width", "tokens", "effective rank", "condition", "width for 90%", "for 99%")
        return [
            head,
            *(
                (
                    s.key, str(s.heads), str(s.width), f"{s.tokens:,.0f}", f"{s.effective_rank:.1f}",
                    f"{s.condition:.1e}", str(s.width_for(0.9)), str(s.width_for(0.99)),
                )
                for s in self.spectra
            ),
        ]  # fmt: skip

    def energy_rows(self) -> list[Row]:
        """Empty where the file does not hold them."""
        known = [(s.key, s.energy.tolist()) for s in self.spectra if s.energy is not None]
        head = ("energy by tenth of the steps", *(str(i + 1) for i in range(TENTHS)))
        return [head, *((key, *map(percent, shares)) for key, shares in known)] if known else []

    def influence_rows(self, run: str) -> list[Row]:
        """Every width that was probed: its local error, its final error, and how much of the one reaches the other."""
        head = (f"influence: {run}", "width", "local error", "final error", "final / local")
        return [
            head,
            *(
                (group, str(width), percent(point.local), percent(point.final()), _ratio(point.final(), point.local))
                for group, widths in self.runs[run].items()
                for width, point in sorted(widths.items())
            ),
        ]

    def table(self) -> str:
        about = "\n".join(f"{name:12}{text}" for name, text in self.summary())
        sections = [self.spectrum_rows(), self.energy_rows(), *map(self.influence_rows, self.runs)]
        return "\n\n".join([about, *(columns(rows) for rows in sections if rows)])

    def to_json(self) -> dict[str, Any]:
        return {
            "what": "statistics",
            **{name: self.metadata[name] for name in ABOUT},
            "statistics": {
                s.key: {
                    "heads": s.heads, "width": s.width, "tokens": s.tokens, "effective_rank": s.effective_rank,
                    "condition": s.condition, "spectrum": s.values.tolist(),
                    "energy_by_tenth": None if s.energy is None else s.energy.tolist(),
                }
                for s in self.spectra
            },
            "influence": {
                run: {
                    group: {
                        width: {"local": point.local, "final": point.final(), "prompts": point.errors}
                        for width, point in widths.items()
                    }
                    for group, widths in points.items()
                }
                for run, points in self.runs.items()
            },
        }  # fmt: skip

    def html(self) -> str:
        name = str(self.metadata["model"]).rstrip("/").split("/")[-1]
        done, recipe = self.metadata["done"], self.metadata["recipe"]
        share = median(s.effective_rank / s.width for s in self.spectra)
        headline = (
            f"{done} prompts of {recipe['steps']} steps: half of the statistics are spread over no more than "
            f'<b class="slim">{share:.0%}</b> of their width.'
        )
        cards = (
            card(figure("", "Prompts", f"{done}", f"of {len(recipe['prompts'])}"))
            + card(figure("", "Tokens", count(sum(s.tokens for s in self.spectra)), "over all statistics"))
            + card(figure("", "Statistics", str(len(self.spectra)), f"of {len({*map(_layer, self.spectra)})} layers"))
            + card(
                figure("slim", "Effective rank", f"{share:.0%}", "of the width, median"),
                figure("drift", "Condition", f"{max(s.condition for s in self.spectra):.0e}", "at worst"),
            )
        )
        sections = [
            section(
                "Spectra", self._panels(_spectrum_panel),
                "Eigenvalues of each statistic's covariance, largest first, relative to the largest. The steeper, the "
                "fewer directions matter.", LEGEND,
            ),
            section(
                "Kept energy", self._panels(_kept_panel),
                "Energy that the leading directions of each head hold, against the share of the width they take: what "
                "a cut to that width keeps at best before anything is refitted.", LEGEND,
            ),
            *([section(
                "Energy by timestep", self._panels(_energy_panel),
                "Share of each statistic's energy in every tenth of the steps, from noise to picture; level is 10%.",
                LEGEND,
            )] if all(s.energy is not None for s in self.spectra) else []),
            *(_influence_section(run, points) for run, points in self.runs.items()),
            section(
                "In figures", details("Every statistic", table(self.spectrum_rows()))
                + "".join(details(f"Influence: {run}", table(self.influence_rows(run))) for run in self.runs),
            ),
            section("Provenance", definitions(self._provenance())),
        ]  # fmt: skip
        return document(f"{name}, statistics", headline, cards, sections)

    def _provenance(self) -> dict[str, Any]:
        recipe = {
            name: value for name, value in self.metadata["recipe"].items() if name not in ("prompts", "negatives")
        }
        named = ("model", "model_options", "fingerprint", "versions")
        return {**{name: self.metadata[name] for name in named}, "recipe": recipe}

    def _panels(self, panel: Callable[[Sequence[Spectrum]], str]) -> str:
        """One plot for each kind of statistic."""
        kinds: dict[str, list[Spectrum]] = {}
        for s in self.spectra:
            kinds.setdefault(s.key.rpartition(":")[2], []).append(s)
        plots = (f"<div><h3>{escape(STATISTICS.get(k, k))}</h3>{panel(found)}</div>" for k, found in kinds.items())
        return f'<div class="halves">{"".join(plots)}</div>'


def _ratio(final: float, local: float) -> str:
    return f"{final / local:.1e}" if local >= FLOOR else "-"


def _layer(spectrum: Spectrum) -> str:
    return spectrum.key.rpartition(":")[0].removesuffix(".qk").removesuffix(".vo").removesuffix(".ffn")


def _style(key: str) -> str:
    part = next((i for i, part in enumerate(PARTS) if key.startswith(part)), len(PARTS))
    return f"thin series-{part}"


def _sampled(values: Sequence[float]) -> list[tuple[int, float]]:
    """At most POINTS of the values, evenly spread, the first and the last among them, with their places."""
    last = len(values) - 1
    places = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})
    return [(place, values[place]) for place in places]


def _curve(spectrum: Spectrum, points: Sequence[tuple[float, float]]) -> Series:
    text = f"{spectrum.key}\neffective rank {spectrum.effective_rank:.1f} of {spectrum.width}"
    return Series(tuple(points), (text,), _style(spectrum.key), dots=False)


def _spectrum_panel(spectra: Sequence[Spectrum]) -> str:
    curves, shown = [], []
    for s in spectra:
        values = (s.values / s.values[0].clamp(min=1e-300)).tolist()
        points = [(place / max(s.width - 1, 1), value) for place, value in _sampled(values)]
        curves.append(_curve(s, points))
        shown += [value for _, value in points]
    up = Axis.decades("", shown, power)
    return chart(curves, _shares("direction, as a share of the width"), up, 180)


def _kept_panel(spectra: Sequence[Spectrum]) -> str:
    curves = [_curve(s, [(r / s.width, kept) for r, kept in _sampled(s.kept.tolist())]) for s in spectra]
    return chart(curves, _shares("share of the width"), Axis.even("", 0, 1, percents), 180)


def _energy_panel(spectra: Sequence[Spectrum]) -> str:
    shares = [[] if s.energy is None else s.energy.tolist() for s in spectra]
    curves = [_curve(s, list(enumerate(of, 1))) for s, of in zip(spectra, shares, strict=True)]
    along = Axis("tenth of the steps, from noise to picture", 1, TENTHS, ((1, "first"), (TENTHS, "last")))
    return chart(curves, along, Axis.even("", 0, max(map(max, shares)), percents), 180)


def _shares(title: str) -> Axis:
    return Axis(title, 0, 1, tuple((i / 4, f"{25 * i}%") for i in range(5)))


def _influence_section(run: str, points: Points) -> str:
    """How much of each group's local error reaches the end, in the order of the UNet."""
    groups = list(points)
    kinds = list(dict.fromkeys(group.rpartition(".")[2] for group in groups))
    found = [
        (i, group, width, point)
        for i, group in enumerate(groups)
        for width, point in sorted(points[group].items())
        if point.local >= FLOOR
    ]
    up = Axis.decades("final error over local error", [p.final() / p.local for *_, p in found], power)
    blocks: dict[str, int] = {}
    for i, group in enumerate(groups):
        blocks.setdefault(place(group)[0], i)
    marks = tuple((i, name.replace("_blocks", "").replace("_block", "")) for name, i in blocks.items())
    along = Axis("first group of each block, in the order of the UNet", -0.5, len(groups) - 0.5, marks)
    series = [
        Series(
            tuple((i, p.final() / p.local) for i, group, _, p in found if group.endswith(f".{kind}")),
            tuple(
                f"{group} at width {width}\nlocal error {percent(p.local)}, final {percent(p.final())}"
                for _, group, width, p in found
                if group.endswith(f".{kind}")
            ),
            f"series-{k % 6}",
            line=False,
        )
        for k, kind in enumerate(kinds)
    ]
    legend = [(f"series-{k % 6}", KINDS.get(kind, kind)) for k, kind in enumerate(kinds)]
    lead = (
        "What of a group's local error reaches the end when that group alone is cut, in the upper quartile of the "
        "probing prompts. The higher, the more the group matters."
    )
    return section(f"Influence: {run}", chart(series, along, up), lead, legend)
