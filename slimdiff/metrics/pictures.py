"""Pictures in files, read batch by batch at one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from slimdiff.errors import SlimdiffError

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FILTER = Image.Resampling.BICUBIC
"""Of every change of size; Pillow's averages over all pixels that it makes one of."""


@dataclass(frozen=True)
class Pictures:
    """Picture files, in order; `size` is the (width, height) in pixels that they are read at."""

    paths: tuple[Path, ...]
    size: tuple[int, int]
    batch: int

    @staticmethod
    def under(folder: Path, size: tuple[int, int], batch: int) -> Pictures:
        """Every picture in a folder and the folders in it. Raises SlimdiffError if there are fewer than two."""
        paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS))
        if len(paths) < 2:
            raise SlimdiffError(
                f"{folder} holds {len(paths)} pictures ({', '.join(sorted(KINDS))}); FID needs thousands of real ones."
            )
        return Pictures(paths, size, batch)

    def batches(self, what: str) -> Iterator[Tensor]:
        """8-bit RGB, (B, 3, H, W). Raises SlimdiffError for a file that is no picture."""
        with tqdm(total=len(self.paths), unit="picture", disable=None, desc=what) as bar:
            for first in range(0, len(self.paths), self.batch):
                chosen = self.paths[first : first + self.batch]
                yield torch.stack([_read(path, self.size) for path in chosen])
                bar.update(len(chosen))


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    """(3, H, W): cut at the centre to the shape of `size`, then resized."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.fit(file.convert("RGB"), size, FILTER)
    except OSError as error:
        raise SlimdiffError(f"{path} cannot be read as a picture ({error}); remove it.") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
