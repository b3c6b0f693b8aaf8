"""`slimdiff merge`: the parts of a calibration that several machines ran, added up to the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slimdiff.conditions import differing
from slimdiff.errors import OutputError, StatisticsError
from slimdiff.files import check_file
from slimdiff.gram import Gram
from slimdiff.patches import Patches
from slimdiff.recipe import Shard
from slimdiff.states import States
from slimdiff.statistics import Statistics, StatisticsFile


@dataclass(frozen=True)
class Merged:
    path: Path
    parts: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.prompts} prompts of {self.parts} parts"


def merge(paths: Sequence[Path], output: Path, *, force: bool = False, show: bool = True) -> Merged:
    """Write to `output` what one calibration over all prompts would have: the same but for rounding.

    `paths` are all parts of it, in any order. They are read one statistic at a time, so that memory holds little more
    than the file to be written. Without `show` there is no progress bar.

    Raises StatisticsError if the parts are not those of one calibration, each of them once, OutputError if `output`
    exists and is not to be replaced, or cannot be written.
    """
    if output.exists() and not force:
        raise OutputError(f"{output} exists; pass --force to replace it, or -o for another file.")
    check_file(output)
    parts = sorted((StatisticsFile(path) for path in paths), key=lambda part: part.shard.part)
    _check(parts)
    first, states = parts[0], States()
    for part in parts:
        states.extend(part.states())
    whole = Statistics(
        first.model, first.model_options, first.fingerprint, first.recipe, states=states,
        done=sum(part.done for part in parts), loras=first.loras, conditions=first.conditions,
    )  # fmt: skip
    keys = tqdm(first.metadata["tokens"], unit="statistic", disable=None if show else True, desc="merge", leave=False)
    whole.write(output, _sums(parts, keys))
    return Merged(output, len(parts), whole.done)


def _sums(parts: Sequence[StatisticsFile], keys: tqdm[str]) -> Iterator[tuple[str, Gram | Patches]]:
    for key in keys:
        sums: Any = parts[0].sums(key)
        for part in parts[1:]:
            sums.merge(part.sums(key))
        yield key, sums


def _check(parts: Sequence[StatisticsFile]) -> None:
    first, count = parts[0], parts[0].shard.parts
    for part in parts:
        changed = differing(part.conditions, first.conditions)
        if part.shard.parts == 1:
            raise StatisticsError(
                f"{part.path} is no part, but a whole calibration; pass files of 'calibrate --shard'."
            )
        for what, differs in (
            ("another model", part.fingerprint != first.fingerprint),
            ("another recipe (prompts, steps, guidance, scheduler, size or seed)", part.recipe != first.recipe),
            (changed, changed is not None),
            (f"{part.shard.parts} parts, not {count}", part.shard.parts != count),
            ("other layers", part.metadata["tokens"].keys() != first.metadata["tokens"].keys()),
        ):
            if differs:
                raise StatisticsError(
                    f"{part.path} is part {part.shard} of a calibration of {what}: it does not go with {first.path}. "
                    "Run all parts with the same command, but for --shard."
                )
        part.check_finished()
    for one, other in pairwise(parts):
        if one.shard == other.shard:
            raise StatisticsError(f"{one.path} and {other.path} are both part {one.shard}; pass each part once.")
    given = {part.shard for part in parts}
    if missing := [str(shard) for n in range(1, count + 1) if (shard := Shard(n, count)) not in given]:
        raise StatisticsError(
            f"Of {count} parts {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing; run 'slimdiff "
            f"calibrate --shard {missing[0]}' as the others were run, and pass all parts."
        )
