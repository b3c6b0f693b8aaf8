"""The latency table: how long a layer takes at which width, by its shape alone, on one device. Knows no UNet."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from slimdiff.errors import SlimdiffError
from slimdiff.files import write_json

FORMAT = 1


@dataclass(frozen=True)
class Conditions:
    """What times depend on beside shapes. `device` is the model of GPU or processor, `threads` torch's on the CPU, else
    0. `height` and `width` are pixels, `rows` those of the UNet's batch, both halves of guidance counted. `parameters`
    is the size of the dense UNet, whose call was timed too."""

    device: str
    dtype: str
    threads: int
    torch: str
    diffusers: str
    height: int
    width: int
    rows: int
    parameters: int

    def differences(self, other: Conditions) -> list[str]:
        """How these differ from others: names with both values."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [f"{name} {ours} instead of {theirs}" for name, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class Shape:
    """A kind of layer that takes as long wherever it stands.

    `layer` is its class, `cut` the kinds of its groups that share the width, as in "qk+vo", `heads` their heads and
    `full` their dense width. `parameters` are those of the dense layer, `inputs` the shapes of the tensors it is
    called with: one of an image's or its own tokens, in cross-attention also one of the text.
    """

    layer: str
    cut: str
    heads: int
    full: int
    parameters: int
    inputs: tuple[tuple[int, ...], ...]

    @property
    def is_padded(self) -> bool:
        """Whether kernels pad the width, so that time is a staircase over it."""
        return bool({"qk", "vo"} & set(self.cut.split("+")))

    def __str__(self) -> str:
        inputs = ", ".join("x".join(map(str, sizes)) for sizes in self.inputs)
        return f"{self.layer}, {self.cut} of {self.heads} x {self.full}, on {inputs}"


@dataclass(frozen=True)
class Curve:
    """Seconds by width, widths rising, seconds never falling."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def smoothed(widths: Sequence[int], seconds: Sequence[float]) -> Curve:
        """The nearest curve, by least squares, of those that never fall: less width cannot take longer but by noise."""
        order = np.argsort(widths)
        rising = isotonic_regression(np.array(seconds)[order]).x
        return Curve(tuple(np.array(widths)[order].tolist()), tuple(rising.tolist()))

    def at(self, width: int, is_padded: bool) -> float:
        """At a width that was not measured: the next wider one's time if kernels pad to it, else linear in between.

        Below the narrowest nothing more is gained.
        """
        if is_padded:
            return self.seconds[bisect_left(self.widths, width)]
        return float(np.interp(width, self.widths, self.seconds))


@dataclass(frozen=True)
class Table:
    """Times under some conditions: `call` is a call of the whole dense UNet in seconds, `curves` are of layers alone.

    `scale`, at most 1, is what narrow layers save within the UNet over what they save alone.
    """

    conditions: Conditions
    call: float
    scale: float
    curves: dict[Shape, Curve]

    def seconds(self, shape: Shape, width: int) -> float:
        """Of a layer at a width, within the UNet."""
        return self.scale * self.curves[shape].at(width, shape.is_padded)

    def missing(self, shapes: Iterable[Shape]) -> list[Shape]:
        """Those of the shapes that the table does not know."""
        return [shape for shape in dict.fromkeys(shapes) if shape not in self.curves]

    def write(self, path: Path) -> None:
        """Raises OutputError if it cannot be written."""
        curves = [{**asdict(shape), **asdict(curve)} for shape, curve in self.curves.items()]
        times = {"call": self.call, "scale": self.scale}
        write_json(path, {"format": FORMAT, "conditions": asdict(self.conditions), **times, "layers": curves})

    @staticmethod
    def read(path: Path) -> Table:
        """Raises SlimdiffError if there is no table or it is damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise SlimdiffError(
                    f"{path} has format {data['format']}, not {FORMAT}; 'slimdiff profile' of this version makes one."
                )
            curves = dict(map(_curve, data["layers"]))
            return Table(Conditions(**data["conditions"]), _positive(data["call"]), _positive(data["scale"]), curves)
        except OSError as error:
            raise SlimdiffError(
                f"Cannot read the latency table {path}: {error.strerror}. 'slimdiff profile' makes one."
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SlimdiffError(
                f"{path} is no latency table ({type(error).__name__}: {error}). 'slimdiff profile' makes one."
            ) from error


def _curve(entry: dict[str, Any]) -> tuple[Shape, Curve]:
    """Raises ValueError for a curve that falls or has no points."""
    widths, seconds = tuple(map(int, entry.pop("widths"))), tuple(map(_positive, entry.pop("seconds")))
    shape = Shape(**{**entry, "inputs": tuple(map(tuple, entry["inputs"]))})
    if len(widths) != len(seconds) or list(widths) != sorted({*widths}) or list(seconds) != sorted(seconds):
        raise ValueError(f"widths and seconds of {shape} do not rise together")
    if not widths or widths[-1] != shape.full:
        raise ValueError(f"{shape} is not timed at its full width")
    return shape, Curve(widths, seconds)


def _positive(number: Any) -> float:
    if not 0 < float(number) < float("inf"):
        raise ValueError(f"{number} is not above 0")
    return float(number)
