"""Refitting layers of the slim UNet on what they really see, still in closed form.

Errors pile up through depth: a layer that was cut in isolation is fed by layers that were cut too. With the dense and
the slim UNet side by side on the same calibration states, a layer is fitted anew by least squares on the slim model's
own inputs. `refit_output` does so for the UNet's last convolution, whose target is the dense guided prediction.
`refine` walks the output projections in the order of the data; the target of each is what the dense layer produced,
plus a share of the drift that has gathered in the residual stream before it. On few states such a fit can do harm, so
two thirds of the prompts fit and the others judge: the share, and the pull towards the present weights, are chosen on
them, and a layer keeps its refit only if it lowers the error there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.groups import Group, output_layer, residual_norm
from slimdiff.guidance import guided
from slimdiff.states import States

PULLS = (0.003, 0.03, 0.3, 3.0)
"""Strengths of the pull towards the present weights, relative to the inputs' mean energy."""

SHARES = (0.0, 0.5, 1.0)
"""Shares of the residual drift that a layer is asked to make good."""


@dataclass(frozen=True)
class Refit:
    """What became of a group or layer: held-out error behind it, after over before (1: nothing was kept)."""

    name: str
    ratio: float


@dataclass
class _Sums:
    """Over tokens: x, (d + 1,), is the slim input and a constant 1; y, (C,), the dense output; e, (C,), the drift."""

    xx: Tensor  # (d + 1, d + 1)
    yx: Tensor  # (C, d + 1)
    ex: Tensor  # (C, d + 1)
    energy: Tensor  # Σ |y + e|²

    @staticmethod
    def of(d: int, channels: int, device: torch.device) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return _Sums(zeros(d + 1, d + 1), zeros(channels, d + 1), zeros(channels, d + 1), zeros())

    def add(self, x: Tensor, y: Tensor, drift: Tensor) -> None:
        """Rows of tokens: (n, d), (n, C) and (n, C)."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.xx += x.mT @ x
        self.yx += y.mT @ x
        self.ex += drift.mT @ x
        self.energy += (y + drift).square().sum()

    def error(self, weight: Tensor) -> float:
        """Σ |W x - y - e|²: how far the stream behind the layer is from the dense one; `weight` is (C, d + 1)."""
        return float(((weight @ self.xx - 2 * (self.yx + self.ex)) * weight).sum() + self.energy)

    def fit(self, present: Tensor, share: float, pull: float) -> Tensor:
        """The least-squares weight, (C, d + 1), for the target y + share * e, pulled towards the present one."""
        ridge = torch.full_like(self.xx[0], pull * float(self.xx.diagonal()[:-1].mean()))
        ridge[-1] = 0
        target = self.yx + share * self.ex + present * ridge
        return torch.linalg.solve(self.xx + torch.diag(ridge), target, left=False)


def _refit(layer: nn.Linear | nn.Conv2d, shares: Sequence[float], fitting: _Sums, judging: _Sums) -> float:
    """Give a layer the weights of least error on `judging`, its present ones among them; error after over before."""
    assert layer.bias is not None
    present = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).double()
    best = min((present, *(fitting.fit(present, share, pull) for share in shares for pull in PULLS)), key=judging.error)
    if best is present:
        return 1.0
    # New parameters: the slim UNet shares those that were not cut with the dense one.
    layer.weight = nn.Parameter(best[:, :-1].to(layer.weight).view_as(layer.weight), requires_grad=False)
    layer.bias = nn.Parameter(best[:, -1].to(layer.bias), requires_grad=False)
    return judging.error(best) / judging.error(present)


def _parts(states: States) -> list[list[int]]:
    """The states that fit, and those that judge."""
    judges = set(sorted(set(states.prompts))[2::3])
    return [[i for i, prompt in enumerate(states.prompts) if (prompt in judges) == held] for held in (False, True)]


@torch.no_grad()
def refit_output(dense: nn.Module, slim: nn.Module, states: States, guidance_scale: float) -> Refit:
    """Refit, in place, the last convolution of the slim UNet, `conv_out`, for the dense UNet's guided predictions.

    Without prompts to judge by, it stays as it is. Both UNets are on one device and in one dtype.
    """
    layer: Any = slim.conv_out
    fitting, judging = (_predictions(dense, slim, states, part, guidance_scale) for part in _parts(states))
    return Refit("conv_out", _refit(layer, (0.0,), fitting, judging) if judging.energy else 1.0)


def _predictions(
    dense: nn.Module, slim: nn.Module, states: States, chosen: Sequence[int], guidance_scale: float
) -> _Sums:
    """x is the slim model's guided input of `conv_out` under the kernel, y the dense guided prediction."""
    layer: Any = slim.conv_out
    sums = _Sums.of(layer.weight[0].numel(), layer.out_channels, layer.weight.device)
    for count, arguments in states.batches(chosen, layer.weight.device, layer.weight.dtype):
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        try:
            slim(**arguments)
        finally:
            hook.remove()
        inputs, wanted = (guided(x, count, guidance_scale) for x in (seen[0], dense(**arguments)[0]))
        for image, prediction in zip(inputs, wanted, strict=True):  # one at a time: unfolded, it is nine times as large
            patches = nn.functional.unfold(image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            y = prediction.flatten(1).T.double()
            sums.add(patches[0].T.double(), y, torch.zeros_like(y))
    return sums


@torch.no_grad()
def refine(
    dense: nn.Module, slim: nn.Module, groups: Sequence[Group], states: States, guidance_scale: float
) -> list[Refit]:
    """Refit, in place, the output projection of every value-output and feed-forward group among `groups`.

    `groups` are in the order of the data. Both UNets are on one device and in one dtype. Layers without bias are left.
    """
    parts, refits = _parts(states), []
    for group in tqdm([g for g in groups if g.kind != "qk"], unit="layer", disable=None, desc="refine"):
        layer = output_layer(slim, group)
        if layer.bias is None:
            continue
        fitting, judging = (_sums(dense, slim, group, states, part, guidance_scale) for part in parts)
        refits.append(Refit(group.name, _refit(layer, SHARES, fitting, judging)))
    return refits


class _Reached(Exception):
    """Ends a forward pass once the layer in question has run."""


def _sums(
    dense: nn.Module, slim: nn.Module, group: Group, states: States, chosen: Sequence[int], guidance_scale: float
) -> _Sums:
    layer = output_layer(slim, group)
    sums = _Sums.of(layer.in_features, layer.out_features, layer.weight.device)
    for count, arguments in states.batches(chosen, layer.weight.device, layer.weight.dtype):
        rows = partial(_rows, states=count, guidance_scale=guidance_scale)
        _, y, stream = map(rows, _run_to(dense, group, arguments))
        x, _, slim_stream = map(rows, _run_to(slim, group, arguments))
        sums.add(x, y, stream - slim_stream)
    return sums


def _rows(x: Tensor, states: int, guidance_scale: float) -> Tensor:
    """Tokens with the halves of guidance put together, and the halves: (2 states, n, d) -> (3 states n, d), float64."""
    return torch.cat([guided(x, states, guidance_scale), x.float()]).flatten(0, -2).double()


def _run_to(unet: nn.Module, group: Group, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Run up to a group's output projection: its input, its output, and the residual stream before its layer.

    All are tokens, (samples, n, d).
    """
    seen: dict[str, Tensor] = {}

    def at_stream(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["stream"] = args[0]

    def at_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = args[0], output
        raise _Reached

    with ExitStack() as hooks:
        hooks.callback(residual_norm(unet, group).register_forward_pre_hook(at_stream).remove)
        hooks.callback(output_layer(unet, group).register_forward_hook(at_output).remove)
        with suppress(_Reached):
            unet(**arguments)
    return seen["x"], seen["y"], seen["stream"]
