"""Where outputs go when no path is given, and how each command finds what the one before it left there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from slimdiff.errors import OutputError, SlimdiffError

ROOT = Path("slimdiff-out")
PLAN = Path("slimdiff", "plan.json")
"""Of a slim checkpoint, in its folder."""


def statistics_path(model: str) -> Path:
    return ROOT / model / "statistics.safetensors"


def part_path(whole: Path, part: int, parts: int) -> Path:
    """Beside the statistics that it is a part of."""
    return whole.with_name(f"{whole.stem}-{part}-of-{parts}{whole.suffix}")


def latency_path(folder: Path) -> Path:
    """Beside the statistics: it serves all of them there."""
    return folder / "latency.json"


def amount(budget: float, of: str) -> str:
    """A budget in a path's name: `0.35`, or `0.35-macs`."""
    return f"{budget:g}" if of == "groups" else f"{budget:g}-{of}"


def slim_paths(statistics: Path, amounts: Sequence[str], method: str, output: Path | None) -> list[Path]:
    """Where the checkpoint of each amount goes: beside the statistics, as `slim-0.35` or `slim-1.3x`, with an unusual
    method behind (`slim-0.35-macs-svd`), or to `output`, which is a folder for all of them where there are several.

    Raises OutputError if several cannot go there.
    """
    if output is not None and len(amounts) == 1:
        return [output]
    if output is not None and output.exists() and (not output.is_dir() or (output / PLAN).exists()):
        what = "a slim checkpoint" if output.is_dir() else "a file"
        raise OutputError(
            f"{output} is {what}. With several budgets, -o names a folder in which each gets its own: pass another, or "
            "leave -o out."
        )
    unusual = [method] if method != "slimdiff" else []
    return [(output or statistics.parent) / "-".join(["slim", amount, *unusual]) for amount in amounts]


def report_path(slim: Path) -> Path:
    return slim.parent / f"bench-{slim.name.removeprefix('slim-')}"


def evaluation_path(slim: Path) -> Path:
    return slim.parent / f"eval-{slim.name.removeprefix('slim-')}"


def slim_inside(folder: Path) -> list[Path]:
    """The slim checkpoints that lie in a folder."""
    return sorted(plan.parent.parent for plan in folder.glob(f"*/{PLAN.as_posix()}"))


def statistics_near(folder: Path) -> Path | None:
    """The statistics in a folder, or beside it if it is a slim checkpoint, if they are there."""
    where = folder.parent if (folder / PLAN).exists() else folder
    return path if (path := where / "statistics.safetensors").is_file() else None


def newest_statistics() -> Path:
    return _newest(ROOT.glob("*/statistics.safetensors"), "statistics file", "slimdiff calibrate")


def newest_slim() -> Path:
    plans = ROOT.glob(f"*/slim-*/{PLAN.as_posix()}")
    return _newest(plans, "slim checkpoint", "slimdiff compress --budget 0.35").parent.parent


def _newest(paths: Iterable[Path], what: str, command: str) -> Path:
    found = sorted(paths, key=lambda path: path.stat().st_mtime)
    if not found:
        raise SlimdiffError(f"There is no {what} under ./{ROOT}. Run '{command}' here first, or pass its path.")
    return found[-1]
