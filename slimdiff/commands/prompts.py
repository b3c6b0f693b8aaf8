"""`slimdiff prompts`: parse, call, print."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from slimdiff import outputs
from slimdiff.commands.parameters import PATH, Whole, command, model_options, say
from slimdiff.errors import SlimdiffError


@click.command(short_help="Choose few prompts that cover a large pool.")
@click.option("--from", "pool", type=PATH, required=True, help="Pool: .txt (one prompt a line), .csv, .tsv or .jsonl.")
@click.option("--column", default="prompt", help="Prompt column of a .csv, .tsv or .jsonl file.")
@click.option("--select", type=Whole(1), default=500, help="Prompts to choose.")
@click.option(
    "--model",
    help="Model whose text encoders read them.  [default: that of the newest statistics under ./slimdiff-out; the "
    "miniature for captions of its own]",
)
@click.option("--config", help="Diffusers folder or hub id that gives a single file its configs.  [default: the hub's]")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "-o", "--output", type=PATH, required=True, help="The chosen prompts, a .txt file, the first choice first."
)
@command
def prompts(
    pool: Path,
    column: str,
    select: int,
    model: str | None,
    config: str | None,
    device: str,
    dtype: str,
    variant: str | None,
    as_json: bool,
    force: bool,
    output: Path,
) -> None:
    """Choose few prompts that cover a large pool, for 'calibrate --prompts'.

    Takes the prompts whose embeddings, as the model's text encoders make them, span the most volume. Any first part of
    the outcome is the choice of so many. Prints how much of the pool they explain, beside random choices of as many.
    Loads tokenizers and text encoders only.
    """
    from slimdiff import pipeline, recipe, source
    from slimdiff import prompts as chooser
    from slimdiff.demo import scenes

    chooser.check_output(output, force)
    texts, on = recipe.read_prompts(pool, column), pipeline.device_of(device)
    kept: dict[str, str] = {}
    if model is None:
        model, kept = _calibrated_last()
    if model is None and not all(scenes.parse(text) for text in texts):
        raise SlimdiffError(
            f"Which model is to read the prompts of {pool}? Name the one that will be calibrated: --model. The "
            "miniature knows nothing but the captions of its own flat shapes."
        )
    asked = {name: value for name, value in (("variant", variant), ("config", config)) if value}
    reader = pipeline.load_text(source.find(model, **kept | asked), pipeline.dtype_of(dtype, on)).to(on)
    chosen = chooser.choose(reader, texts, select)
    chooser.write(chosen.prompts, output)
    click.echo(json.dumps(chosen.to_json(), indent=1, ensure_ascii=False) if as_json else str(chosen))
    following = ["calibrate", *([model] if model else []), "--prompts", str(output)]
    say(f"prompts: {output}\nnext: slimdiff {shlex.join(following)}")


def _calibrated_last() -> tuple[str | None, dict[str, str]]:
    """The model of the newest statistics, with the options that find it; None if there is none but the miniature."""
    from slimdiff.statistics import StatisticsFile

    try:
        path = outputs.newest_statistics()
        file = StatisticsFile(path)
    except SlimdiffError:
        return None, {}
    if file.model == "demo":
        return None, {}
    say(f"model: {file.model}, as in {path}")
    return file.model, file.model_options
