"""How much of a group's local error reaches the end of the sampler, or the noise prediction: what `probing` measured.

A group's final error at every width is told from its local errors and the few widths at which both are known.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slimdiff.files import write_json
from slimdiff.groups import Group
from slimdiff.solve.solution import Solution

Kind = Literal["sampler", "noise"]
"""What is compared: the final latents of a short sampler, or the guided noise prediction on the calibration states."""

FLOOR = 1e-6
"""Local error below which a truncation is lost in rounding and a narrower width is probed instead."""

SURE = 4.0
"""How many times the final error of rounding alone a measurement must be to count."""

FORMAT = 2


@dataclass(frozen=True)
class Point:
    """One group at one width: its `local` error there, and each probing prompt's relative squared final error."""

    local: float
    errors: tuple[float, ...]

    def final(self, quantile: float = 0.75) -> float:
        """Over prompts (of two values the lower): below the highest, so that one prompt that flips does not decide, and
        above the median, so that sensitive prompts count."""
        errors = torch.tensor(self.errors, dtype=torch.float64)
        return float(errors.quantile(quantile, interpolation="lower"))


Points = dict[str, dict[int, Point]]
"""By group and width."""


@dataclass(frozen=True)
class Influence:
    """What probing found: the `points` of every group, and the final error that `rounding` alone makes.

    `statistics` is the digest of the file it belongs to.
    """

    statistics: str
    kind: Kind
    points: Points
    rounding: float = 0.0

    def final_errors(self, group: Group, solution: Solution, quantile: float = 0.75) -> Tensor:
        """Predicted final error at every width 0..d, (d + 1,), float64: 0 at full width, never falling with less width.

        Over prompts the `quantile` is taken (see `Point.final`). As a function of the local error, the final error is a
        power law between two probed points (log against log) and proportional outside. Points lost in rounding do not
        count, but for the one of most local error where all are; if that shows nothing, the group has no influence.
        """
        shown: dict[float, float] = {}
        for point in self.points[group.name].values():
            final = point.final(quantile)
            if point.local >= FLOOR and final > self.rounding:
                shown[point.local] = max(final, shown.get(point.local, 0.0))
        known = {x: y for x, y in shown.items() if y > SURE * self.rounding} or dict(sorted(shown.items())[-1:])
        local = solution.error.double().cpu()
        if not known:
            return torch.zeros_like(local)
        x, y = np.log(sorted(known.items())).T
        wanted = local.clamp(min=0).log().numpy()
        inside = wanted.clip(x[0], x[-1])
        curve = torch.from_numpy(np.exp(np.interp(inside, x, y) + wanted - inside))
        curve[-1] = 0
        return curve.flip(0).cummax(0).values.flip(0)


def relative_error(changed: Tensor, reference: Tensor) -> Tensor:
    """Squared error relative to the reference's energy, per sample: (B, ...) -> (B,), in float64."""
    difference = (changed.double() - reference.double()).flatten(1).square().sum(1)
    return difference / reference.double().flatten(1).square().sum(1)


def read_cache(path: Path, statistics: str) -> dict[str, Points]:
    """The points in a cache, by settings: none if it is missing, damaged, or of other statistics."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["statistics"]) != (FORMAT, statistics):
            return {}
        return {
            settings: {
                group: {int(width): _point(**point) for width, point in widths.items()}
                for group, widths in groups.items()
            }
            for settings, groups in found["runs"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _point(local: float, errors: list[float]) -> Point:
    return Point(float(local), tuple(map(float, errors)))


def write_cache(path: Path, statistics: str, settings: str, points: Points) -> None:
    """Put the points of one run into the cache, beside those of other runs."""
    runs = {**read_cache(path, statistics), settings: points}
    data = {
        name: {group: {width: asdict(point) for width, point in widths.items()} for group, widths in run.items()}
        for name, run in runs.items()
    }
    write_json(path, {"format": FORMAT, "statistics": statistics, "runs": data})
