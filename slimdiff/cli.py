"""The command line: parse, call, print. The work is in the modules of the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimdiff import __version__, outputs
from slimdiff.options import INFLUENCES, METHODS
from slimdiff.parameters import GROUPS, PATH, SHARE, SIZES, command, model_options, picture_options
from slimdiff.recipe import SCHEDULERS


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Make a pretrained Stable Diffusion UNet smaller and faster, without gradients and without fine-tuning.

    \b
    slimdiff calibrate [MODEL]          watch the model paint: statistics of all prompts and timesteps
    slimdiff compress --budget 0.35     remove 35% of attention and feed-forward parameters in closed form
    slimdiff bench                      dense against slim: speed, memory, size, and how far the pictures moved

    Typed one after the other in any folder, each command picks up what the one before it left in ./slimdiff-out.
    Without a MODEL they run on a miniature Stable Diffusion that comes with slimdiff. MODEL is a hub id (owner/name), a
    diffusers folder, or a .safetensors file, of Stable Diffusion 1.x, 2.x or SDXL.
    """


@main.command()
@click.argument("model", required=False)
@picture_options
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), help="Sampler.  [default: the checkpoint's own]")
@click.option("--seed", default=0, help="Prompt i starts from the noise of seed + i.")
@click.option("--batch-size", default="auto", help="Prompts at once; changes speed, not results.")
@model_options
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--resume/--no-resume", default=True, help="Go on from an unfinished run of this job.")
@click.option("--baselines", is_flag=True, help="Also sum what every other 'compress --method' but svd needs.")
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
    resume: bool,
    force: bool,
    output: Path | None,
    **changes: Any,
) -> None:
    """Run MODEL over about 500 prompts and ALL their timesteps, and save what compression needs to know.

    Ctrl-C saves; the same command goes on from there. The miniature takes minutes on a CPU; a full-size model wants a
    GPU and takes as long as painting 500 pictures.
    """
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise click.BadParameter(f"'{batch_size}' is neither auto nor a positive number.", param_hint="--batch-size")
    from slimdiff import pipeline, recipe, source
    from slimdiff.calibrate import calibrate as run

    chosen = None if prompts is None else recipe.read_prompts(prompts, column)
    on = pipeline.device_of(device)
    dense = source.find(model, variant, revision)
    output = output or outputs.statistics_path(dense.name)
    _say(f"model: {dense.reference}   device: {on}   output: {output}")
    pipe = pipeline.load(dense, pipeline.dtype_of(dtype, on)).to(on)
    family, size = pipeline.family(pipe, dense), pipeline.native_size(pipe)
    job = recipe.family_recipe(family, size, prompts=chosen, num_prompts=num_prompts, **changes)
    _say(
        f"recipe: {len(job.prompts)} prompts x {job.steps} steps, guidance {job.guidance_scale:g}, "
        f"{job.width}x{job.height} px, family {job.family}"
    )
    batch = None if batch_size == "auto" else int(batch_size)
    done = run(pipe, dense, job, output, batch_size=batch, resume=resume, force=force)
    click.echo(f"{output}: {done}")
    _say("next: slimdiff compress --budget 0.35")


@main.command()
@click.argument("statistics", required=False, type=PATH)
@click.option("--budget", type=SHARE, default=0.35, help="Share to remove, at least 0, below 1.")
@click.option(
    "--budget-of",
    "of",
    type=click.Choice(["groups", "unet", "macs"]),
    default="groups",
    help="Share of what: the groups' parameters, the whole UNet's, or the groups' MACs.",
)
@click.option(
    "--groups",
    "kinds",
    type=GROUPS,
    help="Kinds to cut: query-key, value-output, feed-forward.  [default: qk,vo,ffn]",
)
@click.option("--independent-ranks", is_flag=True, help="Let query-key and value-output widths of one layer differ.")
@click.option(
    "--round-to",
    type=click.IntRange(1),
    help="Step of head widths; feed-forward widths take eight times that.  [default: 8, finer in narrow layers]",
)
@click.option(
    "--min-width",
    type=click.FloatRange(0, 1, min_open=True),
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
@click.option("--probe-prompts", type=click.IntRange(1, 32), default=8, help="Prompts to probe with.")
@click.option("--probe-steps", type=click.IntRange(1), default=10, help="Sampler steps of a probe.")
@click.option(
    "--refine/--no-refine",
    default=False,
    help="Refit output projections on calibration states; a layer keeps its refit if held-out states agree.",
)
@click.option("--model", help="Dense model.  [default: the one the statistics were made from]")
@model_options
@click.option("--dry-run", is_flag=True, help="Print the plan, group by group, and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing slim checkpoint.")
@click.option("-o", "--output", type=PATH, help="Slim checkpoint.  [default: slim-<budget> beside the statistics]")
@command
def compress(
    statistics: Path | None,
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
    from slimdiff import checkpoint, pipeline, source
    from slimdiff.compress import Options
    from slimdiff.compress import compress as run
    from slimdiff.statistics import StatisticsFile

    if statistics is None:
        statistics = outputs.newest_statistics()
        _say(f"statistics: {statistics}")
    file = StatisticsFile(statistics)
    options = Options(**choices)
    output = output or outputs.slim_path(statistics, options.budget, options.of, options.method)
    if not dry_run:
        checkpoint.check_output(output, force)
    on = pipeline.device_of(device)
    dense = source.find(model or file.model, variant or file.variant)
    stored = source.stored_dtype(dense)
    pipe = pipeline.load(dense, pipeline.working_dtype(stored, on))
    file.check_model(pipeline.fingerprint(pipe.unet), dense.reference)
    slim, plan = run(pipe.to(on), file, options)
    click.echo(plan.table() if dry_run else "\n".join(plan.summary()))
    if dry_run:
        return
    slim.to("cpu", stored if dtype == "auto" else pipeline.dtype_of(dtype, on))
    checkpoint.write(output, slim, pipe.to("cpu"), plan.to_json(), dense.folder, dense.variant, force)
    click.echo(f"{output}: slim checkpoint, {checkpoint.size_in_bytes(output) / 1e6:.1f} MB of UNet weights")
    _say("next: slimdiff bench")


@main.command()
@click.argument("slim", required=False, type=PATH)
@click.option("--dense", help="Dense model.  [default: the one the slim checkpoint was made from]")
@picture_options
@click.option("--seed", default=10_000, help="Prompt i starts from the noise of seed + i.")
@click.option("--batch-sizes", type=SIZES, default="1,4", help="Pictures at once, for latency.")
@click.option("--repeats", type=click.IntRange(3), default=20, help="Timed pairs for each latency.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
@click.option("-o", "--output", type=PATH, help="Report folder.  [default: bench-<budget> beside the checkpoint]")
@command
def bench(
    slim: Path | None,
    dense: str | None,
    prompts: Path | None,
    column: str,
    num_prompts: int | None,
    seed: int,
    batch_sizes: tuple[int, ...],
    repeats: int,
    device: str,
    dtype: str,
    variant: str | None,
    as_json: bool,
    output: Path | None,
    **changes: Any,
) -> None:
    """Measure dense against slim in one run: speed, memory, size, and how far the pictures moved.

    SLIM is a folder of 'slimdiff compress'; without it the newest under ./slimdiff-out is taken. Both models paint the
    same prompts (by default ones that calibration never saw) from the same noise, with calibration's own settings.
    Writes report.json and report.html (open it in a browser) and prints the table.
    """
    import json

    from slimdiff import checkpoint, pipeline, recipe, source
    from slimdiff.bench import Settings
    from slimdiff.bench import bench as run
    from slimdiff.plan import Plan
    from slimdiff.report import page

    if slim is None:
        slim = outputs.newest_slim()
        _say(f"slim checkpoint: {slim}")
    plan = Plan.from_json(checkpoint.read_plan(slim))
    made = plan.provenance["recipe"]
    texts = recipe.bench_prompts(made["family"]) if prompts is None else recipe.read_prompts(prompts, column)
    texts = texts[:num_prompts]
    on = pipeline.device_of(device)
    in_dtype = pipeline.dtype_of(dtype, on)
    found = source.find(dense or plan.provenance["model"], variant or plan.provenance["variant"])
    pipes = pipeline.load(found, in_dtype), checkpoint.load(slim, torch_dtype=in_dtype)
    plan.check_model(pipeline.fingerprint(pipes[0].unet), found.reference)
    for pipe in pipes:
        pipeline.use_scheduler(pipe, made["scheduler"])
        pipe.to(on)
    settings = Settings(
        prompts=texts,
        negatives=("",) * len(texts),
        seed=seed,
        batch_sizes=batch_sizes,
        repeats=repeats,
        **{name: made[name] if value is None else value for name, value in changes.items()},
    )
    sizes = source.unet_bytes(found), checkpoint.size_in_bytes(slim)
    result = run(*pipes, plan, settings, sizes=sizes)
    json_path, html_path = page.write(result, output or outputs.report_path(slim))
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.table())
    _say(f"report: {json_path}\npictures: {html_path}")
