"""slimdiff: pretrained Stable Diffusion UNets made smaller and faster after training, without gradients.

`slimdiff.calibrate`, `slimdiff.compress` and `slimdiff.bench` are the functions behind the commands of the same names;
`slimdiff.load` opens a slim checkpoint. They are imported when first used, so that `import slimdiff` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "calibrate", "compress", "load"]

if TYPE_CHECKING:
    from slimdiff.bench import bench
    from slimdiff.calibrate import calibrate
    from slimdiff.checkpoint import load
    from slimdiff.compress import compress

_HOMES = {"bench": "bench", "calibrate": "calibrate", "compress": "compress", "load": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slimdiff' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"slimdiff.{_HOMES[name]}"), name)
