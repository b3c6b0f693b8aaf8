"""`slimdiff dense`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, newest_slim


@click.command(short_help="Fill a slim checkpoint up to dense shapes.")
@click.argument("slim", required=False, type=PATH)
@click.option(
    "--single-file", is_flag=True, help="Write one file in the original layout, as A1111 and ComfyUI load it."
)
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote there.")
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write, or a .safetensors file.")
@command
def dense(slim: Path | None, single_file: bool, force: bool, output: Path) -> None:
    """Write a slim checkpoint in dense shapes, for programs that cannot load a slim one.

    SLIM is a folder of 'slimdiff compress'; without it the newest under ./slimdiff-out is taken. What was cut is filled
    with zeros: the pictures are those of the slim model, but nothing is smaller or faster than the dense model. The
    result is a plain diffusers folder or, with --single-file, one file under the original names, whose pictures can be
    judged wherever Stable Diffusion runs.
    """
    from slimdiff.dense import export, export_file

    slim = slim or newest_slim()
    (export_file if single_file else export)(slim, output, force)
    click.echo(f"{output}: {slim} in dense shapes")
