"""How the house is built: imports point one way, heavy ones wait until they are needed, files stay small."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slimdiff

ROOT = Path(slimdiff.__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "slimdiff").rglob("*.py"))
}
LAYERS = (
    {"slimdiff", "commands", "demo", "metrics", "report", "solve"},
    {"conditions", "errors", "guidance", "macs", "slim_unet", "states", "report.wording", "solve.solution",
     "demo.scenes", "timesteps"},
    {"families", "recipe", "stacking"},
    {"allocate", "card", "files", "groups", "linalg", "measured", "metrics.pictures", "metrics.weights", "options",
     "original_layout", "outputs", "plan", "progress", "ready", "single_file", "source"},
    {"commands.parameters", "gram", "influence", "latency", "lora", "metrics.inception", "metrics.score"},
    {"metrics.clip", "metrics.fid", "metrics.lpips", "patches"},
    {"capture", "checkpoint", "metrics.choice", "pipeline", "refine", "report.document", "report.evaluation",
     "report.results", "report.sheet", "report.svg", "report.unet", "solve.ffn", "solve.heads", "solve.linear",
     "solve.qk", "solve.selection", "solve.vo", "solve.whitening", "statistics", "surgery", "timing", "widths"},
    {"dense", "inpainting", "pairs", "solve.resnet"},
    {"batches"},
    {"calibrate", "merge", "methods", "probing", "profile", "prompts", "report.comparison", "report.of_plan",
     "sequential", "spectra", "trials"},
    {"compress", "fidelity", "push", "ranks", "report.of_statistics", "report.page"},
    {"bench", "inspection", "painting"},
    {"evaluation"},
    {"api"},
    {"commands.bench", "commands.calibrate", "commands.compare", "commands.compress", "commands.dense",
     "commands.eval", "commands.inspect", "commands.lora", "commands.merge", "commands.profile", "commands.prompts",
     "commands.push"},
    {"cli"},
    {"__main__"},
)  # fmt: skip
"""From the ground up: a module imports from lower layers only."""


def layer(module: str) -> int:
    short = module.removeprefix("slimdiff.")
    return next((i for i, names in enumerate(LAYERS) if short in names), -1)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported anywhere in a module, but for the type checker only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def modules_imported(path: Path) -> set[str]:
    """Modules of slimdiff that a file imports."""
    names = {name for name in imports(ast.parse(path.read_text("utf-8"))) if name.split(".")[0] == "slimdiff"}
    return {name if name in FILES else name.rpartition(".")[0] for name in names}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_module_has_its_place():
    assert {module for module in FILES if layer(module) < 0} == set(), "put new modules into a layer"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module):
    wrong = {other for other in modules_imported(FILES[module]) if layer(other) >= layer(module)}
    assert not wrong, f"{module} imports {wrong} of its own layer or above"


def test_only_the_command_line_knows_click():
    users = {
        m
        for m, path in FILES.items()
        if any(n.split(".")[0] == "click" for n in imports(ast.parse(path.read_text("utf-8"))))
    }
    assert {user for user in users if not user.startswith("slimdiff.commands.")} == {"slimdiff.cli"}


def test_the_code_that_travels_needs_torch_and_diffusers_only():
    """`slim_unet.py` lies in every slim checkpoint and runs where slimdiff is not installed."""
    needed = {name.split(".")[0] for name in imports(ast.parse(FILES["slimdiff.slim_unet"].read_text("utf-8")))}
    assert needed - sys.stdlib_module_names == {"torch", "diffusers"}


def test_only_two_files_know_the_layout_of_a_unet():
    """`groups.py`, and the code that travels alone, which cannot import it."""
    spelt = {"to_q", "to_k", "to_v", "to_out", "net", "conv1", "conv2", "norm2", "time_emb_proj"}
    knowing = set()
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in spelt:
                knowing.add(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                knowing |= {module} if spelt & set(node.value.split(".")) else set()
    assert knowing == {"slimdiff.groups", "slimdiff.slim_unet"}


def test_solves_are_pure():
    """Tensors in, tensors out: no module, no file, no progress, no printing."""
    for name in (name for name in FILES if name.startswith(("slimdiff.solve.", "slimdiff.linalg"))):
        tree = ast.parse(FILES[name].read_text("utf-8"))
        allowed = {"torch", "slimdiff", "collections", "contextlib", "dataclasses", "functools", "typing", "__future__"}
        foreign = {n.split(".")[0] for n in imports(tree)} - allowed
        assert not foreign, name
        assert not {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & {"print", "open", "nn"}


def test_nothing_unpickles():
    """The published weights of metrics come as pickles: torch's restricted loader takes only tensors from them."""
    loaders = {"torch.load", "torch.hub.load_state_dict_from_url", "np.load", "numpy.load"}
    for module, path in FILES.items():
        tree = ast.parse(path.read_text("utf-8"))
        assert not {n.split(".")[0] for n in imports(tree)} & {"pickle", "joblib", "dill"}, module
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in loaders]
        assert not calls or module in {"slimdiff.metrics.weights", "slimdiff.metrics.lpips"}, module
        for call in calls:
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords], module


def test_files_stay_small_and_say_what_they_are():
    for module, path in FILES.items():
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= (510 if module == "slimdiff.slim_unet" else 350), module  # it travels alone
        assert path.stem not in ("utils", "helpers", "misc", "common")
        if text:
            assert ast.get_docstring(ast.parse(text)), module


def test_importing_and_asking_for_help_load_nothing_heavy():
    code = """
import runpy, sys
import slimdiff, slimdiff.cli
for arguments in (["--help"], ["--version"], *([c, "--help"] for c in slimdiff.cli.main.commands)):
    sys.argv = ["slimdiff", *arguments]
    try:
        runpy.run_module("slimdiff", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, arguments
print("heavy:", *sorted({"torch", "diffusers", "transformers", "numpy", "scipy"} & sys.modules.keys()))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "Usage: slimdiff" in done.stdout.replace("python -m ", "")
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("name", sorted(set(slimdiff.__all__) - {"__version__"}))
def test_the_public_names_are_functions_and_classes_however_often_they_are_asked_for(name):
    for module in ("calibrate", "checkpoint", "compress", "bench"):
        importlib.import_module(f"slimdiff.{module}")
    for _ in range(2):
        function = getattr(slimdiff, name)
        assert callable(function), f"slimdiff.{name} is {function}"
        assert function.__module__.startswith("slimdiff.")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        slimdiff.nonsense  # noqa: B018
