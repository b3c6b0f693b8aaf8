"""`slimdiff calibrate`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.commands.parameters import LORA, PATH, command, model_options, picture_options, say
from slimdiff.recipe import SCHEDULERS


@click.command()
@click.argument("model", required=False)
@picture_options
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), help="Sampler.  [default: the checkpoint's own]")
@click.option("--seed", default=0, help="Prompt i starts from the noise of seed + i.")
@click.option("--batch-size", default="auto", help="Prompts at once; changes speed, not results.")
@model_options
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--config", help="Diffusers folder or hub id that gives a single file its configs.  [default: the hub's]")
@click.option("--vae", help="VAE in the place of the model's own: a .safetensors file, a folder or a hub id.")
@click.option("--lora", "loras", type=LORA, multiple=True, help="Merge FILE[:SCALE] first; may be repeated.")
@click.option("--resume/--no-resume", default=True, help="Go on from an unfinished run of this job.")
@click.option("--baselines", is_flag=True, help="Also sum what every other 'compress --method' but svd needs.")
@click.option("--resnets", is_flag=True, help="Also sum what 'compress --groups qk,vo,ffn,resnet' needs.")
@click.option("--force", is_flag=True, help="Replace a statistics file of another calibration.")
@click.option("-o", "--output", type=PATH, help="Statistics.  [default: slimdiff-out/<model>/statistics.safetensors]")
@command
def calibrate(
    model: str | None,
    prompts: Path | None,
    column: str,
    num_prompts: int | None,
    batch_size: str,
    device: str,
    dtype: str,
    variant: str | None,
    revision: str | None,
    config: str | None,
    vae: str | None,
    loras: tuple[tuple[str, float], ...],
    resume: bool,
    force: bool,
    output: Path | None,
    **changes: Any,
) -> None:
    """Run MODEL over about 500 prompts and ALL their timesteps, and save what compression needs to know.

    With --lora, 'compress' and 'bench' merge the same LoRAs. Ctrl-C saves; the same command goes on from there. The
    miniature takes minutes on a CPU; a full-size model wants a GPU and takes as long as painting 500 pictures.
    """
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise click.BadParameter(f"'{batch_size}' is neither auto nor a positive number.", param_hint="--batch-size")
    from slimdiff import pipeline, recipe, source
    from slimdiff.calibrate import calibrate as run

    chosen = None if prompts is None else recipe.read_prompts(prompts, column)
    on = pipeline.device_of(device)
    dense = source.find(model, variant=variant, revision=revision, config=config, vae=vae).with_loras(loras)
    output = output or outputs.statistics_path(dense.name)
    say(f"model: {dense.reference}   device: {on}   output: {output}")
    pipe = pipeline.load(dense, pipeline.dtype_of(dtype, on)).to(on)
    family, size = pipeline.family(pipe, dense), pipeline.native_size(pipe)
    job = recipe.family_recipe(family, size, prompts=chosen, num_prompts=num_prompts, **changes)
    say(
        f"recipe: {len(job.prompts)} prompts x {job.steps} steps, guidance {job.guidance_scale:g}, "
        f"{job.width}x{job.height} px, family {job.family}"
    )
    batch = None if batch_size == "auto" else int(batch_size)
    done = run(pipe, dense, job, output, batch_size=batch, resume=resume, force=force)
    click.echo(f"{output}: {done}")
    say("next: slimdiff compress --budget 0.35")
