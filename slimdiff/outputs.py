"""Where outputs go when no path is given, and how each command finds what the one before it left there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slimdiff.errors import SlimdiffError

ROOT = Path("slimdiff-out")


def statistics_path(model: str) -> Path:
    return ROOT / model / "statistics.safetensors"


def slim_path(statistics: Path, budget: float, of: str, method: str) -> Path:
    """Beside the statistics: `slim-0.35`, with what is unusual about it behind, as in `slim-0.35-macs-svd`."""
    usual = ("groups", "slimdiff")
    return statistics.parent / "-".join(["slim", f"{budget:g}", *(part for part in (of, method) if part not in usual)])


def report_path(slim: Path) -> Path:
    return slim.parent / f"bench-{slim.name.removeprefix('slim-')}"


def newest_statistics() -> Path:
    return _newest(ROOT.glob("*/statistics.safetensors"), "statistics file", "slimdiff calibrate")


def newest_slim() -> Path:
    plans = ROOT.glob("*/slim-*/slimdiff/plan.json")
    return _newest(plans, "slim checkpoint", "slimdiff compress --budget 0.35").parent.parent


def _newest(paths: Iterable[Path], what: str, command: str) -> Path:
    found = sorted(paths, key=lambda path: path.stat().st_mtime)
    if not found:
        raise SlimdiffError(f"There is no {what} under ./{ROOT}. Run '{command}' here first, or pass its path.")
    return found[-1]
