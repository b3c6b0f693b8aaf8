"""`slimdiff eval`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.commands.parameters import METRICS, PATH, Whole, command, model_options, newest_slim, picture_options, say
from slimdiff.recipe import SCHEDULERS


@click.command("eval", short_help="Score the pictures: CLIP score, FID and LPIPS.")
@click.argument("dense", required=False)
@click.argument("slim", required=False, type=PATH)
@click.option("--metrics", type=METRICS, default="clip,fid,lpips", help="Which to measure.")
@picture_options
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), help="Sampler.  [default: as calibrated]")
@click.option("--seed", default=10_000, help="Prompt i starts from the noise of seed + i.")
@click.option("--size", type=Whole(8), default=256, help="Measure pictures shrunk to this side, in pixels.")
@click.option("--reference", type=PATH, help="Folder of real pictures for FID.  [default: the dense model's pictures]")
@click.option("--clip-model", help="Hub id or folder of a CLIP model.  [default: openai/clip-vit-large-patch14]")
@click.option("--fid-features", type=click.Choice(["64", "192", "768", "2048"]), default="2048", help="Width of FID.")
@click.option("--weights", type=PATH, help="Folder of the weights of FID and LPIPS.  [default: torch's cache]")
@click.option("--batch-size", type=Whole(1), help="Pictures at once.  [default: by their size]")
@model_options
@click.option("--keep-images/--no-keep-images", default=True, help="Keep the pictures when they are measured.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON instead of a table.")
@click.option("-o", "--output", type=PATH, help="Folder.  [default: eval-<budget> beside the checkpoint]")
@command
def evaluate(
    dense: str | None,
    slim: Path | None,
    metrics: tuple[str, ...],
    prompts: Path | None,
    column: str,
    num_prompts: int | None,
    steps: int | None,
    scheduler: str | None,
    size: int,
    reference: Path | None,
    clip_model: str | None,
    fid_features: str,
    weights: Path | None,
    batch_size: int | None,
    device: str,
    dtype: str,
    variant: str | None,
    keep_images: bool,
    as_json: bool,
    output: Path | None,
    **changes: Any,
) -> None:
    """Measure the pictures of dense and slim as papers do: CLIP score, FID and LPIPS, 25 steps, 512 px shrunk to 256.

    SLIM is a folder of 'slimdiff compress', by default the newest under ./slimdiff-out; DENSE is by default the model
    that it was made from. A single path may be either. Both paint the same prompts from the same noise. FID is to the
    real pictures of --reference; without them it only says how far the slim pictures are from the dense ones.

    Ctrl-C loses the present batch only; the same command goes on from there. FID and LPIPS need
    pip install 'slimdiff[eval]', and every metric downloads weights once.
    """
    import json

    from slimdiff import checkpoint, evaluation, pairs, pipeline, recipe
    from slimdiff.files import check_room
    from slimdiff.measured import Settings
    from slimdiff.metrics import choice, clip

    if slim is None and dense is not None and checkpoint.is_slim(dense):
        slim, dense = Path(dense), None
    slim = slim or newest_slim()
    plan = checkpoint.plan_of(slim)
    made = plan.provenance["recipe"]
    texts = recipe.bench_prompts(made["family"]) if prompts is None else recipe.read_prompts(prompts, column)
    settings = Settings.like(made, texts[:num_prompts], steps=steps or evaluation.STEPS, **changes)
    folder = output or outputs.evaluation_path(slim)
    check_room(folder, folder)
    loaded = choice.load(
        metrics,
        clip_model=clip_model or clip.MODEL,
        weights=weights,
        reference=reference,
        fid_features=int(fid_features),
    )
    pipes = pairs.load(slim, plan, dense, device=device, dtype=dtype, variant=variant)[:2]
    for pipe in pipes:
        pipeline.use_scheduler(pipe, scheduler)
    found = evaluation.evaluate(
        *pipes, plan, settings, loaded, folder, side=size, batch_size=batch_size, keep=keep_images
    )
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else found.table())
    say(f"scores: {folder / 'eval.json'}" + (f"\npictures: {folder}" if keep_images else ""))
