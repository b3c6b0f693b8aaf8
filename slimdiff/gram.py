"""The accumulator of calibration: sums over tokens, exact under any batching, order and merging but for rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What the sums say: second moment `E[x xᵀ]`, (..., d, d), mean `E[x]`, (..., d), and the number of tokens."""

    second: Tensor
    mean: Tensor
    count: int

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean[..., :, None] * self.mean[..., None, :]


class Gram:
    """Running sums `XᵀX`, (h, d, d), `Σx`, (h, d), and the token count, per head, in fp32 on one device."""

    def __init__(self, width: int, heads: int = 1, device: torch.device | str = "cpu") -> None:
        self.products = torch.zeros(heads, width, width, device=device)
        self.sums = torch.zeros(heads, width, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add tokens `x`, (..., h * d); any floating dtype, summed in fp32 because fp16 products overflow."""
        heads, width = self.sums.shape
        rows = x.reshape(-1, heads, width).transpose(0, 1).float()
        self.products.baddbmm_(rows.mT, rows)
        self.sums += rows.sum(1)
        self.count += rows.shape[1]

    def merge(self, other: Gram) -> None:
        self.products += other.products
        self.sums += other.sums
        self.count += other.count

    def tensors(self) -> dict[str, Tensor]:
        return {"products": self.products, "sums": self.sums}

    def moments(self) -> Moments:
        n = max(self.count, 1)
        return Moments(self.products / n, self.sums / n, self.count)
