"""The accumulator of calibration: sums over tokens, the same under any batching, order and merging but for rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.linalg import pack, tensor_cores, unpack
from slimdiff.timesteps import TENTHS

LEAF = 128
"""Width up to which one matrix product is faster than several."""


@dataclass(frozen=True)
class Moments:
    """What the sums say of h heads: covariance, (h, d, d), mean, (h, d), both float64, and the number of tokens."""

    covariance: Tensor
    mean: Tensor
    count: float

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], (h, d, d)."""
        return self.covariance + self.mean[..., :, None] * self.mean[..., None, :]

    def through(self, weight: Tensor, bias: Tensor | None, heads: int) -> Moments:
        """What it says, of one head's tokens x, about y = W x + b: `weight` is (h d, C), and y has h heads."""
        rows = weight.double().unflatten(0, (heads, -1))
        mean = (rows @ self.mean[0].double()[:, None]).squeeze(-1)
        shift = 0 if bias is None else bias.double().view_as(mean)
        return Moments(rows @ self.covariance[0].double() @ rows.mT, mean + shift, self.count)


class Gram:
    """Centred products `Σ (x - m)(x - m)ᵀ`, mean m, (h, d), and token count n, of each head; and the energy `Σ |x|²`,
    not centred, of all heads in each tenth of the sampler's calls, (10,).

    `packed` holds the products' lower triangles, (h, d (d + 1) / 2). Products are kept centred, because a mean that is
    large beside the spread would drown it in rounding; batches are joined by the update of Chan, Golub & LeVeque
    (1983). A batch's own products are float32 (float16 products overflow), what they are added to is float64.
    """

    def __init__(self, width: int, heads: int = 1, device: torch.device | str = "cpu") -> None:
        self.packed = torch.zeros(heads, width * (width + 1) // 2, dtype=torch.float64, device=device)
        self.mean = torch.zeros(heads, width, dtype=torch.float64, device=device)
        self.energy = torch.zeros(TENTHS, dtype=torch.float64, device=device)
        self.count: float = 0

    def add(self, x: Tensor, weight: float = 1.0, tenth: int = 0) -> None:
        """Add tokens `x`, (..., h * d), of any floating dtype, each of which counts as `weight` tokens."""
        heads, width = self.mean.shape
        rows = x.reshape(-1, heads, width).transpose(0, 1).float()
        mean = rows.mean(1, keepdim=True)
        rows = rows - mean
        with tensor_cores():
            products = _products(rows)
        spread = products.diagonal(dim1=1, dim2=2).double().sum()
        self.energy[tenth] += weight * (spread + rows.shape[1] * mean.double().square().sum())
        self._join(products if weight == 1 else weight * products, mean[:, 0], weight * rows.shape[1])

    def merge(self, other: Gram) -> None:
        """Add the tokens of another, on whatever device."""
        products = unpack(other.packed.to(self.packed.device), self.mean.shape[1])
        self._join(products, other.mean.to(self.mean.device), other.count)
        self.energy += other.energy.to(self.energy.device)

    def _join(self, products: Tensor, mean: Tensor, count: float) -> None:
        """`products`, (h, d, d), is overwritten."""
        if count == 0:
            return
        share = count / (self.count + count)
        shift = mean.double() - self.mean
        between = shift.to(products.dtype)
        products.baddbmm_(between[:, :, None], between[:, None, :], alpha=self.count * share)
        self.packed += pack(products)
        self.mean += share * shift
        self.count += count

    def moments(self) -> Moments:
        return Moments(unpack(self.packed, self.mean.shape[1]) / max(self.count, 1), self.mean, self.count)


def _products(rows: Tensor) -> Tensor:
    """XᵀX of (h, n, d), by halves: it is symmetric, so a quarter of the work is saved, and again within each half."""
    d = rows.shape[2]
    if d <= LEAF:
        return rows.mT @ rows
    left, right = rows[:, :, : d // 2], rows[:, :, d // 2 :]
    whole = rows.new_empty(len(rows), d, d)
    whole[:, : d // 2, : d // 2] = _products(left)
    whole[:, d // 2 :, d // 2 :] = _products(right)
    corner = right.mT @ left
    whole[:, d // 2 :, : d // 2] = corner
    whole[:, : d // 2, d // 2 :] = corner.mT
    return whole
