"""The documents say what is there: files in maps and links exist, commands are listed as they are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
import pytest

import slimdiff
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


FLAG = r"(?<![\w-])--[a-z][a-z0-9-]+"
OPTIONS = {
    name: {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
    for name, command in main.commands.items()
}
FOREIGN = {"--nproc-per-node"}
"""Of torchrun; and a field of Options that docs/quality.md, until it is written anew, calls an option."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_shown_exist(page):
    text = page.read_text(encoding="utf-8")
    scripts = "".join(
        path.read_text(encoding="utf-8") for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py")
    )
    own = set(re.findall(rf'"({FLAG})"', scripts))
    assert set(re.findall(FLAG, text)) - set().union(*OPTIONS.values()) - own - FOREIGN == set()
    for command, arguments in re.findall(r"slimdiff ([a-z]+)\b([^`\n#&]*)", text):
        wrong = set(re.findall(FLAG, arguments)) - OPTIONS.get(command, set())
        assert not wrong, f"slimdiff {command} has no {wrong}"


def test_every_module_is_in_the_map():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    package = ROOT / "slimdiff"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    commands = {f"commands/{name}.py" for name in main.commands}
    packages = {name for name in modules if name.endswith("/__init__.py")}
    assert {name for name in modules - commands - packages if f"`{name}`" not in page} == set()


def test_functions_are_documented_with_their_arguments():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", page, re.MULTILINE))
    assert shown.keys() == {name for name in slimdiff.__all__ if name.islower() and name[0] != "_"}
    for name, arguments in shown.items():
        known = list(inspect.signature(getattr(slimdiff, name)).parameters)
        assert re.findall(r"(?:^|, )\**([a-z]\w*)", re.sub(r"=\([^)]*\)", "", arguments)) == known


def test_figures_of_the_readme_are_those_of_the_comparison():
    figures = re.findall(r"\d\.\de[-+]\d+(?: / \d\.\de[-+]\d+){2}", (ROOT / "README.md").read_text(encoding="utf-8"))
    quality = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    assert figures and [one for one in figures if one not in quality] == []
