"""`slimdiff merge`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, say


@click.command(short_help="Add up the parts of a calibration.")
@click.argument("parts", type=PATH, nargs=-1, required=True, metavar="PART...")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("-o", "--output", type=PATH, help="The whole.  [default: statistics.safetensors beside the first part]")
@command
def merge(parts: tuple[Path, ...], force: bool, output: Path | None) -> None:
    """Add up the parts of a calibration that was shared out with 'calibrate --shard'.

    What is written is what one calibration over all prompts would have written, up to rounding. All parts are needed,
    in any order; the parts stay.
    """
    from slimdiff.merge import merge as run

    output = output or parts[0].with_name("statistics.safetensors")
    click.echo(f"{output}: {run(parts, output, force=force)}")
    say("next: slimdiff compress --budget 0.35")
