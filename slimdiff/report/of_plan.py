"""What `slimdiff inspect` says of a plan, alone or in a slim checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import Any

from slimdiff.plan import Entry, Plan
from slimdiff.report import unet
from slimdiff.report.document import card, definitions, details, document, figure, section, table
from slimdiff.report.svg import Axis, Series, chart, percent_power
from slimdiff.report.wording import Row, change, columns, count, percent


@dataclass(frozen=True)
class PlanView:
    """A plan as text, JSON and a page."""

    plan: Plan

    def kind_rows(self) -> list[Row]:
        return [("widths", "kept"), *unet.kept_by_kind(self.plan.entries)]

    def refit_rows(self) -> list[Row]:
        """Held-out errors of what was refitted, after over before; empty where nothing was."""
        if not self.plan.refits:
            return []
        return [("refitted", "held-out error"), *((name, change(1, ratio)) for name, ratio in self.plan.refits.items())]

    def table(self) -> str:
        return "\n\n".join(
            [self.plan.table(), *(columns(rows) for rows in (self.kind_rows(), self.refit_rows()) if rows)]
        )

    def to_json(self) -> dict[str, Any]:
        return {"what": "plan", **json.loads(self.plan.to_json())}

    def html(self) -> str:
        plan = self.plan
        name = str(plan.provenance.get("model", "UNet")).rstrip("/").split("/")[-1]
        method = plan.provenance.get("options", {}).get("method", "slimdiff")
        headline = (
            f'<b class="slim">{plan.achieved:.1%}</b> of {_WHOLE.get(plan.of, plan.of)} removed by {escape(method)}.'
        )
        local = max((e.local_error for e in plan.entries), default=0.0)
        predicted = "-" if plan.predicted_error is None else percent(plan.predicted_error)
        cards = (
            card(_change("Parameters", plan.unet_params))
            + card(_change("MACs", plan.unet_macs))
            + card(figure("", "Groups cut", str(len(plan.ranks())), f"of {len(plan.entries)}"))
            + card(
                figure("drift", "Predicted drift", predicted, "of the final latents"),
                figure("drift", "Local error", percent(local), "of the worst group"),
            )
        )
        sections = [
            section("Widths", picture(plan), unet.LEAD, unet.LEGEND),
            section("Errors", *_errors(plan)),
            *([section("Refits", table(self.refit_rows()), REFITS)] if plan.refits else []),
            section("Provenance", definitions(plan.provenance)),
        ]
        return document(f"{name}, plan for {100 * plan.budget:g}% of {plan.of}", headline, cards, sections)


REFITS = "What fitting a layer anew made of the error on calibration states that the fit had not seen."
_WHOLE = {"groups": "the groups' parameters", "unet": "the UNet's parameters", "macs": "the groups' MACs"}


def picture(plan: Plan) -> str:
    """The picture of the UNet, and the plan's own table."""
    if not plan.entries:
        return '<p class="empty">The plan holds no group.</p>'
    return unet.picture(plan.entries) + details("The plan in figures", f"<pre>{escape(plan.table())}</pre>")


def _change(title: str, pair: tuple[int, int]) -> str:
    return figure("slim", title, change(*pair), f"{count(pair[0])} to {count(pair[1])}")


def _errors(plan: Plan) -> tuple[str, str, list[tuple[str, str]]]:
    """A dot for each group that is cut, with what introduces the plot and its legend."""
    cut = [entry for entry in plan.entries if entry.rank < entry.width]
    if not cut:
        return '<p class="empty">Nothing is cut, so nothing is lost.</p>', "", []
    kinds = list(dict.fromkeys(entry.kind for entry in cut))
    legend = [(f"series-{i % 6}", unet.KINDS.get(kind, kind)) for i, kind in enumerate(kinds)]
    probed = all(entry.final_error is not None for entry in cut)

    def point(entry: Entry) -> tuple[float, float]:
        if entry.final_error is None or not probed:
            return 1 - entry.rank / entry.width, entry.local_error
        return entry.local_error, entry.final_error

    points = [point(entry) for entry in cut]
    if probed:
        along = Axis.decades("local error, of the group's own output", [x for x, _ in points], percent_power)
        lead = "Each group that is cut: its own error, and what the plan expects that to do in the end."
    else:
        along = Axis("share of the width that is cut", 0, 1, tuple((i / 4, f"{25 * i}%") for i in range(5)))
        lead = "Each group that is cut: how much of it, and its own error. This plan was made without probing."
    title = "predicted final error" if probed else "local error"
    up = Axis.decades(title, [y for _, y in points], percent_power)
    series = [
        Series(
            tuple(point(e) for e in cut if e.kind == kind),
            tuple(unet.said(e) for e in cut if e.kind == kind),
            f"series-{i % 6}", line=False,
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    return chart(series, along, up), lead, legend
