"""`slimdiff bench`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.commands.parameters import (
    PATH,
    SIZES,
    STACKS,
    Whole,
    command,
    model_options,
    newest_slim,
    picture_options,
    say,
)


@click.command(short_help="Measure dense against slim: speed, memory, size, drift.")
@click.argument("slim", required=False, type=PATH)
@click.option("--dense", help="Dense model.  [default: the one the slim checkpoint was made from]")
@picture_options
@click.option("--seed", default=10_000, help="Prompt i starts from the noise of seed + i.")
@click.option("--batch-sizes", type=SIZES, default="1,4", help="Pictures at once, for latency.")
@click.option("--repeats", type=Whole(3), default=20, help="Timed pairs for each latency.")
@click.option(
    "--with", "stacks", type=STACKS,
    help="What to put on top of both models, each a column: int8, deepcache, tome, or several as in int8+tome.",
)  # fmt: skip
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
    stacks: tuple[str, ...] | None,
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
    Writes report.json, report.html (open it in a browser) and pictures.png, and prints the table.
    """
    import json

    from slimdiff import checkpoint, pairs, recipe, source
    from slimdiff.bench import Settings, measure
    from slimdiff.files import check_room
    from slimdiff.report import page, sheet

    slim = slim or newest_slim()
    plan = checkpoint.plan_of(slim)
    made = plan.provenance["recipe"]
    texts = recipe.bench_prompts(made["family"]) if prompts is None else recipe.read_prompts(prompts, column)
    texts = texts[:num_prompts]
    output = output or outputs.report_path(slim)
    check_room(output, output)
    dense_pipe, slim_pipe, found = pairs.load(slim, plan, dense, device=device, dtype=dtype, variant=variant)
    settings = Settings.like(made, texts, seed=seed, batch_sizes=batch_sizes, repeats=repeats, stacks=stacks, **changes)
    sizes = source.unet_bytes(found), checkpoint.size_in_bytes(slim)
    result = measure(dense_pipe, slim_pipe, plan, settings, sizes=sizes)
    json_path, html_path = page.write(result, output)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.table())
    say(f"report: {html_path}\ndata: {json_path}")
    if result.pictures:
        say(f"pictures: {output / sheet.FILE}")
