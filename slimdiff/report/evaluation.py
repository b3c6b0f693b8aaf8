"""What an evaluation found out: a table for people, JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from slimdiff.measured import Settings
from slimdiff.metrics.score import Estimate, Score
from slimdiff.plan import Plan
from slimdiff.report.wording import Row, columns

FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """Scores of two models' pictures of the same prompts; `size` is their (width, height) when measured, in pixels."""

    settings: Settings
    plan: Plan
    size: tuple[int, int]
    scores: tuple[Score, ...]
    provenance: dict[str, Any]

    def rows(self) -> list[Row]:
        return [("Score", "dense", "slim", "slim - dense"), *(_row(score) for score in self.scores)]

    def notes(self) -> list[str]:
        """What the numbers are, in whole sentences."""
        s = self.settings
        count = len(s.prompts)
        return [
            *(f"{score.name}: {score.meaning}." for score in self.scores),
            f"{count} {'prompt' if count == 1 else 'prompts'}, {s.steps} steps, guidance {s.guidance_scale:g}, "
            f"{s.width} x {s.height} px measured at {self.size[0]} x {self.size[1]}, the same seeds for both models. "
            "After ± are standard errors over prompts, of the difference prompt by prompt.",
            *(note for score in self.scores for note in score.cautions),
        ]

    def table(self) -> str:
        return "\n\n".join([columns(self.rows()), "\n".join(self.notes())])

    def to_json(self) -> dict[str, Any]:
        s = self.settings
        names = ("prompts", "negatives", "steps", "guidance_scale", "height", "width", "seed")
        return {
            "format": FORMAT,
            "scores": [asdict(score) for score in self.scores],
            "settings": {name: getattr(s, name) for name in names} | {"measured_size": self.size},
            "plan": json.loads(self.plan.to_json()),
            "provenance": self.provenance,
        }


def _row(score: Score) -> Row:
    digits = 3 if abs(score.slim.value) >= 1 else 4

    def show(estimate: Estimate | None, sign: str = "") -> str:
        if estimate is None:
            return "-"
        error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
        return f"{estimate.value:{sign}.{digits}f}{error}"

    return score.name, show(score.dense), show(score.slim), show(score.difference, "+")
