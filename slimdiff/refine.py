"""Refitting the slim UNet's output projections on what they really see, layer by layer, still in closed form.

Errors pile up through depth: a layer that was cut in isolation is fed by layers that were cut too. Walking the layers
in the order of the data, with the dense and the slim UNet side by side on the same calibration states, each output
projection is fitted anew by least squares on the slim model's own inputs. Its target is what the dense layer produced,
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

PULLS = (0.003, 0.03, 0.3)
"""Strengths of the pull towards the present weights, relative to the inputs' mean energy."""

SHARES = (0.0, 0.5, 1.0)
"""Shares of the residual drift that a layer is asked to make good."""

BATCH = 16
"""States at once."""


@dataclass(frozen=True)
class Refit:
    """What became of one layer: held-out error of the stream behind it, after over before (1: nothing was kept)."""

    group: str
    ratio: float


@dataclass
class _Sums:
    """Over tokens: x, (d + 1,), is the slim input and a constant 1; y, (C,), the dense output; e, (C,), the drift."""

    xx: Tensor  # (d + 1, d + 1)
    yx: Tensor  # (C, d + 1)
    ex: Tensor  # (C, d + 1)
    energy: Tensor  # Σ |y + e|²

    def error(self, weight: Tensor) -> float:
        """Σ |W x - y - e|²: how far the stream behind the layer is from the dense one; `weight` is (C, d + 1)."""
        return float(((weight @ self.xx - 2 * (self.yx + self.ex)) * weight).sum() + self.energy)

    def fit(self, present: Tensor, share: float, pull: float) -> Tensor:
        """The least-squares weight, (C, d + 1), for the target y + share * e, pulled towards the present one."""
        ridge = torch.full_like(self.xx[0], pull * float(self.xx.diagonal()[:-1].mean()))
        ridge[-1] = 0
        target = self.yx + share * self.ex + present * ridge
        return torch.linalg.solve(self.xx + torch.diag(ridge), target, left=False)


@torch.no_grad()
def refine(
    dense: nn.Module, slim: nn.Module, groups: Sequence[Group], states: States, guidance_scale: float
) -> list[Refit]:
    """Refit, in place, the output projection of every value-output and feed-forward group among `groups`.

    `groups` are in the order of the data. Both UNets are on one device and in one dtype. Layers without bias are left.
    """
    prompts = sorted(set(states.prompts))
    judges = set(prompts[2::3])
    parts = [[i for i, prompt in enumerate(states.prompts) if (prompt in judges) == held] for held in (False, True)]
    refits = []
    for group in tqdm([g for g in groups if g.kind != "qk"], unit="layer", disable=None, desc="refine"):
        layer = output_layer(slim, group)
        if layer.bias is None:
            continue
        fitting, judging = (_sums(dense, slim, group, states, part, guidance_scale) for part in parts)
        present = torch.cat([layer.weight, layer.bias[:, None]], 1).double()
        candidates = [fitting.fit(present, share, pull) for share in SHARES for pull in PULLS]
        best = min([present, *candidates], key=judging.error)
        refits.append(Refit(group.name, judging.error(best) / judging.error(present) if best is not present else 1.0))
        layer.weight.copy_(best[:, :-1])
        layer.bias.copy_(best[:, -1])
    return refits


class _Reached(Exception):
    """Ends a forward pass once the layer in question has run."""


def _sums(
    dense: nn.Module, slim: nn.Module, group: Group, states: States, chosen: Sequence[int], guidance_scale: float
) -> _Sums:
    d, channels = output_layer(slim, group).in_features + 1, output_layer(slim, group).out_features
    options: dict[str, Any] = {"dtype": torch.float64, "device": next(slim.parameters()).device}
    sums = _Sums(
        torch.zeros(d, d, **options), torch.zeros(channels, d, **options), torch.zeros(channels, d, **options),
        torch.zeros((), **options),
    )  # fmt: skip
    for start in range(0, len(chosen), BATCH):
        parameter = next(slim.parameters())
        part = list(chosen[start : start + BATCH])
        arguments = states.batch(part, parameter.device, parameter.dtype)
        rows = partial(_guided_rows, states=len(part), guidance_scale=guidance_scale)
        _, y, stream = map(rows, _run_to(dense, group, arguments))
        x, _, slim_stream = map(rows, _run_to(slim, group, arguments))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        drift = stream - slim_stream
        sums.xx += x.mT @ x
        sums.yx += y.mT @ x
        sums.ex += drift.mT @ x
        sums.energy += (y + drift).square().sum()
    return sums


def _guided_rows(x: Tensor, states: int, guidance_scale: float) -> Tensor:
    """Tokens with the halves of guidance put together, (2 states, n, d) -> (states n, d), float64."""
    return guided(x, states, guidance_scale).flatten(0, -2).double()


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
