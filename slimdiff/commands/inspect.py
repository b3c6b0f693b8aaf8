"""`slimdiff inspect`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, say


@click.command(short_help="Show what is in statistics, a plan or a checkpoint.")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-o", "--output", type=PATH, help="Folder for inspect.html, with plots, and inspect.json.")
@command
def inspect(path: Path, as_json: bool, output: Path | None) -> None:
    """Look inside a statistics file, a plan or a slim checkpoint.

    PATH is a file of 'slimdiff calibrate' (finished or not), a folder of 'slimdiff compress', or its plan.json. Of
    statistics it tells how many directions the tokens of each layer take, and what probing found if they were
    compressed; of a plan what each layer keeps and at what error. Needs no model and runs none.
    """
    import json

    from slimdiff import inspection
    from slimdiff.report import document

    view = inspection.look(path)
    click.echo(json.dumps(view.to_json(), indent=1) if as_json else view.table())
    if output is not None:
        data, page = document.write(output, "inspect", view.to_json(), view.html())
        say(f"data: {data}\nplots: {page}")
