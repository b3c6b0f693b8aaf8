"""What calibration runs: prompts, negative prompts, steps, guidance, scheduler, size and seed. Finds `calib/`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from slimdiff.errors import SlimdiffError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names of `--scheduler`; without one the checkpoint's own scheduler runs."""

SIDE_STEP = 8
"""Pixels that the sides of a picture are multiples of: diffusers paints no others."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what calibration sees, but for the model.

    Prompt i runs from seed `seed + i` with `negatives[i]`; `height` and `width` are pixels; `scheduler` is a key of
    SCHEDULERS or None for the checkpoint's own; `timestep_weights` is one of `timesteps.WEIGHTINGS`; `baselines` adds
    what only the baseline methods need, `resnets` what ResNet groups need.
    """

    family: str
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: str | None = None
    seed: int = 0
    timestep_weights: str = "uniform"
    baselines: bool = False
    resnets: bool = False

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        known = {field.name for field in fields(Recipe)}
        lists = {"prompts", "negatives"}
        values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in data.items() if k in known}
        return Recipe(**values)


@dataclass(frozen=True)
class Shard:
    """Part `part` of `parts`, counted from 1, of a recipe's prompts."""

    part: int
    parts: int

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"

    def of(self, count: int) -> range:
        """Which of `count` prompts are in this part: consecutive ones, in equal numbers but for one."""
        return range(count * (self.part - 1) // self.parts, count * self.part // self.parts)


WHOLE = Shard(1, 1)


def folder() -> Path:
    """The folder with the bundled prompts: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    for candidate in (here / "calib", here.parent / "calib"):
        if (candidate / "recipes.json").is_file():
            return candidate
    raise SlimdiffError(f"The bundled calibration prompts are missing beside {here}; reinstall slimdiff.")


def family_recipe(
    family: str,
    size: tuple[int, int],
    *,
    prompts: tuple[str, ...] | None = None,
    num_prompts: int | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe of a model family in `calib/recipes.json`, with the user's changes (None keeps the family's own).

    `size` is the (height, width) the model was made for, used where the recipe names none.

    Raises SlimdiffError if fewer prompts are there than asked for, or as `check_size` does.
    """
    entry = json.loads((folder() / "recipes.json").read_text(encoding="utf-8"))[family]
    own = prompts if prompts is not None else read_prompts(folder() / entry["prompts"])
    wanted = num_prompts or min(len(own), entry["num_prompts"] if prompts is None else len(own))
    if wanted > len(own):
        raise SlimdiffError(f"{wanted} prompts were asked for, but only {len(own)} are there; lower --num-prompts.")
    negatives = read_prompts(folder() / entry["negative_prompts"])
    recipe = Recipe(
        family=family,
        prompts=own[:wanted],
        negatives=tuple("" if i % 2 == 0 else negatives[i // 2 % len(negatives)] for i in range(wanted)),
        steps=entry["steps"],
        guidance_scale=entry["guidance_scale"],
        height=entry.get("height", size[0]),
        width=entry.get("width", size[1]),
        scheduler=entry.get("scheduler"),
    )
    recipe = replace(recipe, **{key: value for key, value in changes.items() if value is not None})
    check_size(recipe.height, recipe.width)
    return recipe


def check_size(height: int, width: int) -> None:
    """Raises SlimdiffError for pictures, in pixels, of a size that diffusers does not paint."""
    for name, side in (("height", height), ("width", width)):
        if side < SIDE_STEP or side % SIDE_STEP:
            raise SlimdiffError(f"A {name} of {side} pixels cannot be painted: it has to be a multiple of {SIDE_STEP}.")


def read_prompts(path: Path, column: str = "prompt") -> tuple[str, ...]:
    """Prompts from a .txt (one a line), .csv, .tsv or .jsonl file (these by a column's name); empty lines are skipped.

    Raises SlimdiffError if the file is missing, not UTF-8, of another kind, without that column, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SlimdiffError(f"Cannot read the prompt file {path}: {error.strerror}. Check --prompts.") from error
    except UnicodeDecodeError as error:
        raise SlimdiffError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    rows: list[dict[str, Any]]
    if path.suffix == ".txt":
        rows = [{column: line} for line in text.splitlines()]
    elif path.suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, text)
    elif path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)  # splitlines would also cut at characters JSON allows inside strings
        rows = [_json_row(path, number, line) for number, line in lines if line.strip()]
    else:
        raise SlimdiffError(f"{path} ends in '{path.suffix}'; prompts are read from .txt, .csv, .tsv and .jsonl files.")
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise SlimdiffError(
                f"{path} has no column '{column}' in row {number}, only {', '.join(map(str, row))}; name the column "
                "with the prompts: --column."
            )
    prompts = tuple(str(row[column]).strip() for row in rows if str(row.get(column) or "").strip())
    if not prompts:
        raise SlimdiffError(f"{path} holds no prompt; put one on each line.")
    return prompts


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","))
    except csv.Error as error:
        raise SlimdiffError(
            f"{path} is not a CSV file that can be read ({error}); quote long cells, or use .txt."
        ) from error


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SlimdiffError(f"{path}, line {number} is not JSON ({error.msg}); write an object a line.") from error
    if not isinstance(row, dict):
        raise SlimdiffError(f"{path}, line {number} is not a JSON object; write one a line, with a prompt column.")
    return row


def bench_prompts(family: str) -> tuple[str, ...]:
    """Prompts for measuring, none of which is in the family's calibration set."""
    entry = json.loads((folder() / "recipes.json").read_text(encoding="utf-8"))[family]
    return read_prompts(folder() / entry["bench_prompts"])
