"""`slimdiff dense`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff import outputs
from slimdiff.commands.parameters import PATH, command, say


@click.command()
@click.argument("slim", required=False, type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@command
def dense(slim: Path | None, output: Path) -> None:
    """Write a slim checkpoint in dense shapes, for programs that cannot load a slim one.

    SLIM is a folder of 'slimdiff compress'; without it the newest under ./slimdiff-out is taken. What was cut is filled
    with zeros: the pictures are those of the slim model, but nothing is smaller or faster than the dense model. The
    result is a plain diffusers folder, whose pictures can be judged wherever Stable Diffusion runs.
    """
    from slimdiff.dense import export

    if slim is None:
        slim = outputs.newest_slim()
        say(f"slim checkpoint: {slim}")
    export(slim, output)
    click.echo(f"{output}: {slim} in dense shapes")
