"""The command line: the group of all commands. Each is a file of `commands/`."""

from __future__ import annotations

import click

from slimdiff import __version__
from slimdiff.commands.bench import bench
from slimdiff.commands.calibrate import calibrate
from slimdiff.commands.compare import compare
from slimdiff.commands.compress import compress
from slimdiff.commands.dense import dense
from slimdiff.commands.eval import evaluate
from slimdiff.commands.inspect import inspect
from slimdiff.commands.lora import lora
from slimdiff.commands.merge import merge
from slimdiff.commands.profile import profile
from slimdiff.commands.prompts import prompts
from slimdiff.commands.push import push


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Make a pretrained Stable Diffusion UNet smaller and faster, without gradients and without fine-tuning.

    \b
    slimdiff calibrate [MODEL]          watch the model paint: statistics of all prompts and timesteps
    slimdiff compress --budget 0.35     remove 35% of attention and feed-forward parameters in closed form
    slimdiff bench                      dense against slim: speed, memory, size, and how far the pictures moved

    These three, typed one after the other in any folder, pick up what the one before left in ./slimdiff-out.
    Without a MODEL they run on a miniature Stable Diffusion that comes with slimdiff. MODEL is a hub id (owner/name), a
    diffusers folder, or a .safetensors file, of Stable Diffusion 1.x, 2.x or SDXL.
    """


for _command in (calibrate, compress, bench, evaluate, profile, inspect, compare, lora, merge, prompts, dense, push):
    main.add_command(_command)
