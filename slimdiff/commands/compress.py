"""`slimdiff compress`: parse, call, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.commands.parameters import GROUPS, PATH, SHARES, Number, Whole, command, model_options, say
from slimdiff.options import INFLUENCES, METHODS, OFS, Of, share_of

FEW = 32
"""Prompts of a calibration below which compressing warns."""


@click.command(short_help="Remove a share of the UNet in closed form.")
@click.argument("statistics", required=False, type=PATH)
@click.option(
    "--budget",
    "budgets",
    type=SHARES,
    help="Share to remove, at least 0, below 1; several, as in 0.2,0.35,0.5, give a checkpoint each.  [default: 0.35]",
)
@click.option(
    "--budget-of",
    "of",
    type=click.Choice(OFS),
    help="Share of what: the groups' parameters, the whole UNet's, the groups' MACs, or the time of one UNet call on "
    "this device.  [default: groups]",
)
@click.option("--speedup", type=float, help="How many times as fast a UNet call shall be, in the place of a budget.")
@click.option(
    "--latency",
    type=PATH,
    help="Table of 'slimdiff profile', also of another device.  [default: latency.json beside the statistics, measured "
    "where it is missing or does not fit]",
)
@click.option(
    "--groups",
    "kinds",
    type=GROUPS,
    help="Kinds to cut: query-key, value-output, feed-forward; and resnet, the channels inside ResNet blocks, after "
    "'slimdiff calibrate --resnets'.  [default: qk,vo,ffn]",
)
@click.option("--independent-ranks", is_flag=True, help="Let query-key and value-output widths of one layer differ.")
@click.option(
    "--round-to",
    type=Whole(1),
    help="Step of head widths; feed-forward widths take eight times that.  [default: 8, finer in narrow layers]",
)
@click.option(
    "--min-width",
    type=Number(0, 1, min_open=True),
    default=0.125,
    help="Least share of its width that a group keeps.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="slimdiff",
    help="slimdiff's own solves, or a baseline to compare with; docs/quality.md says what each is.",
)
@click.option(
    "--influence",
    type=click.Choice(INFLUENCES),
    help="What decides the widths: errors weighed by what they do to the final latents or to the predicted noise "
    "(probed once, then cached), local errors as they are, the same share of every group, or the same share of every "
    "group's energy.  [default: sampler; each baseline's own]",
)
@click.option("--probe-prompts", type=Whole(1, 32), default=8, help="Prompts to probe with.")
@click.option("--probe-steps", type=Whole(1), default=7, help="Sampler steps of a probe.")
@click.option(
    "--refine/--no-refine",
    default=False,
    help="Refit output projections on calibration states; a layer keeps its refit if held-out states agree.",
)
@click.option(
    "--lora-maps",
    type=Whole(0),
    default=16,
    help="Rank of the maps in the checkpoint that make LoRAs of the dense model fit; 0 leaves them out.",
)
@click.option("--model", help="Dense model.  [default: the one the statistics were made from]")
@partial(
    model_options,
    dtype="Dtype to write, and to time layers in; auto writes that of the dense weights, and times in float16 on CUDA, "
    "float32 on the CPU.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, group by group, and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing slim checkpoint.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Slim checkpoint, or with several budgets the folder for their slim-<budget>.  [default: slim-<budget> beside "
    "the statistics]",
)
@command
def compress(
    statistics: Path | None,
    budgets: tuple[float, ...] | None,
    of: Of | None,
    speedup: float | None,
    latency: Path | None,
    model: str | None,
    device: str,
    dtype: str,
    variant: str | None,
    dry_run: bool,
    force: bool,
    output: Path | None,
    **choices: Any,
) -> None:
    """Remove a share of the UNet in closed form, and write a slim diffusers checkpoint.

    STATISTICS is the file of 'slimdiff calibrate'; without it the newest under ./slimdiff-out is taken. One budget is
    shared out over all layers by how much each one's error moves the final picture. The result loads in plain
    diffusers, also where slimdiff is not installed.
    """
    if speedup is not None and (budgets is not None or of not in (None, "latency")):
        raise click.UsageError("--speedup is a budget of its own, in time: leave --budget and --budget-of out.")
    if latency is not None and speedup is None and of != "latency":
        raise click.UsageError("--latency is for budgets in time: add --speedup 1.2, or --budget-of latency.")
    from slimdiff import checkpoint, pipeline, source
    from slimdiff.compress import Options, sweep
    from slimdiff.profile import tables
    from slimdiff.statistics import StatisticsFile

    if statistics is None:
        statistics = outputs.newest_statistics()
        say(f"statistics: {statistics}")
    file = StatisticsFile(statistics)
    if speedup is None:
        budgets = budgets or (0.35,)
        options = Options(budgets[0], of or "groups", **choices)
        amounts = [outputs.amount(budget, options.of) for budget in budgets]
    else:
        budgets = (share_of(speedup),)
        options = Options(budgets[0], "latency", **choices)
        amounts = [f"{speedup:g}x"]
    if file.done < FEW:
        say(
            f"warning: the statistics come from {file.done} prompts. Below {FEW} pictures drift clearly more (see How "
            "many prompts are enough in docs/quality.md): calibrate on more."
        )
    folders = outputs.slim_paths(statistics, amounts, options.method, output)
    for folder in () if dry_run else folders:
        checkpoint.check_output(folder, force)
    on = pipeline.device_of(device)
    dense = source.again(file.model, file.model_options, model, variant).with_loras(file.loras)
    stored = source.stored_dtype(dense)
    pipe = pipeline.load(dense, pipeline.working_dtype(stored, on))
    file.check_model(pipeline.fingerprint(pipe.unet), dense.reference)

    table = outputs.latency_path(statistics.parent)
    times = tables(pipe.to(on), file.recipe, table, pipeline.dtype_of(dtype, on), say, latency)
    written = stored if dtype == "auto" else pipeline.dtype_of(dtype, on)
    for folder, (slim, plan) in zip(folders, sweep(pipe, file, options, budgets, times), strict=True):
        click.echo(plan.table() if dry_run else "\n".join(plan.summary()))
        if not dry_run:
            checkpoint.write(
                folder, pipeline.cast(slim, written), pipe, plan.to_json(), dense.folder, dense.variant, force,
                bool(dense.loras), replaced=dense.options.keys() & {"vae"},
            )  # fmt: skip
            click.echo(f"{folder}: slim checkpoint, {checkpoint.size_in_bytes(folder) / 1e6:.1f} MB of UNet weights")
        if folder != folders[-1]:
            click.echo()
    if not dry_run:
        say("next: slimdiff bench" if len(folders) == 1 else "next: slimdiff bench of each, then slimdiff compare")
