"""slimdiff: pretrained Stable Diffusion UNets made smaller and faster after training, without gradients.

`slimdiff.calibrate`, `slimdiff.compress`, `slimdiff.bench` and `slimdiff.evaluate` do on loaded pipelines what the
commands of these names (the last is `slimdiff eval`) do; `slimdiff.save` and `slimdiff.load` are for slim checkpoints.
They are imported when first used, so that `import slimdiff` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "calibrate", "compress", "evaluate", "load", "save"]

if TYPE_CHECKING:
    from slimdiff.api import bench, calibrate, compress, evaluate, load, save


def _function(name: str) -> property:
    """A function imported when asked for. Importing a module of its name would bind that to the name: not so here."""
    return property(lambda package: getattr(import_module("slimdiff.api"), name), lambda package, module: None)


class _Package(ModuleType):
    bench: Any = _function("bench")
    calibrate: Any = _function("calibrate")
    compress: Any = _function("compress")
    evaluate: Any = _function("evaluate")
    load: Any = _function("load")
    save: Any = _function("save")


sys.modules[__name__].__class__ = _Package
