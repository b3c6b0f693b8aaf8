"""`slimdiff profile`: parse, call, print."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from slimdiff import outputs
from slimdiff.commands.parameters import GROUPS, PATH, Whole, command, model_options, say, size_options


@click.command(short_help="Time layers at many widths, for budgets in time.")
@click.argument("model", required=False)
@size_options
@click.option(
    "--batch-size",
    type=Whole(1),
    default=1,
    help="Pictures at once; guidance runs the UNet on twice as many rows.",
)
@click.option(
    "--groups",
    "kinds",
    type=GROUPS,
    default="qk,vo,ffn",
    help="Kinds to cut: query-key, value-output, feed-forward; and resnet, the channels inside ResNet blocks.",
)
@click.option("--independent-ranks", is_flag=True, help="Time query-key and value-output widths apart.")
@model_options
@click.option("--config", help="Diffusers folder or hub id that gives a single file its configs.  [default: the hub's]")
@click.option("-o", "--output", type=PATH, help="Latency table.  [default: slimdiff-out/<model>/latency.json]")
@command
def profile(
    model: str | None,
    height: int | None,
    width: int | None,
    batch_size: int,
    kinds: tuple[str, ...],
    independent_ranks: bool,
    device: str,
    dtype: str,
    variant: str | None,
    config: str | None,
    output: Path | None,
) -> None:
    """Time the layers of MODEL at many widths on this device, for budgets in time.

    'slimdiff compress --speedup' does this by itself where no table lies beside the statistics. Run it to choose the
    batch size, or on another machine than the one that compresses, and give the table to 'compress --latency'.
    """
    from slimdiff import pipeline, recipe, source
    from slimdiff.files import check_file
    from slimdiff.groups import find_groups
    from slimdiff.options import Options
    from slimdiff.profile import conditions_of
    from slimdiff.profile import profile as run
    from slimdiff.report.wording import seconds
    from slimdiff.widths import units

    on = pipeline.device_of(device)
    in_dtype = pipeline.dtype_of(dtype, on)
    dense = source.find(model, variant=variant, config=config)
    usual = outputs.latency_path(outputs.statistics_path(dense.name).parent)
    output = output or usual
    check_file(output)
    pipe = pipeline.load(dense, in_dtype).to(on)
    job = recipe.family_recipe(
        pipeline.family(pipe, dense), pipeline.native_size(pipe), num_prompts=1, height=height, width=width
    )
    conditions = conditions_of(pipe, job, batch_size, in_dtype)
    say(
        f"model: {dense.reference}   device: {conditions.device}   dtype: {conditions.dtype}   "
        f"{job.width}x{job.height} px, {conditions.rows} rows"
    )
    together = units(find_groups(pipe.unet, kinds=kinds), Options(0, independent_ranks=independent_ranks))
    table = run(pipe, together, conditions)
    table.write(output)
    points = sum(len(curve.widths) for curve in table.curves.values())
    click.echo(f"{output}: {len(table.curves)} distinct layers at {points} widths, UNet call {seconds(table.call)}")
    given = "" if output.resolve() == usual.resolve() else f" --latency {shlex.quote(str(output))}"
    say(f"next: slimdiff compress --speedup 1.2{given}")
