"""Hooks that add what a UNet's groups see to their accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimdiff.gram import Gram
from slimdiff.groups import Group, Probe, probes
from slimdiff.timesteps import Clock


@contextmanager
def captured(
    unet: nn.Module,
    groups: Sequence[Group],
    grams: dict[str, Gram],
    clock: Clock | None = None,
    guide: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """While inside, every forward pass of `unet` adds to `grams`, by the keys of `groups.probes`; new ones are made.

    `clock` tells at each forward pass how much its tokens count; without it all count alike. `guide` puts the halves of
    guidance together where guided tokens are wanted; without it there are plain ones only. Hooks sit on the groups' own
    modules only and are gone afterwards, whatever happens inside; the UNet is not changed.
    """
    handles = []
    try:
        wanted = [probe for group in groups for probe in probes(unet, group, guide is not None)]
        for key, probe in {probe.key: probe for probe in wanted}.items():
            gram = grams.setdefault(key, Gram(probe.width, probe.heads, next(unet.parameters()).device))
            handles.append(_attach(probe, gram, clock or Clock([1.0]), guide if probe.guided else None))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(probe: Probe, gram: Gram, clock: Clock, guide: Callable[[Tensor], Tensor] | None) -> RemovableHandle:
    def add(x: Tensor) -> None:
        x = guide(x.detach()) if guide else x.detach()
        gram.add(x - x.mean(1, keepdim=True) if probe.centred else x, clock.weight(), clock.tenth())

    if probe.at == "input":
        return probe.module.register_forward_pre_hook(lambda module, args: add(args[0]))
    return probe.module.register_forward_hook(lambda module, args, output: add(output))
