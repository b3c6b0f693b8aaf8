"""`slimdiff inspect`: what a file is, and what is in it."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from slimdiff import checkpoint
from slimdiff.errors import SlimdiffError, StatisticsError
from slimdiff.influence import read_cache
from slimdiff.plan import Plan
from slimdiff.report.of_plan import PlanView
from slimdiff.report.of_statistics import StatisticsView
from slimdiff.spectra import spectrum
from slimdiff.statistics import StatisticsFile


def look(path: Path) -> StatisticsView | PlanView:
    """What lies at `path`: a statistics file, a plan, or a slim checkpoint with its plan.

    Raises SlimdiffError if it is none of them, or damaged.
    """
    if not path.exists():
        raise SlimdiffError(
            f"There is no file or folder {path}. Pass a file of 'slimdiff calibrate', a folder of 'slimdiff compress', "
            "or its plan.json."
        )
    if path.is_dir():
        return PlanView(checkpoint.plan_of(path))
    if path.suffix != ".json":
        return _statistics(StatisticsFile(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimdiffError(f"{path} cannot be read ({error}).") from error
    return PlanView(Plan.from_json(text, path))


def _statistics(file: StatisticsFile) -> StatisticsView:
    keys = [key for key, tokens in file.metadata["tokens"].items() if tokens]
    if not keys:
        raise StatisticsError(f"{file.path} holds no tokens at all; calibrate again.")
    return StatisticsView(
        file.metadata,
        [spectrum(file, key) for key in tqdm(keys, unit="statistic", disable=None, desc="inspect", leave=False)],
        read_cache(file.path.with_suffix(".influence.json"), file.digest()),
    )
