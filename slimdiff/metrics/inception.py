"""Inception v3 as FID uses it (Szegedy et al. 2016, arXiv 1512.00567, in the TensorFlow version of 2015-12-05).

It differs from the network of the paper and of torchvision: averages leave out the padding, and the last block takes
maxima. Weights are named as in the file that torch-fidelity and pytorch-fid publish. It is here because those packages
need a torchvision built for the very torch that is installed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimdiff.metrics.weights import fetch, fill

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SIDE = 299
WIDTHS = (64, 192, 768, 2048)
"""Of the features after each part of the network; FID is of the last."""

Size = int | tuple[int, int]


class Layer(NamedTuple):
    """A convolution: its name, channels of output, kernel and stride."""

    name: str
    channels: int
    kernel: Size
    stride: int = 1


Step = tuple[Layer, ...]
"""Convolutions of one input, their outputs put together."""

average = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution, normalisation and ReLU; without a stride it keeps the size, unless it is not `padded`."""

    def __init__(self, before: int, after: int, kernel: Size, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(before, after, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions beside each other, and a pooled path with a convolution of `pooled` channels, if any."""

    def __init__(self, channels: int, chains: list[list[Step]], pool: Callable[..., Tensor], pooled: int = 0) -> None:
        super().__init__()
        self.pool, self.chains = pool, [[[layer.name for layer in step] for step in chain] for chain in chains]
        for chain in chains:
            before = channels
            for step in chain:
                for layer in step:
                    self.add_module(layer.name, Convolution(before, layer.channels, layer.kernel, layer.stride))
                before = sum(layer.channels for layer in step)
        self.branch_pool = Convolution(channels, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            y = x
            for step in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in step], 1)
            found.append(y)
        return torch.cat([*found, self.branch_pool(self.pool(x))], 1)


def _one(name: str, channels: int, kernel: Size, stride: int = 1) -> list[Step]:
    return [(Layer(name, channels, kernel, stride),)]


def _chain(name: str, *shapes: tuple[int, Size] | tuple[int, Size, int]) -> list[Step]:
    """Convolutions one after the other, called name_1, name_2, ..."""
    return [(Layer(f"{name}_{i}", *shape),) for i, shape in enumerate(shapes, 1)]


def _a(channels: int, pooled: int) -> Mixed:
    three = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return Mixed(channels, [_one("branch1x1", 64, 1), _chain("branch5x5", (48, 1), (64, 5)), three], average, pooled)


def _b(channels: int) -> Mixed:
    three = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2))
    return Mixed(channels, [_one("branch3x3", 384, 3, 2), three], shrink)


def _c(channels: int, inner: int) -> Mixed:
    wide, high = (1, 7), (7, 1)
    seven = _chain("branch7x7", (inner, 1), (inner, wide), (192, high))
    twice = _chain("branch7x7dbl", (inner, 1), (inner, high), (inner, wide), (inner, high), (192, wide))
    return Mixed(channels, [_one("branch1x1", 192, 1), seven, twice], average, 192)


def _d(channels: int) -> Mixed:
    three = _chain("branch3x3", (192, 1), (320, 3, 2))
    seven = _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
    return Mixed(channels, [three, seven], shrink)


def _e(channels: int, pool: Callable[..., Tensor]) -> Mixed:
    def split(name: str) -> Step:
        return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))

    three = [*_chain("branch3x3", (384, 1)), split("branch3x3_2")]
    twice = [*_chain("branch3x3dbl", (448, 1), (384, 3)), split("branch3x3dbl_3")]
    return Mixed(channels, [_one("branch1x1", 320, 1), three, twice], pool, 192)


def _parts() -> tuple[dict[str, nn.Module], ...]:
    """The network in four, after each of which features can be taken, by the names of the weight file."""
    return (
        {
            "Conv2d_1a_3x3": Convolution(3, 32, 3, 2),
            "Conv2d_2a_3x3": Convolution(32, 32, 3, padded=False),
            "Conv2d_2b_3x3": Convolution(32, 64, 3),
            "MaxPool_1": nn.MaxPool2d(3, 2),
        },
        {
            "Conv2d_3b_1x1": Convolution(64, 80, 1),
            "Conv2d_4a_3x3": Convolution(80, 192, 3, padded=False),
            "MaxPool_2": nn.MaxPool2d(3, 2),
        },
        {
            "Mixed_5b": _a(192, 32),
            "Mixed_5c": _a(256, 64),
            "Mixed_5d": _a(288, 64),
            "Mixed_6a": _b(288),
            "Mixed_6b": _c(768, 128),
            "Mixed_6c": _c(768, 160),
            "Mixed_6d": _c(768, 160),
            "Mixed_6e": _c(768, 192),
        },
        {"Mixed_7a": _d(768), "Mixed_7b": _e(1280, average), "Mixed_7c": _e(2048, maximum)},
    )


class Inception(nn.Sequential):
    """8-bit pictures (B, 3, H, W) -> features (B, `num_features`), one of WIDTHS."""

    def __init__(self, num_features: int = WIDTHS[-1]) -> None:
        parts = _parts()[: WIDTHS.index(num_features) + 1]
        super().__init__(OrderedDict(layer for part in parts for layer in part.items()))
        self.num_features = num_features

    def forward(self, pictures: Tensor) -> Tensor:
        x = functional.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = super().forward((x - 128) / 128)
        return features.mean((2, 3))


def load(num_features: int, weights: Path | None) -> Inception:
    """With the published weights, from the folder `weights`, torch's cache or the net. Raises SlimdiffError."""
    network = Inception(num_features)
    fill(network, fetch(URL, weights), URL.rpartition("/")[2])
    return network
