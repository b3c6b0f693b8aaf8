"""Hooks that add what a UNet's groups see to their accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimdiff.gram import Gram
from slimdiff.groups import Group, Probe, probes


def _one() -> float:
    return 1.0


@contextmanager
def captured(
    unet: nn.Module, groups: Sequence[Group], grams: dict[str, Gram], weight: Callable[[], float] = _one
) -> Iterator[None]:
    """While inside, every forward pass of `unet` adds to `grams`, by the keys of `groups.probes`; new ones are made.

    `weight` is asked at each forward pass how much its tokens count. Hooks sit on the groups' own modules only and are
    gone afterwards, whatever happens inside; the UNet is not changed.
    """
    handles = []
    try:
        for key, probe in {probe.key: probe for group in groups for probe in probes(unet, group)}.items():
            gram = grams.setdefault(key, Gram(probe.width, probe.heads, next(unet.parameters()).device))
            handles.append(_attach(probe, gram, weight))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(probe: Probe, gram: Gram, weight: Callable[[], float]) -> RemovableHandle:
    def add(x: Tensor) -> None:
        x = x.detach()
        gram.add(x - x.mean(1, keepdim=True) if probe.centred else x, weight())

    if probe.at == "input":
        return probe.module.register_forward_pre_hook(lambda module, args: add(args[0]))
    return probe.module.register_forward_hook(lambda module, args, output: add(output))
