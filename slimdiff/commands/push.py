"""`slimdiff push`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, say


@click.command(short_help="Publish a slim checkpoint on the Hugging Face Hub.")
@click.argument("slim", type=PATH)
@click.argument("repo")
@click.option("--report", type=PATH, help="Report of 'slimdiff bench' for the card.  [default: the one beside SLIM]")
@click.option("--license", "licence", help="Licence of the original model, as the hub names it: openrail++, mit, ...")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch to put it on.  [default: main]")
@click.option("--dry-run", is_flag=True, help="Show the model card and the files, and send nothing.")
@command
def push(
    slim: Path, repo: str, report: Path | None, licence: str | None, private: bool, revision: str | None, dry_run: bool
) -> None:
    """Publish a slim checkpoint on the Hugging Face Hub, with a model card.

    SLIM is a folder of 'slimdiff compress', REPO a name like owner/name, made if it is not there. The card says what
    was cut, what 'slimdiff bench' measured, and how to load the model. The token is that of 'hf auth login' or
    HF_TOKEN.
    """
    from slimdiff.push import package, upload
    from slimdiff.report.wording import size

    made = package(slim, repo, report, licence)
    if dry_run:
        click.echo(made.card)
        for name, number in made.sizes().items():
            click.echo(f"{size(number):>10}  {name}")
        return
    say(f"{len(made.files)} files, {size(sum(made.sizes().values()))}, to {repo}")
    click.echo(upload(made, private=private, revision=revision))
