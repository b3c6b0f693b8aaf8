"""What a benchmark is told and what it measures: plain records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimdiff.errors import SlimdiffError
from slimdiff.guidance import rows_per_prompt
from slimdiff.macs import Macs
from slimdiff.recipe import check_size

QUANTILES = (0.5, 0.9, 1.0)
"""Of the prompts, best first: the typical one, what 9 in 10 stay within, the worst."""


@dataclass(frozen=True)
class Settings:
    """What to run. Prompt i has `negatives[i]` and runs from seed `seed + i`, far from calibration's seeds.

    `height` and `width` are pixels. `batch_sizes` counts prompts; guidance runs the UNet on twice as many rows,
    but one that `is_told_guidance` (see `families.py`). `repeats` is the number of dense-slim pairs of each timing.
    `pictures` is how many pairs of pictures are shown.
    `stacks` is what both models are also measured with, each as in "int8" or "int8+tome" (see `stacking.py`).

    Raises SlimdiffError if the numbers make no benchmark.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int = 10_000
    batch_sizes: tuple[int, ...] = (1, 4)
    repeats: int = 10
    pictures: int = 16
    stacks: tuple[str, ...] = ()
    is_told_guidance: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise SlimdiffError("There is no prompt to compare the models on; give at least one.")
        if len(self.negatives) != len(self.prompts):
            raise SlimdiffError(
                f"There are {len(self.prompts)} prompts and {len(self.negatives)} negative prompts; give each prompt "
                "one, which may be empty."
            )
        least = {"steps": self.steps, "repeats": self.repeats, "batch sizes": min(self.batch_sizes, default=0)}
        for name, value in least.items():
            if value < 1:
                raise SlimdiffError(f"The benchmark's {name} cannot be {value}; the least is 1.")
        check_size(self.height, self.width)
        if self.pictures < 0:
            raise SlimdiffError(f"{self.pictures} pictures cannot be shown; the least is 0.")

    @staticmethod
    def like(made: Mapping[str, Any], prompts: Sequence[str], **changes: Any) -> Settings:
        """As calibration ran, `made` being its recipe in a plan's provenance, but without negative prompts and with
        the changes that are not None."""
        kept = {name: made[name] for name in ("steps", "guidance_scale", "height", "width")}
        asked = {name: value for name, value in changes.items() if value is not None}
        return Settings(tuple(prompts), ("",) * len(prompts), **kept | asked)

    @property
    def rows_per_prompt(self) -> int:
        """Rows of a UNet batch that one prompt takes."""
        return rows_per_prompt(self.guidance_scale, self.is_told_guidance)


def quantile(values: Iterable[float], q: float) -> float:
    """With linear interpolation; infinite where it falls between infinite values."""
    with np.errstate(invalid="ignore"):
        found = float(np.quantile(np.nan_to_num(list(values), nan=np.inf, posinf=np.inf), q))
    return math.inf if math.isnan(found) else found


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        values = list(values)
        return Spread(quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of both sides, and the spread of the ratio dense / slim within each of the `pairs`.

    Each measurement is the mean of `calls` calls in a row.
    """

    what: str
    dense: Spread
    slim: Spread
    speedup: Spread
    pairs: int
    calls: int

    @property
    def is_clear(self) -> bool:
        """Whether the quartiles of the speed-up lie on one side of 1."""
        return self.speedup.q1 > 1 or self.speedup.q3 < 1


@dataclass(frozen=True)
class Size:
    """Dense and slim. `macs` are of one UNet row; sizes are bytes.

    `checkpoint` is of the UNets' weight files, None where there are none. `memory` is the pipeline's own weights plus
    what making one picture adds at its peak, None if it cannot be measured.
    """

    parameters: tuple[int, int]
    macs: tuple[Macs, Macs]
    weights: tuple[int, int]
    checkpoint: tuple[int, int] | None
    memory: tuple[int, int] | None

    @property
    def ideal_speedup(self) -> float:
        """Of the UNet, if time went by multiply-accumulates alone."""
        return self.macs[0].total / self.macs[1].total


@dataclass(frozen=True)
class Fidelity:
    """Dense against slim at equal seeds; one value per prompt unless said otherwise.

    `drift` is the squared error of the final latents relative to the dense latents' energy. `noise[j]` is that of the
    guided prediction at the j-th UNet call of the dense trajectory, both models fed the same latents, `timesteps[j]`
    its timestep. `mse` and `ssim` compare 8-bit pictures. `attributes` holds, for dense and slim, the mean share of
    each attribute of the captions that the pictures show; None unless every prompt is a caption of the miniature's
    grammar.
    """

    drift: tuple[float, ...]
    noise: tuple[tuple[float, ...], ...]
    timesteps: tuple[float, ...]
    mse: tuple[float, ...]
    ssim: tuple[float, ...]
    attributes: tuple[dict[str, float], dict[str, float]] | None

    def psnr(self, q: float) -> float:
        """In dB, of the picture at quantile `q` (1 is the worst); infinite where nothing differs."""
        return psnr_of(quantile(self.mse, q))


def psnr_of(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures; infinite for identical ones."""
    return 10 * math.log10(255**2 / mse) if mse > 0 else math.inf


@dataclass(frozen=True)
class Stacked:
    """A pipeline with something on top against the plain dense one.

    `weights` are the UNet's bytes; `drift` and `mse` have one value per prompt, as in Fidelity.
    """

    seconds: Spread
    speedup: Spread
    weights: int
    drift: tuple[float, ...]
    mse: tuple[float, ...]

    def psnr(self, q: float) -> float:
        """As in Fidelity."""
        return psnr_of(quantile(self.mse, q))


@dataclass(frozen=True)
class Stack:
    """The same on top of both models; `name` is "int8", or several as in "int8+tome"."""

    name: str
    dense: Stacked
    slim: Stacked


@dataclass(frozen=True)
class Picture:
    """One prompt's pair of pictures, (H, W, 3) uint8, with its place among the `drift`s in words."""

    label: str
    prompt: str
    negative: str
    seed: int
    drift: float
    psnr: float
    ssim: float
    dense: np.ndarray
    slim: np.ndarray
