"""`slimdiff compare`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from slimdiff.commands.parameters import PATH, command, say


@click.command(short_help="Put several benchmarks side by side.")
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("-o", "--output", type=PATH, help="Folder for compare.html, with plots, and compare.json.")
@command
def compare(runs: tuple[Path, ...], as_json: bool, output: Path | None) -> None:
    """Put several reports of 'slimdiff bench' side by side: quality against speed.

    RUNS are report folders, of several budgets or methods. They must be of the same dense model, prompts, settings and
    machine; others are refused.
    """
    import json

    from slimdiff.report import comparison, document

    found = comparison.Comparison(comparison.read(runs))
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else found.table())
    if output is not None:
        data, page = document.write(output, "compare", found.to_json(), found.html())
        say(f"data: {data}\nplots: {page}")
