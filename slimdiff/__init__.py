"""slimdiff: pretrained Stable Diffusion UNets made smaller and faster after training, without gradients.

`slimdiff.calibrate`, `slimdiff.compress`, `slimdiff.bench` and `slimdiff.evaluate` do on loaded pipelines what the
commands of these names (the last is `slimdiff eval`) do; `slimdiff.save` and `slimdiff.load` are for slim checkpoints.
They, and the types that they take, return and raise, are imported when first used, so that `import slimdiff` costs
nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Options",
    "Plan",
    "SlimdiffError",
    "StatisticsFile",
    "__version__",
    "bench",
    "calibrate",
    "compress",
    "evaluate",
    "load",
    "save",
]

if TYPE_CHECKING:
    from slimdiff.api import bench, calibrate, compress, evaluate, load, save
    from slimdiff.errors import SlimdiffError
    from slimdiff.options import Options
    from slimdiff.plan import Plan
    from slimdiff.statistics import StatisticsFile


def _from(module: str, name: str) -> property:
    """A name imported when asked for. Importing a module of its name would bind that to the name: not so here."""
    return property(lambda package: getattr(import_module(f"slimdiff.{module}"), name), lambda package, module: None)


class _Package(ModuleType):
    Options: Any = _from("options", "Options")
    Plan: Any = _from("plan", "Plan")
    SlimdiffError: Any = _from("errors", "SlimdiffError")
    StatisticsFile: Any = _from("statistics", "StatisticsFile")
    bench: Any = _from("api", "bench")
    calibrate: Any = _from("api", "calibrate")
    compress: Any = _from("api", "compress")
    evaluate: Any = _from("api", "evaluate")
    load: Any = _from("api", "load")
    save: Any = _from("api", "save")


sys.modules[__name__].__class__ = _Package
