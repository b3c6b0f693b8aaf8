"""Hooks that add what a UNet's groups see to their accumulators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimdiff.gram import Gram
from slimdiff.groups import Group, Probe, probes


@contextmanager
def captured(unet: nn.Module, groups: Sequence[Group], grams: dict[str, Gram]) -> Iterator[None]:
    """While inside, every forward pass of `unet` adds to `grams`, keyed `<group>:<statistic>`; missing ones are made.

    Hooks sit on the groups' own modules only and are gone afterwards, whatever happens inside; the UNet is not changed.
    """
    handles = []
    try:
        for group in groups:
            for probe in probes(unet, group):
                heads = group.heads if probe.per_head else 1
                width = group.width if group.kind != "vo" else group.width * group.heads
                key = f"{group.name}:{probe.statistic}"
                gram = grams.setdefault(key, Gram(width, heads, next(unet.parameters()).device))
                handles.append(_attach(probe, gram))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(probe: Probe, gram: Gram) -> RemovableHandle:
    def add(x: Tensor) -> None:
        x = x.detach()
        gram.add(x - x.mean(1, keepdim=True) if probe.centred else x)

    if probe.at == "input":
        return probe.module.register_forward_pre_hook(lambda module, args: add(args[0]))
    return probe.module.register_forward_hook(lambda module, args, output: add(output))
