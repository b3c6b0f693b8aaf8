"""The documents say what is there: files in maps and links exist, commands are listed as they are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from slimdiff.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "calib/README.md"]


def commands_page() -> str:
    """docs/commands.md as it has to be. To renew it: python -c 'import test_docs; test_docs.renew()' in tests/."""
    parts = ["# Commands\n\nWhat `slimdiff COMMAND --help` says.\n"]
    for name, command in sorted(main.commands.items()):
        parent = click.Context(main, info_name="slimdiff", **main.context_settings)
        context = click.Context(command, info_name=name, parent=parent, terminal_width=100)
        parts.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def renew() -> None:
    (ROOT / "docs/commands.md").write_text(commands_page(), encoding="utf-8")


def test_commands_are_documented_as_they_are():
    assert (ROOT / "docs/commands.md").read_text(encoding="utf-8") == commands_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def test_files_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\b(\w+\.py)\b", text):
        assert any(ROOT.glob(f"**/{name}")), name
    for name in re.findall(r"^(\w+)/ ", text, re.MULTILINE):
        assert (ROOT / name).is_dir(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_missing(page):
    assert "@@" not in page.read_text(encoding="utf-8")


def test_options_shown_in_the_readme_exist():
    known = {option for command in main.commands.values() for p in command.params for option in p.opts}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown - known - {"--help"} == set()
