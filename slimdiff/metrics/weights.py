"""The published weights of metric networks: downloaded once, kept in torch's cache, read as tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from slimdiff.errors import SlimdiffError

HOW = "pip install 'slimdiff[eval]'"


def need_torchmetrics() -> None:
    """Raises SlimdiffError if torchmetrics is not installed, or broken."""
    try:
        import torchmetrics  # noqa: F401
    except Exception as error:  # a torchvision that was built for another torch breaks it with a RuntimeError
        raise SlimdiffError(f"It needs torchmetrics, which cannot be imported ({error}): {HOW}") from error


def fetch(url: str, weights: Path | None) -> Mapping[str, Tensor]:
    """The state dict behind `url`, from the folder `weights` or downloaded to it; None is torch's own cache.

    A download is checked by the hash in its name. The file is a pickle, as published; torch's restricted loader takes
    nothing but tensors from it. Raises SlimdiffError if it cannot be had or holds anything else.
    """
    folder = weights or Path(torch.hub.get_dir(), "checkpoints")
    path = folder / url.rpartition("/")[2]
    there = path.exists()
    try:
        state: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, model_dir=str(folder), map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # of the network, the disk and the loader, which share no class
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if there:
            raise SlimdiffError(f"{path} does not hold plain weights ({said}). Replace it by {url}.") from error
        raise SlimdiffError(f"{url} cannot be downloaded ({said}). Get it elsewhere and put it at {path}.") from error
    return state


def fill(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give a network its weights, of which `state` may hold more. Raises SlimdiffError if some are missing or differ
    in shape."""
    wanted = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    for name, tensor in wanted.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != tuple(tensor.shape):
            raise SlimdiffError(
                f"The weights of {what} have {found} for {name}, not {tuple(tensor.shape)}: they are of another "
                "network. Replace the file."
            )
    network.load_state_dict({name: state[name] for name in wanted}, strict=False)
    network.eval().requires_grad_(False)
