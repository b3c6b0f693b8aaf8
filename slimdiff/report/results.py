"""The report of a benchmark: its headline, its tables for people, its JSON for machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from slimdiff.measured import (
    QUANTILES,
    Fidelity,
    Picture,
    Settings,
    Size,
    Spread,
    Stack,
    Stacked,
    Timing,
    psnr_of,
    quantile,
)
from slimdiff.plan import Plan
from slimdiff.report import wording
from slimdiff.report.wording import Row, change, columns, decibels, factor, percent, seconds, similarity

FORMAT = 1

MANY = 10
"""Pairs of pictures from which on a speed-up is told without a reservation."""

FAR_ABOVE = 10
"""How many times the predicted drift a measured one is, before the statistics are to blame."""


@dataclass(frozen=True)
class Report:
    """Everything `slimdiff bench` found. The last of `speed` is a whole picture, the others are UNet calls."""

    settings: Settings
    plan: Plan
    size: Size
    speed: tuple[Timing, ...]
    fidelity: Fidelity
    pictures: tuple[Picture, ...]
    provenance: dict[str, Any]
    stacks: tuple[Stack, ...] = ()

    def headline(self) -> list[tuple[str, str]]:
        """One sentence in pieces: text, and what it is about ("slim", "drift" or nothing)."""
        before, after = self.size.parameters
        share = 1 - after / before
        picture, drift = self.speed[-1], self.fidelity.drift
        times = f"{seconds(picture.slim.median)} instead of {seconds(picture.dense.median)}"
        speed = f"{factor(picture.speedup.median)} as fast" if picture.is_clear else "no clear difference"
        speed += ", few timings" if picture.pairs < MANY else ""
        typical, worst = quantile(drift, 0.5), quantile(drift, 1)
        return [
            ("The UNet has ", ""),
            (f"{share:.1%} fewer parameters" if after < before else "as many parameters as before", "slim"),
            (f"; a picture takes {times} (", ""),
            (speed, "slim"),
            ("), and its latents ", ""),
            *(
                [("do not drift", "drift"), (" at all.", "")]
                if worst == 0
                else [(f"drift by {percent(typical)}", "drift"), (" typically and ", ""), (percent(worst), "drift"),
                      (" at worst.", "")]
            ),
        ]  # fmt: skip

    def doubts(self) -> list[str]:
        """What is wrong with the outcome as a whole, and what to do about it."""
        drift, foreseen = quantile(self.fidelity.drift, 0.5), self.plan.predicted_error
        if not foreseen or drift <= FAR_ABOVE * foreseen:
            return []
        return [f"That is far above what the plan predicted ({percent(foreseen)}): calibrate on more prompts or steps."]

    def size_rows(self) -> list[Row]:
        size = self.size
        dense, slim = size.macs
        rows = [
            ("UNet parameters", size.parameters, wording.count),
            ("UNet MACs per row", (dense.total, slim.total), wording.count),
            ("  without attention core", (dense.without_core, slim.without_core), wording.count),
            *([("UNet weights on disk", size.checkpoint, wording.size)] if size.checkpoint else []),
            ("UNet weights in memory", size.weights, wording.size),
            *([("Peak memory, 1 picture", size.memory, wording.size)] if size.memory else []),
        ]
        return [
            ("Size", "dense", "slim", "change"),
            *((name, show(a), show(b), change(a, b)) for name, (a, b), show in rows),
        ]

    def predicted(self) -> list[float | None]:
        """What the plan predicted for each of `speed`: UNet calls of the batch and size its latency table is of."""
        s, forecast = self.settings, self.plan.latency
        if forecast is None:
            return [None] * len(self.speed)
        timed = forecast.conditions
        rows = timed["rows"] if (timed["height"], timed["width"]) == (s.height, s.width) else None
        calls = (forecast.speedup if batch * s.rows_per_prompt == rows else None for batch in s.batch_sizes)
        return [*calls, None]

    def speed_rows(self) -> list[Row]:
        """Speed-up and drift stand in columns next to each other."""

        def time(spread: Spread) -> str:
            return seconds(spread.median, spread.q1, spread.q3)

        drift = percent(quantile(self.fidelity.drift, 0.5)), percent(quantile(self.fidelity.drift, 1))
        predicted = self.predicted()
        column = ["predicted"] if any(predicted) else []
        return [
            ("Speed", "speed-up (quartiles)", "drift (worst)", *column, "ideal", "dense", "slim"),
            *(
                (
                    timing.what,
                    f"{factor(timing.speedup.median)} ({timing.speedup.q1:.2f} - {timing.speedup.q3:.2f})",
                    f"{drift[0]} ({drift[1]})",
                    *([factor(foreseen) if foreseen else "-"] if column else []),
                    factor(self.size.ideal_speedup),
                    time(timing.dense),
                    time(timing.slim),
                )
                for timing, foreseen in zip(self.speed, predicted, strict=True)
            ),
        ]

    def fidelity_rows(self) -> list[Row]:
        found = self.fidelity
        last = len(found.noise) - 1
        calls = dict.fromkeys((0, last // 2, last))  # in order, each once
        return [
            ("Fidelity", "typical", "9 in 10", "worst"),
            ("Drift of final latents", *(percent(quantile(found.drift, q)) for q in QUANTILES)),
            ("PSNR", *(decibels(found.psnr(q)) for q in QUANTILES)),
            ("SSIM", *(similarity(quantile(found.ssim, 1 - q)) for q in QUANTILES)),
            *(
                (f"Noise error, t = {found.timesteps[j]:.0f}", *(percent(quantile(values, q)) for q in QUANTILES))
                for j in calls
                for values in [found.noise[j]]
            ),
        ]

    def stack_rows(self) -> list[Row]:
        """A column for each stack, of both models; empty if there is none. The speed-ups share cells with the drift."""
        if not self.stacks:
            return []
        found, picture = self.fidelity, self.speed[-1]
        size, none = self.size.weights, (0.0,)
        plain = Stack(
            "nothing",
            Stacked(picture.dense, Spread(1, 1, 1), size[0], none, none),
            Stacked(picture.slim, picture.speedup, size[1], found.drift, found.mse),
        )
        rows = [("On top", *(stack.name for stack in (plain, *self.stacks)))]
        for name in ("slim", "dense"):
            sides: list[Stacked] = [getattr(stack, name) for stack in (plain, *self.stacks)]
            rows += [
                (f"{name.capitalize()}: speed-up, drift (worst)", *(
                    f"{factor(s.speedup.median)}, {percent(quantile(s.drift, 0.5))} ({percent(quantile(s.drift, 1))})"
                    for s in sides
                )),
                ("  PSNR (worst)", *(f"{decibels(s.psnr(0.5))} ({decibels(s.psnr(1))})" for s in sides)),
                ("  UNet weights in memory", *(wording.size(s.weights) for s in sides)),
            ]  # fmt: skip
        return rows

    def attribute_rows(self) -> list[Row]:
        """Empty if the pictures could not be scored."""
        if self.fidelity.attributes is None:
            return []
        dense, slim = self.fidelity.attributes
        rows = [(name, a, slim[name]) for name, a in dense.items()]
        return [
            ("Asked for and shown", "dense", "slim", "points"),
            *((name, f"{a:.1%}", f"{b:.1%}", f"{100 * (b - a):+.1f}") for name, a, b in rows),
        ]

    def picture_rows(self) -> list[Row]:
        shown = [
            (p.label, percent(p.drift), decibels(p.psnr), similarity(p.ssim), str(p.seed), p.prompt)
            for p in self.pictures
        ]
        return [("Pictures", "drift", "PSNR", "SSIM", "seed", "prompt"), *shown]

    def notes(self) -> list[str]:
        """What the numbers mean, in whole sentences."""
        s, foreseen = self.settings, self.plan.predicted_error
        predicted = "" if foreseen is None else f" The plan predicted a drift of {percent(foreseen)}."
        notes = [
            f"Drift is the squared difference of the final latents relative to the dense ones, over {len(s.prompts)} "
            f"prompts at equal seeds ({s.steps} steps, guidance {s.guidance_scale:g}): 0% is the same picture, "
            "unrelated latents reach about 200%. Typical is the median prompt; 9 in 10 are at least as good as the "
            f"figure under 9 in 10.{predicted}",
            f"Times are medians of {self.speed[0].pairs} interleaved pairs ({self.speed[-1].pairs} of whole pictures), "
            "in brackets their quartiles; the speed-up is taken pair by pair. Rows are the UNet's batch"
            f"{', doubled by guidance' if s.rows_per_prompt == 2 else ''}. Ideal is the ratio of the UNet's MACs.",
        ]
        if self.plan.latency is not None:
            c = self.plan.latency.conditions
            notes.append(
                f"The plan predicted a speed-up of {factor(self.plan.latency.speedup)} for a UNet call of {c['rows']} "
                f"rows at {c['width']} x {c['height']} px, from times measured in {c['dtype']} on {c['device']}."
            )
        if self.size.memory is not None:
            on_cuda = self.provenance.get("device_type") == "cuda"
            counted = "as torch's allocator counts it" if on_cuda else "counting the tensors alive after each operator"
            notes.append(f"Peak memory is a pipeline's own weights plus what one picture adds to them, {counted}.")
        if self.stacks:
            notes.append(
                "What is on top is on top of both models; speed-ups are those of a picture, and all of it is compared "
                "with the dense model with nothing on top."
            )
        return notes

    def table(self) -> str:
        """Everything for the terminal. No speed-up stands without its drift."""
        pictures = self.picture_rows()
        width = max(len(row[-1]) for row in pictures)
        pictures = [(*row[:-1], row[-1].ljust(width)) for row in pictures]  # prompts to the left, unlike figures
        measured = [self.size_rows(), self.speed_rows(), self.fidelity_rows(), self.attribute_rows(), self.stack_rows()]
        sentence = "".join(text for text, _ in self.headline())
        tables = [columns(rows) for rows in (*measured, pictures) if len(rows) > 1]
        return "\n\n".join(["\n".join([sentence, *self.doubts()]), *tables, "\n".join(self.notes())])

    def to_json(self) -> dict[str, Any]:
        """Valid JSON: what is infinite or undefined is null (the PSNR of identical pictures)."""
        levels = dict(zip(("typical", "p90", "worst"), QUANTILES, strict=True))

        def spread(values: tuple[float, ...]) -> dict[str, float]:
            return {name: quantile(values, q) for name, q in levels.items()}

        drift = spread(self.fidelity.drift)
        beside = {"drift": drift, "ideal_speedup": self.size.ideal_speedup}
        s, found, last = self.settings, self.fidelity, self.speed[-1]
        each = zip(s.prompts, s.negatives, found.drift, found.mse, found.ssim, strict=True)
        data: dict[str, Any] = {
            "format": FORMAT,
            "headline": "".join(text for text, _ in self.headline()),
            "picture": {"speedup": asdict(last.speedup), **beside, "predicted_drift": self.plan.predicted_error},
            "settings": asdict(s),
            "size": asdict(self.size),
            "speed": [
                {"what": t.what, "speedup": asdict(t.speedup), "predicted_speedup": foreseen, **beside, **asdict(t)}
                for t, foreseen in zip(self.speed, self.predicted(), strict=True)
            ],
            "fidelity": {
                "drift": drift,
                "psnr_db": {name: found.psnr(q) for name, q in levels.items()},
                "ssim": {name: quantile(found.ssim, 1 - q) for name, q in levels.items()},
                "attributes": dict(zip(("dense", "slim"), found.attributes, strict=True)) if found.attributes else None,
                "noise_by_step": [
                    {"timestep": t, "median": quantile(e, 0.5), "p90": quantile(e, 0.9)}
                    for t, e in zip(found.timesteps, found.noise, strict=True)
                ],
                "prompts": [
                    {"prompt": p, "negative": n, "seed": s.seed + i, "drift": d, "psnr_db": psnr_of(m), "ssim": o}
                    for i, (p, n, d, m, o) in enumerate(each)
                ],
            },
            "stacks": [
                {"name": stack.name}
                | {
                    name: {
                        "speedup": asdict(side.speedup),
                        "drift": spread(side.drift),
                        "seconds": asdict(side.seconds),
                        "psnr_db": {level: side.psnr(q) for level, q in levels.items()},
                        "weights": side.weights,
                    }
                    for name, side in (("dense", stack.dense), ("slim", stack.slim))
                }
                for stack in self.stacks
            ],
            "plan": json.loads(self.plan.to_json()),
            "provenance": self.provenance,
        }
        clean: dict[str, Any] = _finite(data)
        return clean


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
