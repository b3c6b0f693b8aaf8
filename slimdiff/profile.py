"""`slimdiff profile`: time every distinct layer of a UNet at a grid of widths, on the device at hand.

Layers are the real modules, made narrow as the slim UNet makes them, with random weights and tokens of the real shapes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from slimdiff.errors import SlimdiffError
from slimdiff.families import is_told_guidance
from slimdiff.groups import Group
from slimdiff.guidance import rows_per_prompt
from slimdiff.latency import Conditions, Curve, Shape, Table
from slimdiff.macs import meta_inputs
from slimdiff.options import Options
from slimdiff.pipeline import device_name
from slimdiff.recipe import Recipe
from slimdiff.report.wording import seconds
from slimdiff.slim_unet import SlimUNet2DConditionModel, narrow
from slimdiff.timing import in_turns, paired
from slimdiff.widths import Currency, allowed_widths

POINTS = 12
"""Widths at which a layer is timed whose kernels do not pad it; where they do, every width of its step is."""

PAIRS = 50
"""Times that a call of the dense UNet and of one with every layer at its narrowest are compared."""

NOTHING = 1e-6
"""Share of a UNet call that stands for no time saved at all."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def conditions_of(pipe: DiffusionPipeline, job: Recipe, prompts: int, dtype: torch.dtype) -> Conditions:
    """Of a pipeline where it is now, with UNet batches of so many prompts of a job."""
    device = pipe.unet.device
    return Conditions(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        height=job.height,
        width=job.width,
        rows=prompts * rows_per_prompt(job.guidance_scale, is_told_guidance(pipe.unet.config)),
        parameters=_parameters(pipe.unet),
    )


def profile(pipe: DiffusionPipeline, units: Sequence[Sequence[Group]], conditions: Conditions) -> Table:
    """Times of all distinct layers that hold these units of groups, and of a call of the UNet, on its device.

    Calls are timed in turns, so that what slows the machine down for a while bends no ratio. Where the UNet
    saves less with all layers at the narrowest that `compress` takes by default than they do alone, they are scaled to
    that; where it saves more, nothing is promised of it. Times are of eager mode, which on a fast GPU and with small
    batches is bound by launching kernels: there, no width saves any.
    """
    device, dtype = pipe.unet.device, getattr(torch, conditions.dtype)
    twin, arguments = _recorded(pipe, units, conditions)
    dense = pipe.unet if pipe.unet.dtype == dtype else copy.deepcopy(pipe.unet).to(dtype)
    least = {unit[0].name: allowed_widths(unit[0], Options(0))[-1] for unit in units}
    inputs = _real(((), _unet_inputs(pipe, conditions)), device, dtype)
    calls = [_call(dense, inputs)]
    widths: dict[Shape, list[int]] = {}
    known: dict[str, Shape] = {}
    for unit in units:
        layer, given = twin.get_submodule(unit[0].module), arguments[unit[0].module]
        shape = known[unit[0].name] = _shape(layer, unit, given)
        if shape not in widths:
            widths[shape] = _grid(unit[0], shape)
            real = _real(given, device, dtype)
            calls += [_call(_filled(_narrowed(layer, unit, w), device, dtype), real) for w in widths[shape]]
    call, *times = in_turns(calls, device=device, what="profile")
    left = iter(times)
    curves = {shape: Curve.smoothed(at, list(islice(left, len(at)))) for shape, at in widths.items()}
    alone = Table(conditions, call, 1.0, curves)
    saved = sum(alone.seconds(shape, shape.full) - alone.seconds(shape, least[name]) for name, shape in known.items())
    slim = _call(_filled(_narrow_unet(pipe, units, least), device, dtype), inputs)
    speedup = paired("profile", calls[0], slim, pairs=PAIRS, device=device).speedup.median
    within = max(1 - 1 / speedup, NOTHING) * call
    return replace(alone, scale=within / saved) if within < saved else alone


def cached(
    path: Path,
    pipe: DiffusionPipeline,
    units: Sequence[Sequence[Group]],
    conditions: Conditions,
    say: Callable[[str], None],
) -> Table:
    """The table at `path` if it is of these conditions and knows all shapes; else it is measured, and kept there.

    The batch is the table's own: who profiled another one wants it. Raises OutputError if it cannot be written.
    """
    if path.exists():
        try:
            table = Table.read(path)
            conditions = replace(conditions, rows=table.conditions.rows)
            wrong = table.conditions.differences(conditions)
            wrong += [f"no times of {shape}" for shape in table.missing(shapes(pipe, units, conditions).values())]
            if not wrong:
                return table
            reason = f"it has {wrong[0]}"
        except SlimdiffError as error:
            reason = str(error)
        say(f"{path} does not fit: {reason}. It is measured anew.")
    else:
        say(f"There is no {path} yet: how long layers take on this device is measured now.")
    table = profile(pipe, units, conditions)
    table.write(path)
    return table


def tables(
    pipe: DiffusionPipeline,
    job: Recipe,
    kept: Path,
    dtype: torch.dtype,
    say: Callable[[str], None],
    given: Path | None = None,
) -> Callable[[Sequence[Sequence[Group]]], Table]:
    """How a budget in time finds its table for the units that may be cut: the file `given`, else `cached` at `kept`."""

    def find(units: Sequence[Sequence[Group]]) -> Table:
        return Table.read(given) if given else cached(kept, pipe, units, conditions_of(pipe, job, 1, dtype), say)

    return find


def shapes(pipe: DiffusionPipeline, units: Sequence[Sequence[Group]], conditions: Conditions) -> dict[str, Shape]:
    """The shape of each unit's layer under these conditions, by the name of the unit's first group."""
    twin, arguments = _recorded(pipe, units, conditions)
    found = {}
    for unit in units:
        path = unit[0].module
        found[unit[0].name] = _shape(twin.get_submodule(path), unit, arguments[path])
    return found


def currency(pipe: DiffusionPipeline, units: Sequence[Sequence[Group]], table: Table) -> Currency:
    """Budgets in nanoseconds of one UNet call: a unit's cost is its layer's time at a width.

    Units of one layer that are cut apart (query-key and value-output with independent ranks) are timed with the other
    at full width and bear equal parts of the layer's time; what they save is added up.

    Raises SlimdiffError if the table does not know all shapes.
    """
    known = shapes(pipe, units, table.conditions)
    parameters = _parameters(pipe.unet)
    if parameters != table.conditions.parameters:
        raise SlimdiffError(
            f"The latency table is of a UNet with {table.conditions.parameters:,} parameters, and this one has "
            f"{parameters:,}. Run 'slimdiff profile' for this model."
        )
    if missing := table.missing(known.values()):
        raise SlimdiffError(
            f"The latency table has no times of {missing[0]}. Run 'slimdiff profile' with the --groups and "
            "--independent-ranks that you compress with."
        )
    sharing = Counter(unit[0].module for unit in units)

    def cost(unit: Sequence[Group], width: int) -> int:
        shape = known[unit[0].name]
        others = 1 - 1 / sharing[unit[0].module]
        return round(1e9 * (table.seconds(shape, width) - others * table.seconds(shape, shape.full)))

    return Currency(cost, round(1e9 * table.call), "UNet call's {}", lambda time: seconds(1e-9 * time))


def _recorded(
    pipe: DiffusionPipeline, units: Sequence[Sequence[Group]], conditions: Conditions
) -> tuple[nn.Module, dict[str, Arguments]]:
    """The dense UNet without weights, and what the layers of the units are called with: tensors on the meta device."""
    arguments: dict[str, Arguments] = {}

    def record(path: str) -> Callable[..., None]:
        return lambda layer, args, kwargs: arguments.update({path: (args, kwargs)})

    with torch.device("meta"), torch.no_grad():
        twin = UNet2DConditionModel.from_config(pipe.unet.config).eval()
        paths = {unit[0].module for unit in units}
        hooks = [twin.get_submodule(p).register_forward_pre_hook(record(p), with_kwargs=True) for p in paths]
        twin(**_unet_inputs(pipe, conditions))
    for hook in hooks:
        hook.remove()
    return twin, arguments


def _unet_inputs(pipe: DiffusionPipeline, conditions: Conditions) -> dict[str, Any]:
    size = conditions.height // pipe.vae_scale_factor, conditions.width // pipe.vae_scale_factor
    return meta_inputs(pipe.unet, size, pipe.tokenizer.model_max_length, conditions.rows)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(layer: nn.Module, unit: Sequence[Group], arguments: Arguments) -> Shape:
    return Shape(
        layer=type(layer).__name__,
        cut="+".join(group.kind for group in unit),
        heads=unit[0].heads,
        full=unit[0].width,
        parameters=_parameters(layer),
        inputs=tuple(tuple(x.shape) for x in tree_leaves(arguments) if isinstance(x, Tensor)),
    )


def _grid(group: Group, shape: Shape) -> list[int]:
    """The widths to time: all that `compress` may take with its usual steps, or POINTS of them, the widest first."""
    widths = allowed_widths(group, Options(0, min_width=1e-9))
    if shape.is_padded:
        return list(widths)
    return [widths[i] for i in np.unique(np.linspace(0, len(widths) - 1, POINTS).round().astype(int))]


def _narrow_unet(pipe: DiffusionPipeline, units: Sequence[Sequence[Group]], widths: Mapping[str, int]) -> nn.Module:
    """The slim UNet without weights, which projects the text at every call, as the dense one does.

    `widths` are by the name of a unit's first group.
    """
    ranks = {g.name: widths[unit[0].name] for unit in units for g in unit if widths[unit[0].name] < g.width}
    with torch.device("meta"):
        slim = SlimUNet2DConditionModel.from_config(pipe.unet.config, slim_ranks=ranks).eval()
    slim.reuse_text_projections(False)
    return slim


def _narrowed(layer: nn.Module, unit: Sequence[Group], width: int) -> nn.Module:
    """A copy of a layer without weights, as the slim UNet would have it."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    if width < unit[0].width:
        with torch.device("meta"):
            narrow(holder, {f"layer.{group.kind}": width for group in unit})
    return holder["layer"]


def _filled(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    layer = layer.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(std=0.02)
    return layer


def _real(arguments: Arguments, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Random tensors in the place of those without contents."""
    return tree_map_only(Tensor, lambda x: torch.randn(x.shape, device=device, dtype=dtype), arguments)


def _call(module: nn.Module, arguments: Arguments) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            module(*arguments[0], **arguments[1])

    return call
