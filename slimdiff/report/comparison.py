"""Several benchmarks side by side: what quality each gives for its speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from slimdiff.errors import SlimdiffError
from slimdiff.report.document import card, definitions, document, figure, section, table, typeset
from slimdiff.report.results import FORMAT
from slimdiff.report.svg import Axis, Series, chart, percent_power
from slimdiff.report.wording import Row, columns, decibels, factor, percent

REPORT = "report.json"
SETTINGS = ("prompts", "negatives", "steps", "guidance_scale", "height", "width", "seed")
"""What pictures depend on; how often and at which batch sizes they were timed may differ."""

MACHINE = ("device", "threads", "precision", "scheduler")
"""What times and rounding depend on besides."""


@dataclass(frozen=True)
class Run:
    """One benchmark: its `name`, and the `data` of its report."""

    name: str
    data: dict[str, Any]

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = self.data["plan"]
        return plan

    @property
    def method(self) -> str:
        return str(self.plan["provenance"]["options"]["method"])

    @property
    def budget(self) -> str:
        of = "" if self.plan["of"] == "groups" else f" of {self.plan['of']}"
        return f"{100 * self.plan['budget']:g}%{of}"

    @property
    def speedup(self) -> float:
        """Of a whole picture."""
        return float(self.data["picture"]["speedup"]["median"])

    @property
    def parameters(self) -> float:
        """Share of the UNet's parameters that is gone."""
        before, after = self.plan["unet_params"]
        return float(1 - after / before)

    def drift(self, level: str = "typical") -> float:
        """Of the final latents; infinite where the slim model's are not finite."""
        value = self.data["picture"]["drift"][level]
        return float("inf") if value is None else float(value)

    def conditions(self) -> dict[str, Any]:
        """What has to be equal for runs to be comparable, by its name in words."""
        made_from, settings, machine = self.plan["provenance"], self.data["settings"], self.data["provenance"]
        return {
            "dense model": made_from["fingerprint"],
            **{name.replace("_", " "): settings[name] for name in SETTINGS},
            **{name: machine[name] for name in MACHINE},
        }


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs of report folders (or of their report.json), named after their folders.

    Raises SlimdiffError if one is missing, is no report, or cannot be compared with the first.
    """
    files = [path / REPORT if path.is_dir() else path for path in paths]
    names = [file.parent.resolve().name.removeprefix("bench-") for file in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = [Run(name, _report(file)) for name, file in zip(names, files, strict=True)]
    for run in runs[1:]:
        _check(runs[0], run)
    return runs


def _report(file: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        newer = data["format"] > FORMAT
        run = Run("", data)
        if not newer:
            run.conditions(), run.method, run.budget, run.speedup, run.parameters, run.drift("worst")
    except OSError as error:
        raise SlimdiffError(
            f"{file} cannot be read ({error.strerror}). Pass folders of 'slimdiff bench', or their {REPORT}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SlimdiffError(f"{file} is not a report of 'slimdiff bench' ({type(error).__name__}: {error}).") from error
    if newer:
        raise SlimdiffError(f"{file} was written by a newer slimdiff (format {data['format']}); upgrade.")
    return data


def _check(first: Run, other: Run) -> None:
    """Raises SlimdiffError if the two were not measured under the same conditions."""
    there = other.conditions()
    for name, here in first.conditions().items():
        if here != there[name]:
            raise SlimdiffError(
                f"{first.name} and {other.name} cannot be compared: {name} differs ({_apart(here, there[name])}). "
                "Run 'slimdiff bench' for both with the same model and settings, on the same machine."
            )


def _apart(here: Any, there: Any) -> str:
    """Two values in short; of lists their lengths, or where these are equal the first entries that differ."""
    if isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            return f"{len(here)} and {len(there)} of them"
        here, there = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
    return f"{str(here)[:60]} and {str(there)[:60]}"


@dataclass(frozen=True)
class Comparison:
    """Runs that `read` found comparable."""

    runs: Sequence[Run]

    def methods(self) -> dict[str, list[Run]]:
        """Runs of one method and one kind of budget, least removed first."""
        found: dict[str, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.plan["budget"]):
            of = run.plan["of"]
            found.setdefault(run.method if of == "groups" else f"{run.method}, {of}", []).append(run)
        return found

    def rows(self) -> list[Row]:
        head = (
            "run", "method", "budget", "parameters", "MACs", "speed-up (quartiles)", "drift", "9 in 10", "worst",
            "PSNR",
        )  # fmt: skip
        return [head, *(_row(run) for runs in self.methods().values() for run in runs)]

    def table(self) -> str:
        return f"{columns(self.rows())}\n\n{self.note()}"

    def note(self) -> str:
        settings = self.runs[0].data["settings"]
        return (
            f"Drift of the final latents over {len(settings['prompts'])} prompts at equal seeds ({settings['steps']} "
            f"steps, guidance {settings['guidance_scale']:g}); speed-up of a whole picture, each run against the dense "
            "model in the same run."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "what": "comparison",
            "conditions": self.runs[0].conditions(),
            "runs": [
                {
                    "name": run.name, "method": run.method, "budget": run.plan["budget"], "of": run.plan["of"],
                    "achieved": run.plan["achieved"], "unet_params": run.plan["unet_params"],
                    "unet_macs": run.plan["unet_macs"], **run.data["picture"],
                    "psnr_db": run.data["fidelity"]["psnr_db"],
                }
                for run in self.runs
            ],
        }  # fmt: skip

    def html(self) -> str:
        name = str(self.runs[0].plan["provenance"]["model"]).rstrip("/").split("/")[-1]
        fastest, nearest = max(self.runs, key=lambda run: run.speedup), min(self.runs, key=lambda run: run.drift())
        headline = (
            f'Run {escape(nearest.name)} is nearest to the dense model and <b class="drift">drifts by '
            f"{typeset(percent(nearest.drift()))}</b>; run {escape(fastest.name)} is fastest, at "
            f'<b class="slim">{typeset(factor(fastest.speedup))}</b>.'
        )
        cards = "".join(
            card(
                figure("slim", title, factor(run.speedup), f"run {run.name}", f"{run.budget} removed"),
                figure("drift", "Drift", percent(run.drift()), "typically", f"{percent(run.drift('worst'))} at worst"),
            )
            for title, run in (("Fastest", fastest), ("Nearest", nearest))
        )
        legend = [(f"series-{i % 6}", method) for i, method in enumerate(self.methods())]
        against = (
            ("speed-up of a picture, measured", lambda run: run.speedup, lambda x: f"{x:g}×"),
            ("parameters of the UNet removed", lambda run: run.parameters, lambda x: f"{100 * x:.3g}%"),
        )
        plots = "".join(f"<div>{self._plot(*one)}</div>" for one in against)
        sections = [
            section(
                "Quality against speed", f'<div class="halves">{plots}</div>',
                "Down and to the right is better. Dots are runs, lines join the budgets of one method. Point at a dot "
                "for its figures.", legend,
            ),
            section(
                "Error by timestep", self._errors(),
                "Error of the guided prediction of the median prompt, on the dense model's own latents.", legend,
            ),
            section("Runs", f'{table(self.rows())}<p class="notes">{escape(self.note())}</p>'),
            section("Measured under", definitions(_counted(self.runs[0].conditions()))),
        ]  # fmt: skip
        return document(f"{name}, {len(self.runs)} runs", headline, cards, sections)

    def _plot(self, title: str, value: Callable[[Run], float], show: Callable[[float], str]) -> str:
        xs = [value(run) for run in self.runs]
        up = Axis.decades("typical drift, logarithmic", [run.drift() for run in self.runs], percent_power)
        return chart(
            [
                Series(tuple((value(run), run.drift()) for run in runs), tuple(map(_said, runs)), f"series-{i % 6}")
                for i, runs in enumerate(self.methods().values())
            ],
            Axis.even(title, min(xs), max(xs), show), up,
        )  # fmt: skip

    def _errors(self) -> str:
        found = {run.name: _by_step(run) for run in self.runs}
        last = max(len(errors) for errors in found.values()) - 1
        timesteps = [step["timestep"] for step in self.runs[0].data["fidelity"]["noise_by_step"]]
        marks = tuple((i, f"{timesteps[i]:.0f}") for i in sorted({round(k * last / 4) for k in range(5)}))
        along = Axis("timestep, from noise to picture", 0, max(last, 1), marks)
        up = Axis.decades(
            "relative squared error, logarithmic", [e for errors in found.values() for e in errors], percent_power
        )
        series = [
            Series(tuple(enumerate(found[run.name])), (_said(run),), f"series-{i % 6}", dots=False)
            for i, runs in enumerate(self.methods().values())
            for run in runs
        ]
        return chart(series, along, up)


def _row(run: Run) -> Row:
    picture, fidelity = run.data["picture"], run.data["fidelity"]
    speed = picture["speedup"]
    macs = run.plan["unet_macs"]
    psnr = fidelity["psnr_db"]["typical"]
    return (
        run.name, run.method, run.budget, f"{-run.parameters:+.1%}", f"{macs[1] / macs[0] - 1:+.1%}",
        f"{factor(speed['median'])} ({speed['q1']:.2f} - {speed['q3']:.2f})",
        *(percent(run.drift(level)) for level in ("typical", "p90", "worst")),
        decibels(float("inf") if psnr is None else psnr),
    )  # fmt: skip


def _said(run: Run) -> str:
    return (
        f"{run.name}\n{run.method}, {run.budget} removed, UNet {-run.parameters:+.1%}\n{factor(run.speedup)} as fast, "
        f"drift {percent(run.drift())}, {percent(run.drift('worst'))} at worst"
    )


def _by_step(run: Run) -> list[float]:
    """Infinite errors are null in a report."""
    errors = (step["median"] for step in run.data["fidelity"]["noise_by_step"])
    return [float("inf") if error is None else error for error in errors]


def _counted(conditions: dict[str, Any]) -> dict[str, Any]:
    """Long lists by their length."""
    return {name: len(value) if isinstance(value, list) else value for name, value in conditions.items()}
