"""slimdiff: pretrained Stable Diffusion UNets made smaller and faster after training, without gradients.

`slimdiff.calibrate`, `slimdiff.compress` and `slimdiff.bench` are the functions behind the commands of the same names;
`slimdiff.load` opens a slim checkpoint. They are imported when first used, so that `import slimdiff` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "calibrate", "compress", "load"]

if TYPE_CHECKING:
    from slimdiff.bench import bench
    from slimdiff.calibrate import calibrate
    from slimdiff.checkpoint import load
    from slimdiff.compress import compress


def _function(home: str, name: str) -> property:
    """A function imported when asked for. Importing its module would bind the module to the same name: not so here."""
    return property(lambda package: getattr(import_module(home), name), lambda package, module: None)


class _Package(ModuleType):
    bench: Any = _function("slimdiff.bench", "bench")
    calibrate: Any = _function("slimdiff.calibrate", "calibrate")
    compress: Any = _function("slimdiff.compress", "compress")
    load: Any = _function("slimdiff.checkpoint", "load")


sys.modules[__name__].__class__ = _Package
