"""Where outputs go when no path is given, and how each command finds what the one before it left there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slimdiff.errors import SlimdiffError

ROOT = Path("slimdiff-out")


def statistics_path(model: str) -> Path:
    return ROOT / model / "statistics.safetensors"


def latency_path(folder: Path) -> Path:
    """Beside the statistics: it serves all of them there."""
    return folder / "latency.json"


def amount(budget: float, of: str) -> str:
    """A budget in a path's name: `0.35`, or `0.35-macs`."""
    return f"{budget:g}" if of == "groups" else f"{budget:g}-{of}"


def slim_path(statistics: Path, amount: str, method: str) -> Path:
    """Beside the statistics: `slim-0.35`, `slim-1.3x`, with an unusual method behind, as in `slim-0.35-macs-svd`."""
    return statistics.parent / "-".join(["slim", amount, *([method] if method != "slimdiff" else [])])


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
