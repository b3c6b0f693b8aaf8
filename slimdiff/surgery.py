"""Plan and factors -> weights: a group's own at some width, or the whole slim UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from slimdiff.groups import Group, by_name, names
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.solve.solution import Curve, Factors, Refitted, Solution

TINY = 1e-12
"""Keeps the quotient of two vanishing norms finite."""


def slim_weights(unet: nn.Module, group: Group, factors: Factors, padded: bool = False) -> dict[str, Tensor]:
    """A group's weights at the factors' width, by state-dict name, in the UNet's dtype.

    `padded` keeps the dense shapes, zeros where the cut was: the same function, for the dense UNet. Without it the
    queries carry `√(r / d_h)`, so that the stock softmax scale `1/√r` of a head of width r is right. The weights of a
    ResNet block are narrow in any case: zeros would count in its norm, and the dense block runs with narrow ones.
    """
    where, state = names(unet, group), unet.state_dict()
    weights: dict[str, Tensor] = {}
    for i, pair in enumerate(where.into):
        for name in filter(None, pair):
            if group.kind == "ffn":
                weights[name] = state[name] if padded else _kept_rows(state[name], factors.into[0], group.width)
            elif group.kind == "resnet":
                weights[name] = _kept_rows(state[name], factors.into[0], group.heads * group.width)
            elif group.kind == "heads":
                weights[name] = _rows_of_heads(state[name], factors.into[0], group.heads, padded)
            else:
                weights[name] = _mapped_rows(state[name], factors.into[i], group, padded)
    if group.kind == "qk" and not padded:
        for name in filter(None, where.into[0]):
            weights[name] = weights[name] * (factors.into[0].shape[1] / group.width) ** 0.5
    if where.norm is not None:
        kept = factors.into[0]
        scale, shift = (state[name][kept].double() for name in where.norm)
        if factors.norm is not None:
            scale, shift = scale * factors.norm[0], shift + scale * factors.norm[1]
        weights |= dict(zip(where.norm, (scale, shift), strict=True))
    if where.out is not None and factors.out is not None:
        weight, bias = where.out
        if group.kind == "linear" and not padded:
            weights[weight], weights[weight.removesuffix("weight") + "inner.weight"] = factors.out, factors.into[0]
        elif group.kind == "resnet":
            weights[weight] = factors.out.unflatten(1, (-1, *state[weight].shape[2:]))
        else:
            weights[weight] = _padded_columns(factors, group) if padded else factors.out
        if bias is not None and factors.bias is not None:
            weights[bias] = state[bias].double() + factors.bias
    dtype = next(unet.parameters()).dtype
    return {name: value.to(dtype).contiguous() for name, value in weights.items()}


def _mapped_rows(dense: Tensor, map_: Tensor, group: Group, padded: bool) -> Tensor:
    """`map_`, (h, r, d_h), on the rows of every head of `dense`, (h d_h, ...)."""
    rows = map_ @ dense.double().reshape(group.heads, group.width, -1)
    if padded:
        rows = nn.functional.pad(rows, (0, 0, 0, group.width - rows.shape[1]))
    return rows.reshape(-1, *dense.shape[1:])


def _kept_rows(dense: Tensor, kept: Tensor, width: int) -> Tensor:
    """The kept rows of each of the parts of `dense`, (parts * width, ...), such as the values and gates of a GEGLU."""
    return dense.unflatten(0, (-1, width))[:, kept].flatten(0, 1)


def _rows_of_heads(dense: Tensor, kept: Tensor, heads: int, padded: bool) -> Tensor:
    """The rows of the kept heads of `dense`, (h d_h, ...)."""
    return dense if padded else dense.unflatten(0, (heads, -1))[kept].flatten(0, 1)


def _padded_columns(factors: Factors, group: Group) -> Tensor:
    """The outgoing weight in its dense shape: zeros for what is no longer there."""
    out = factors.out
    assert out is not None
    if group.kind == "linear":
        return out @ factors.into[0]
    if group.kind == "vo":
        by_head = out.unflatten(1, (group.heads, -1))
        return nn.functional.pad(by_head, (0, group.width - by_head.shape[2])).flatten(1)
    by_unit = out.unflatten(1, (len(factors.into[0]), -1))
    full = out.new_zeros(out.shape[0], group.width, by_unit.shape[2])
    full[:, factors.into[0]] = by_unit
    return full.flatten(1)


@contextmanager
def truncated(unet: nn.Module, group: Group, factors: Factors) -> Iterator[None]:
    """While inside, the dense `unet` computes as if `group` were cut; afterwards its weights are back."""
    parameters = dict(unet.named_parameters())
    replaced = slim_weights(unet, group, factors, padded=True)
    before = {name: parameters[name].data for name in replaced}
    try:
        for name, value in replaced.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def adapter_maps(
    group: Group, solution: Solution, width: int, into: tuple[Tensor, ...], rank: int
) -> dict[str, Tensor]:
    """What `SlimUNet2DConditionModel` needs to make adapters of the dense model fit a cut group, by buffer name.

    `into` are the maps of the solution's factors at this width.
    """
    if group.kind == "qk":
        scale = (width / group.width) ** 0.5
        maps = {"q": scale * into[0], "k": into[1]}
    else:
        assert isinstance(solution, Refitted)
        left, right = solution.dropped(width, rank)
        balance = ((right.norm(dim=1) + TINY) / (left.norm(dim=0) + TINY)).sqrt()
        maps = {"v" if group.kind == "vo" else "kept": into[0]}
        maps |= {"left": left * balance, "right": right / balance[:, None]}
    return {f"{group.module}.slim_{name}": map_ for name, map_ in maps.items()}


def build(
    unet: UNet2DConditionModel, ranks: Mapping[str, int], solutions: Mapping[str, Solution], maps: int = 0
) -> SlimUNet2DConditionModel:
    """The slim UNet. Groups that `ranks` does not name, or names at full width, keep their weights bit for bit.

    Weights that do not change are shared with `unet`. `maps` is the rank of the maps for adapters of the dense model;
    with 0 there are none. Convolutions get none in any case.
    """
    groups = by_name(unet)
    cut = {name: rank for name, rank in ranks.items() if rank < groups[name].width}
    with torch.device("meta"):
        slim = SlimUNet2DConditionModel.from_config(unet.config, slim_ranks=cut, slim_maps=maps if cut else 0)
    state = dict(unet.state_dict())
    for name, rank in cut.items():
        found = solutions[name]
        solution = found.solve() if isinstance(found, Curve) else found
        factors = solution.at(rank)
        state |= slim_weights(unet, groups[name], factors)
        if maps and groups[name].kind != "resnet":
            buffers = adapter_maps(groups[name], solution, rank, factors.into, maps)
            state |= {key: map_.to(unet.dtype) if map_.is_floating_point() else map_ for key, map_ in buffers.items()}
    slim.load_state_dict(state, strict=True, assign=True)
    return slim.requires_grad_(False).eval()
