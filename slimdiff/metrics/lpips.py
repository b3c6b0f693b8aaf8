"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on AlexNet: how different two pictures look.

AlexNet (Krizhevsky, arXiv 1404.5997) is written out here because torchvision, which other implementations take it from,
has to be built for the very torch that is installed; weights are named as in torchvision's file. The five linear layers
that were fitted to people's judgements come with torchmetrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.metrics.pictures import Pictures
from slimdiff.metrics.score import Estimate, Score
from slimdiff.metrics.weights import HOW, fetch, fill, need_torchmetrics

URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
HEADS = "functional/image/lpips_models/alex.pth"
"""In torchmetrics."""

LEAST = 31
"""Least side of a picture in pixels that AlexNet's two poolings leave anything of."""

EPSILON = 1e-8
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of ImageNet's pictures in [-1, 1], red, green and blue."""


class Lpips(nn.Module):
    """Two batches of 8-bit pictures (B, 3, H, W) -> LPIPS, (B,)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        relu, pool = nn.ReLU(), nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, 1, 2), relu, pool,
            nn.Conv2d(192, 384, 3, 1, 1), relu, nn.Conv2d(384, 256, 3, 1, 1), relu, nn.Conv2d(256, 256, 3, 1, 1), relu,
        )  # fmt: skip
        widths = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self._directions(a), self._directions(b), self.heads, strict=True)
        return torch.stack([head((x - y) ** 2).mean((1, 2, 3)) for x, y, head in pairs]).sum(0)

    def _directions(self, pictures: Tensor) -> list[Tensor]:
        """The outputs of every ReLU, each position's channels of length 1."""
        x = (pictures.float() / 127.5 - 1 - self.mean) / self.deviation
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt())
        return found


class LpipsMetric:
    """LPIPS of each slim picture against the dense one of the same prompt and seed."""

    def __init__(self, weights: Path | None) -> None:
        """Raises SlimdiffError if weights cannot be had, from the folder `weights`, torch's cache or the net."""
        heads = {f"heads.{name[3]}.weight": tensor for name, tensor in _heads().items()}
        self.network = Lpips()
        fill(self.network, {**fetch(URL, weights), **heads}, URL.rpartition("/")[2])

    def check(self, prompts: int, size: tuple[int, int]) -> None:
        """Raises SlimdiffError if pictures are too small."""
        if min(size) < LEAST:
            raise SlimdiffError(
                f"LPIPS needs pictures of at least {LEAST} px, not {size[0]} x {size[1]}. Raise --size, or leave it "
                "out of --metrics."
            )

    @torch.no_grad()
    def measure(self, dense: Pictures, slim: Pictures, prompts: Sequence[str], device: torch.device) -> Score:
        network = self.network.to(device)
        sides = zip(dense.batches("LPIPS, dense"), slim.batches("LPIPS, slim"), strict=True)
        found = torch.cat([network(a.to(device), b.to(device)).cpu() for a, b in sides])
        return Score("LPIPS", "slim against dense, AlexNet, lower is nearer", Estimate.mean(found))


def _heads() -> Mapping[str, Tensor]:
    """Weights of the linear layers, lin0.model.1.weight to lin4.model.1.weight, each (1, channels, 1, 1)."""
    need_torchmetrics()
    try:
        with as_file(files("torchmetrics") / HEADS) as path:
            heads: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SlimdiffError(
            f"The installed torchmetrics has no {HEADS}. Install the one slimdiff asks for: {HOW}"
        ) from error
    return heads
