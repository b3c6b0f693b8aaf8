"""The plan: the whole decision of a compression, group by group, in one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimdiff.errors import ModelError, SlimdiffError
from slimdiff.report.wording import percent

FORMAT = 1

NOTICEABLE = 1.05
"""How many times its lower bound a predicted drift is, before the bound is worth a word."""


def short(number: float) -> str:
    """A count for people: 859.5M, 401.6G."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:g}"


@dataclass(frozen=True)
class Entry:
    """One group's part. Errors are relative and squared: `local_error` of the group's own outputs in closed form,
    `final_error` what that is predicted to do to the final latents (or to the predicted noise, as `influence` has it;
    None where nothing was probed). Parameters and MACs are before and after."""

    group: str
    kind: str
    width: int
    rank: int
    params: tuple[int, int]
    macs: tuple[int, int]
    local_error: float
    final_error: float | None


@dataclass(frozen=True)
class Forecast:
    """Seconds that one UNet call takes, dense as measured and slim as predicted, under the conditions of the latency
    table they come from."""

    seconds: tuple[float, float]
    conditions: dict[str, Any]

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


@dataclass(frozen=True)
class Plan:
    """`budget` is the share to remove `of` (one of `options.OFS`); `achieved` the same share as it came out. A budget
    of latency comes with a forecast.

    `provenance` names what it was made from: model, fingerprint, statistics, versions, options. `refits` holds, for
    each group or layer that was refitted, the held-out error after over before. `predicted_error` of the final latents,
    and the `lower_bound` on what any widths could predict, are None where widths were not chosen by it.
    """

    budget: float
    of: str
    achieved: float
    entries: tuple[Entry, ...]
    unet_params: tuple[int, int]
    unet_macs: tuple[int, int]
    predicted_error: float | None
    lower_bound: float | None
    provenance: dict[str, Any]
    refits: dict[str, float] = field(default_factory=dict)
    latency: Forecast | None = None

    def ranks(self) -> dict[str, int]:
        """Width of every group that is cut."""
        return {entry.group: entry.rank for entry in self.entries if entry.rank < entry.width}

    def check_model(self, fingerprint: str, reference: str) -> None:
        """Raises ModelError unless the plan was made from the model of this fingerprint."""
        if fingerprint != self.provenance["fingerprint"]:
            raise ModelError(
                f"The slim checkpoint was made from {self.provenance['model']}, which is not {reference}. "
                "Compare it with the model it was made from, in bfloat16 if it was calibrated from a pipeline in that."
            )

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, path: Path | None = None) -> Plan:
        """Raises SlimdiffError if the text, of the file `path`, is not a plan, or one of a newer slimdiff."""
        try:
            data = json.loads(text)
            if data.pop("format") > FORMAT:
                raise SlimdiffError(f"{path or 'The plan'} was written by a newer slimdiff; upgrade.")
            entries = tuple(
                Entry(**{**entry, "params": tuple(entry["params"]), "macs": tuple(entry["macs"])})
                for entry in data.pop("entries")
            )
            data |= {key: tuple(data[key]) for key in ("unet_params", "unet_macs")}
            forecast = data.pop("latency", None)
            latency = forecast and Forecast(tuple(forecast["seconds"]), dict(forecast["conditions"]))
            return Plan(entries=entries, latency=latency, **data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SlimdiffError(
                f"{path or 'This'} is not a plan of slimdiff, or a damaged one ({type(error).__name__}: {error}). Copy "
                "the slim checkpoint that it belongs to anew, or compress again."
            ) from error

    def table(self) -> str:
        """The plan for people: a line per group, then the totals."""
        saved = sum(e.params[0] - e.params[1] for e in self.entries) or 1
        name = max(len(e.group) for e in self.entries)
        lines = [f"{'group':{name}}  {'width':>11}  {'parameters':>23}  {'local':>8}  {'final':>8}  {'of saved':>8}"]
        for e in self.entries:
            width = f"{e.width} -> {e.rank}" if e.rank < e.width else f"{e.width}"
            params = f"{e.params[0]:,} -> {e.params[1]:,}" if e.rank < e.width else f"{e.params[0]:,}"
            share = (e.params[0] - e.params[1]) / saved
            local, final = percent(e.local_error), "-" if e.final_error is None else percent(e.final_error)
            lines.append(f"{e.group:{name}}  {width:>11}  {params:>23}  {local:>8}  {final:>8}  {share:8.1%}")
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        groups = [sum(e.params[side] for e in self.entries) for side in (0, 1)]
        macs = [sum(e.macs[side] for e in self.entries) for side in (0, 1)]

        def change(what: str, before: int, after: int) -> str:
            return f"{what:22} {short(before):>7} -> {short(after):>7}  ({after / before - 1:+.1%})"

        lines = [
            change("parameters of groups", *groups),
            change("parameters of UNet", *self.unet_params),
            change("MACs of groups", *macs),
            change("MACs of UNet", *self.unet_macs),
            f"budget                 {self.budget:.1%} of {self.of}, achieved {self.achieved:.2%}",
        ]
        if self.latency is not None:
            before, after = (1e3 * seconds for seconds in self.latency.seconds)
            lines.append(
                f"predicted UNet call    {before:.4g} ms -> {after:.4g} ms, {self.latency.speedup:.2f}x as fast, in "
                f"{self.latency.conditions['dtype']} at {self.latency.conditions['rows']} rows on "
                f"{self.latency.conditions['device']}"
            )
        if self.predicted_error is not None:
            drift = f"predicted drift        {percent(self.predicted_error)} of the final latents"
            if self.lower_bound is not None and self.predicted_error > NOTICEABLE * self.lower_bound:
                drift += f" (no choice of widths below {percent(self.lower_bound)})"
            lines.append(drift)
        return lines
