"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from slimdiff.errors import OutputError

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    No two are the same: of processes that write one file, the last one's stays, whole.

    Raises OutputError if it cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # some writers make files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or pick another -o."
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raises OutputError if no file can be written at `path`: before long work, not after it. Leaves nothing behind."""
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, and -o names a file here: pick a name inside it.")
    check_room(path, path.parent)


def check_room(output: Path, folder: Path) -> None:
    """Raises OutputError, which names `output`, if nothing can be written into `folder`, which need not be there yet.
    Leaves nothing behind."""
    # unlike Path.exists, os.path.exists says no where it may not look
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with TemporaryDirectory(dir=folder, prefix=".slimdiff-"):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write {output}: {error.strerror or error}. Pick another -o.") from error


def write_json(path: Path, data: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing_folder(output: Path, folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    What is there is replaced only if `replace` is set. Raises OutputError, which calls the folder `output`, if it
    cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for weights in partial.rglob("*.safetensors"):
            weights.chmod(0o666 & ~_UMASK)  # safetensors lets nobody but the owner read its files
        _move(partial, folder, replace)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output} cannot be written: {error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path, replace: bool) -> None:
    if not (replace and folder.exists()):
        partial.rename(folder)
        return
    old = partial.with_suffix(".old")
    try:
        folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
