"""Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500) between two sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimdiff.errors import SlimdiffError
from slimdiff.metrics import inception
from slimdiff.metrics.pictures import Pictures
from slimdiff.metrics.score import Estimate, Score
from slimdiff.metrics.weights import need_torchmetrics

USUAL = 30_000
"""Pictures that published figures are of."""


class FidMetric:
    """FID of both models' pictures to real ones, or without any of the slim model's pictures to the dense ones."""

    def __init__(self, weights: Path | None, num_features: int, real: Path | None) -> None:
        """`real` is a folder of pictures, `num_features` one of `inception.WIDTHS`.

        Raises SlimdiffError if torchmetrics is not installed, or weights cannot be had, from the folder `weights`,
        torch's cache or the net.
        """
        need_torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.real = real
        self.distance_of: Any = FrechetInceptionDistance
        self.network = inception.load(num_features, weights)

    def check(self, prompts: int, size: tuple[int, int]) -> None:
        """Raises SlimdiffError if there are too few pictures of either side."""
        if prompts < 2:
            raise SlimdiffError("FID compares distributions; give more than one prompt, or leave it out of --metrics.")
        if self.real is not None:
            Pictures.under(self.real, size, 1)

    @torch.no_grad()
    def measure(self, dense: Pictures, slim: Pictures, prompts: Sequence[str], device: torch.device) -> Score:
        width = self.network.num_features
        cautions = _cautions(len(dense.paths), width)
        layer = "" if width == inception.WIDTHS[-1] else f", {width} features"
        distance = self.distance_of(self.network, reset_real_features=False).to(device)
        if self.real is None:
            _add(distance, dense, "FID, dense", True)
            what = f"slim pictures to DENSE ones{layer}: not the FID of papers; lower is nearer"
            return Score("FID", what, Estimate(_to(distance, slim)), cautions=cautions)
        real = Pictures.under(self.real, dense.size, dense.batch)
        _add(distance, real, "FID, real", True)
        before, after = (_to(distance, side) for side in (dense, slim))
        what = f"to {len(real.paths)} real pictures{layer}, lower is better"
        return Score("FID", what, Estimate(after), Estimate(before), Estimate(after - before), cautions)


def _cautions(prompts: int, width: int) -> tuple[str, ...]:
    if width == inception.WIDTHS[-1] and prompts >= USUAL:
        return ()
    few = f", and {prompts} pictures do not even span its {width} dimensions" if prompts <= width else ""
    return (f"FID falls with the number of pictures{few}: compare figures of equally many only; papers take 30,000.",)


def _to(distance: Any, pictures: Pictures) -> float:
    """FID of pictures to the real ones, which stay. Of nearly equal sets rounding could take it below 0."""
    distance.reset()
    _add(distance, pictures, "FID, painted", False)
    if not (distance.real_features_sum + distance.fake_features_sum).isfinite().all():
        raise SlimdiffError(
            "Features of FID are not finite; the weight file of Inception is damaged. Download it anew."
        )
    return max(0.0, float(distance.compute()))


def _add(distance: Any, pictures: Pictures, what: str, real: bool) -> None:
    for batch in pictures.batches(what):
        distance.update(batch.to(distance.device), real=real)
