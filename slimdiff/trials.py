"""ResNet groups behind a norm over fewer channels: what that norm does, measured on calibration states.

The group norm between the two convolutions of a block takes its mean and deviation from the channels that are there. No
sum over the dense block alone can say what they are once channels are gone. So the dense UNet runs over the calibration
states, and the blocks are tried at the widths in question, each on the dense block's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, unfold

from slimdiff.errors import StatisticsError
from slimdiff.groups import Group, inner_layers
from slimdiff.guidance import guided
from slimdiff.patches import Patches
from slimdiff.solve.resnet import Pictures, ResnetSolution, Trial
from slimdiff.solve.solution import Factors
from slimdiff.states import States
from slimdiff.surgery import truncated

Solutions = dict[Group, ResnetSolution]


def try_widths(
    unet: nn.Module,
    solutions: Solutions,
    widths: Mapping[Group, Sequence[int]],
    states: States,
    guidance_scale: float,
) -> Solutions:
    """The solutions, each fitted to trials at its `widths`. The dense `unet` runs over the states twice, and once only
    if the solutions have been through this before.

    Raises StatisticsError if there are no states.
    """
    if any(solution.pictures is None for solution in solutions.values()):
        solutions = _with_pictures(unet, solutions, states)
    return _with_trials(unet, solutions, widths, states, guidance_scale)


def _with_pictures(unet: nn.Module, solutions: Solutions, states: States) -> Solutions:
    """The solutions, knowing what the dense UNet's norms see."""
    found: dict[Group, tuple[list[Tensor], list[Tensor]]] = {group: ([], []) for group in solutions}

    def watch(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            pixels = args[0].double().flatten(2)
            for part, value in zip(found[group], (pixels, pixels.square()), strict=True):
                part.append(value.mean(2))

        return hook

    norms = {group: inner_layers(unet, group)[0] for group in solutions}
    with ExitStack() as hooks:
        for group, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(watch(group)).remove)
        _run(unet, states)
    seen = {group: [torch.cat(part) for part in parts] for group, parts in found.items()}
    return {
        group: replace(solution, pictures=Pictures(seen[group][0], seen[group][1], norms[group].eps))
        for group, solution in solutions.items()
    }


@dataclass
class _Sums:
    """Of a block tried at one width; `factors` have zeros for the second convolution."""

    factors: Factors
    patches: Patches
    products: Tensor
    mean: Tensor

    @staticmethod
    def of(factors: Factors, outputs: int) -> _Sums:
        (kept,) = factors.into
        zeros = torch.zeros(outputs, 9 * len(kept), dtype=torch.float64, device=kept.device)
        return _Sums(replace(factors, out=zeros), Patches(len(kept), kept.device), zeros.clone(), zeros[:, 0].clone())

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Pictures: what the cut convolution is given, (B, r, H, W), and what the dense one makes of its own, out of
        each pixel and of one row and column around, (B, C_out, H + 2, W + 2)."""
        self.patches.add(inputs)
        self.mean += outputs[:, :, 1:-1, 1:-1].sum((0, 2, 3))
        for picture, output in zip(inputs, outputs, strict=True):  # one at a time: unfolded, it is nine times as large
            self.products += output.flatten(1) @ unfold(picture[None], 3, padding=2)[0].mT

    def trial(self) -> Trial:
        count = self.patches.count
        return Trial(self.patches.moments(), self.products / count, self.mean / count)


@dataclass
class _Watch:
    """Runs a block again, cut to each width of `sums`, whenever it has run."""

    unet: nn.Module
    group: Group
    sums: dict[int, _Sums]
    guide: Callable[[Tensor], Tensor]
    seen: list[Tensor] = field(default_factory=list)

    def at_convolution(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(self.guide(args[0]))

    def at_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        _, convolution = inner_layers(self.unet, self.group)
        outputs = conv2d(self.seen.pop(), convolution.weight.float(), padding=2)
        for sums in self.sums.values():
            with truncated(self.unet, self.group, sums.factors):
                block.forward(*args, **kwargs)
            sums.add(self.seen.pop(), outputs)


def _with_trials(
    unet: nn.Module,
    solutions: Solutions,
    widths: Mapping[Group, Sequence[int]],
    states: States,
    guidance_scale: float,
) -> Solutions:
    """The solutions with trials, on inputs with the halves of guidance put together."""

    def guide(x: Tensor) -> Tensor:
        return guided(x, len(x) // states.halves, guidance_scale)

    watches = []
    with ExitStack() as hooks:
        for group, solution in solutions.items():
            convolution = inner_layers(unet, group)[1]
            sums = {r: _Sums.of(solution.unfitted(r), convolution.out_channels) for r in widths[group]}
            watch = _Watch(unet, group, sums, guide)
            hooks.callback(convolution.register_forward_pre_hook(watch.at_convolution).remove)
            block = unet.get_submodule(group.module)
            hooks.callback(block.register_forward_hook(watch.at_block, with_kwargs=True).remove)
            watches.append(watch)
        _run(unet, states)
    return {
        watch.group: solutions[watch.group].after({r: sums.trial() for r, sums in watch.sums.items()})
        for watch in watches
    }


@torch.no_grad()
def _run(unet: nn.Module, states: States) -> None:
    if not states.prompts:
        raise StatisticsError("The statistics hold no calibration states, which ResNet groups need; calibrate again.")
    parameter = next(unet.parameters())
    for _, arguments in states.batches(range(len(states.prompts)), parameter.device, parameter.dtype):
        unet(**arguments)
