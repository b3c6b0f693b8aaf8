"""Hooks that add what a UNet's groups see to their accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimdiff.gram import Gram
from slimdiff.groups import Group, Probe, probes
from slimdiff.patches import Patches
from slimdiff.timesteps import Clock


@contextmanager
def captured(
    unet: nn.Module,
    groups: Sequence[Group],
    grams: dict[str, Any],
    clock: Clock | None = None,
    guide: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """While inside, every forward pass of `unet` adds to `grams`, each a Gram or Patches, by the keys of
    `groups.probes`; new ones are made.

    `clock` tells at each forward pass how much its tokens count; without it all count alike. `guide` puts the halves of
    guidance together where guided tokens are wanted; without it there are plain ones only. Hooks sit on the groups' own
    modules only and are gone afterwards, whatever happens inside; the UNet is not changed.
    """
    handles = []
    try:
        for key, probe in _wanted(unet, groups, guide is not None).items():
            if key not in grams:
                grams[key] = _sums(probe, next(unet.parameters()).device)
            handles.append(_attach(probe, grams[key], clock or Clock([1.0]), guide if probe.guided else None))
        yield
    finally:
        for handle in handles:
            handle.remove()


def footprint(unet: nn.Module, groups: Sequence[Group], guided: bool = True) -> int:
    """Bytes of the sums that `captured` makes, on the UNet's device."""
    found = [_sums(probe, "meta") for probe in _wanted(unet, groups, guided).values()]
    return sum(tensor.nbytes for sums in found for tensor in vars(sums).values() if isinstance(tensor, Tensor))


def _wanted(unet: nn.Module, groups: Sequence[Group], guided: bool) -> dict[str, Probe]:
    return {probe.key: probe for group in groups for probe in probes(unet, group, guided)}


def _sums(probe: Probe, device: torch.device | str) -> Gram | Patches:
    return Patches(probe.width, device) if probe.patches else Gram(probe.width, probe.heads, device)


def _attach(
    probe: Probe, gram: Gram | Patches, clock: Clock, guide: Callable[[Tensor], Tensor] | None
) -> RemovableHandle:
    def add(x: Tensor) -> None:
        x = guide(x.detach()) if guide else x.detach()
        gram.add(x - x.mean(1, keepdim=True) if probe.centred else x, clock.weight(), clock.tenth())

    if probe.at == "input":
        return probe.module.register_forward_pre_hook(lambda module, args: add(args[0]))
    return probe.module.register_forward_hook(lambda module, args, output: add(output))
