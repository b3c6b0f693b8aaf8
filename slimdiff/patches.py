"""The accumulator for 3x3 convolutions: second moments of what lies under the kernel, as sums over shifted pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimdiff.gram import Moments
from slimdiff.linalg import tensor_cores
from slimdiff.timesteps import TENTHS

TAPS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1))
"""Places of a 3x3 kernel, (down, right), in the order of its weights."""

SHIFTS = tuple((y, x) for y in (0, 1, 2) for x in (-2, -1, 0, 1, 2) if (y, x) >= (0, 0))
"""How far one tap lies from another, but for the sign: 13 of the 25 differences of taps."""


@dataclass(frozen=True)
class PatchMoments:
    """What the sums say of pixels h of C channels: `shifted`, `E[h(x) h(x + s)ᵀ]` for each of SHIFTS, (13, C, C), and
    `mean`, of every tap, (9, C), both float64, and the number of pixels.

    The mean is over the patches of a convolution with one row and column of zeros around the picture. `shifted` also
    counts the patches whose centre lies on that border, per pixel of the picture: that makes the moments of taps depend
    on the shift between them only, so that 13 matrices hold all 81.
    """

    shifted: Tensor
    mean: Tensor
    count: float

    @property
    def pixels(self) -> Moments:
        """Of the pixels, as one head."""
        mean = self.mean[TAPS.index((0, 0))]
        return Moments((self.shifted[0] - mean[:, None] * mean)[None], mean[None], self.count)

    def covariance(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Of the patches of some channels, (a,), with those of others, (b,): (9 a, 9 b), the taps of a channel side by
        side as in a convolution's weights.

        It is the covariance over the patches, plus the second moments over those on the border: positive semidefinite.
        """
        forward = self.shifted[:, rows][:, :, columns]
        backward = self.shifted[:, columns][:, :, rows].mT
        blocks = forward.new_empty(len(rows), 9, len(columns), 9)
        for i, (y, x) in enumerate(TAPS):
            for j, (v, u) in enumerate(TAPS):
                shift = (v - y, u - x)
                is_kept = shift in SHIFTS
                blocks[:, i, :, j] = forward[SHIFTS.index(shift)] if is_kept else backward[SHIFTS.index((y - v, x - u))]
        found = blocks.view(9 * len(rows), 9 * len(columns))
        return found.addr_(self.mean.mT[rows].flatten(), self.mean.mT[columns].flatten(), alpha=-1)


class Patches:
    """Sums over pixels: `Σ h(x) h(x + s)ᵀ`, (13, C, C), zeros outside the picture; over patches, (9, C); how many; and
    the energy `Σ |h|²` in each tenth of the sampler's calls, (10,).

    A batch's own sums are float32, what they are added to is float64. Not centred: what follows a group norm is not far
    from zero.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.products = torch.zeros(len(SHIFTS), width, width, dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(TAPS), width, dtype=torch.float64, device=device)
        self.energy = torch.zeros(TENTHS, dtype=torch.float64, device=device)
        self.count: float = 0

    def add(self, pictures: Tensor, weight: float = 1.0, tenth: int = 0) -> None:
        """Add `pictures`, (B, C, H, W), of any floating dtype, each pixel of which counts as `weight` pixels."""
        pictures = pictures.float()
        n, channels, height, width = pictures.shape
        # With two columns and rows of zeros behind, a shift is an offset in the flat list of pixels.
        pixels = pad(pictures, (0, 2, 0, 2)).permute(0, 2, 3, 1).reshape(-1, channels)
        for i, (y, x) in enumerate(SHIFTS):
            offset = y * (width + 2) + x
            with tensor_cores():
                self.products[i] += weight * (pixels[: len(pixels) - offset].mT @ pixels[offset:])
        for i, (y, x) in enumerate(TAPS):
            seen = pictures[:, :, max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
            self.sums[i] += weight * seen.sum((0, 2, 3))
        self.energy[tenth] += weight * pictures.square().sum(dtype=torch.float64)
        self.count += weight * n * height * width

    def merge(self, other: Patches) -> None:
        """Add the pixels of another, on whatever device."""
        for name in ("products", "sums", "energy"):
            ours: Tensor = getattr(self, name)
            ours += getattr(other, name).to(ours.device)
        self.count += other.count

    def moments(self) -> PatchMoments:
        count = max(self.count, 1)
        return PatchMoments(self.products / count, self.sums / count, self.count)
