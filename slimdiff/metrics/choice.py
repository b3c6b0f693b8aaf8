"""The metrics that were asked for, loaded before anything is painted; what cannot be had is said at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from slimdiff.errors import SlimdiffError
from slimdiff.metrics.clip import MODEL, ClipMetric
from slimdiff.metrics.fid import FidMetric
from slimdiff.metrics.inception import WIDTHS
from slimdiff.metrics.lpips import LpipsMetric
from slimdiff.metrics.score import Metric


def load(
    names: Sequence[str],
    *,
    clip_model: str = MODEL,
    weights: Path | None = None,
    reference: Path | None = None,
    fid_features: int = WIDTHS[-1],
) -> list[Metric]:
    """Metrics by name ("clip", "fid", "lpips"), in this order, on the CPU.

    `weights` is the folder with the weight files of FID and LPIPS, by default torch's cache; what is not there is
    downloaded to it. `reference` is a folder of real pictures.

    Raises SlimdiffError that says what is missing for each metric that cannot be loaded, and which ones can.
    """
    makers: dict[str, Callable[[], Metric]] = {
        "clip": lambda: ClipMetric(clip_model),
        "fid": lambda: FidMetric(weights, fid_features, reference),
        "lpips": lambda: LpipsMetric(weights),
    }
    found: dict[str, Metric] = {}
    missing: dict[str, SlimdiffError] = {}
    for name in dict.fromkeys(names):
        if name not in makers:
            raise SlimdiffError(f"'{name}' is not a metric; choose from {', '.join(makers)}.")
        try:
            found[name] = makers[name]()
        except SlimdiffError as error:
            missing[name] = error
    if missing:
        causes = "".join(f"\n  {name}: {error}" for name, error in missing.items())
        without = f"\nWhat can be measured is --metrics {','.join(found)}." if found else ""
        raise SlimdiffError(f"Some metrics cannot be measured here, so nothing was painted:{causes}{without}".rstrip())
    return list(found.values())
