"""`slimdiff lora`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, newest_slim


@click.command(short_help="Convert a LoRA of the dense model for the slim one.")
@click.argument("lora", type=PATH)
@click.option("--model", "slim", type=PATH, help="Slim checkpoint.  [default: the newest under ./slimdiff-out]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("-o", "--output", type=PATH, required=True, help="The converted LoRA, a .safetensors file.")
@command
def lora(lora: Path, slim: Path | None, force: bool, output: Path) -> None:
    """Convert LORA, trained on the dense model, into one of the slim model.

    The slim model's own load_lora_weights does the same while it loads a LoRA; the file is for tools that load weights
    in other ways. LORA is a .safetensors file in the format of diffusers, peft or kohya.
    """
    from slimdiff import checkpoint
    from slimdiff.lora import convert

    slim = slim or newest_slim()
    convert(lora, checkpoint.load_unet(slim), output, force)
    click.echo(f"{output}: LoRA for {slim}")
