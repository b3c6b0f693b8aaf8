"""`slimdiff calibrate`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.commands.parameters import LORA, PATH, SHARD, command, model_options, picture_options, say
from slimdiff.recipe import SCHEDULERS


@click.command(short_help="Watch the model paint: statistics for compression.")
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
@click.option("--shard", type=SHARD, help="Only this part of the prompts, as in 3/16; 'slimdiff merge' adds up all.")
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
    shard: tuple[int, int] | None,
    force: bool,
    output: Path | None,
    **changes: Any,
) -> None:
    """Run MODEL over about 500 prompts and ALL their timesteps, and save what compression needs to know.

    With --lora, 'compress' and 'bench' merge the same LoRAs. Ctrl-C saves; the same command goes on from there. The
    miniature takes minutes on a CPU; a full-size model wants a GPU and takes as long as painting 500 pictures.

    Several GPUs share the prompts: 'accelerate launch -m slimdiff calibrate ...' (or torchrun). Machines that do not
    see each other run a --shard each.
    """
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise click.BadParameter(f"'{batch_size}' is neither auto nor a positive number.", param_hint="--batch-size")
    from slimdiff import files, pipeline, ranks, recipe, source
    from slimdiff.calibrate import collect

    with ranks.launched() as here:
        if shard and here.world > 1:
            raise click.UsageError(f"{here.world} processes share the prompts by themselves; leave out --shard.")
        chosen = None if prompts is None else recipe.read_prompts(prompts, column)
        on = here.device(device)
        dense = source.find(model, variant=variant, revision=revision, config=config, vae=vae).with_loras(loras)
        if output is None:
            output = outputs.statistics_path(dense.name)
            output = outputs.part_path(output, *shard) if shard else output
        files.check_file(output)
        tell = say if here.is_main else lambda text: None
        many = f" x {here.world}" if here.world > 1 else ""
        tell(f"model: {dense.reference}   device: {on}{many}   output: {output}")
        pipe = pipeline.load(dense, pipeline.dtype_of(dtype, on)).to(on)
        family, size = pipeline.family(pipe, dense), pipeline.native_size(pipe)
        job = recipe.family_recipe(family, size, prompts=chosen, num_prompts=num_prompts, **changes)
        tell(
            f"recipe: {len(job.prompts)} prompts x {job.steps} steps, guidance {job.guidance_scale:g}, "
            f"{job.width}x{job.height} px, family {job.family}, prediction_type "
            f"{pipe.scheduler.config.prediction_type}" + (f", part {shard[0]}/{shard[1]}" if shard else "")
        )
        batch = None if batch_size == "auto" else int(batch_size)
        options: dict[str, Any] = {"batch_size": batch, "resume": resume, "force": force}
        if here.world > 1:
            done = ranks.calibrate_together(here, pipe, dense, job, output, **options)
        else:
            done = collect(pipe, dense, job, output, shard=recipe.Shard(*shard) if shard else recipe.WHOLE, **options)
        if here.is_main:
            click.echo(f"{output}: {done}")
        following = "merge PART..., when all parts are there" if shard else "compress --budget 0.35"
        tell(f"next: slimdiff {following}")
