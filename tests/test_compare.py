"""Comparing benchmarks: only what was measured alike, and quality never without speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import run
from test_report import Checker, make_report

from slimdiff.measured import Settings, Spread
from slimdiff.report import page
from slimdiff.report.comparison import Comparison, read

MADE_FROM = {"model": "owner/<tiny>", "fingerprint": "f" * 64}
MACHINE = {"device": "a CPU", "threads": 2, "precision": "float32", "scheduler": "DDIMScheduler"}


def report(
    folder: Path, budget: float, speedup: float, drift: float, method: str = "slimdiff", **changes: object
) -> Path:
    """A report folder; `changes` are of the plan's provenance, the settings or the machine, whichever knows them."""
    made = make_report()
    known = {name: value for name, value in changes.items() if name in MADE_FROM}
    plan = replace(made.plan, budget=budget, provenance={**MADE_FROM, **known, "options": {"method": method}})
    timing = replace(made.speed[-1], speedup=Spread(speedup, speedup - 0.1, speedup + 0.1))
    settings = replace(made.settings, **{k: v for k, v in changes.items() if k in Settings.__dataclass_fields__})
    one = replace(
        made, plan=plan, speed=(made.speed[0], timing), settings=settings,
        fidelity=replace(made.fidelity, drift=(drift, 4 * drift)),
        provenance={**MACHINE, **{k: v for k, v in changes.items() if k in MACHINE}},
    )  # fmt: skip
    page.write(one, folder)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        report(tmp_path / "bench-0.5", 0.5, 1.4, 0.1),
        report(tmp_path / "bench-0.2", 0.2, 1.1, 1e-3),
        report(tmp_path / "bench-0.2-svd", 0.2, 1.2, 0.05, "svd", repeats=7, batch_sizes=(2,)),
    ]


def test_table_and_json(runs):
    out = run("compare", *runs)
    lines = [line.split() for line in out.splitlines()[:4]]
    assert [line[0] for line in lines[1:]] == ["0.2", "0.5", "0.2-svd"]  # by method, then by budget
    assert "1.40x (1.30 - 1.50)" in out and "25%" in lines[2] and "-20.0%" in lines[2]
    data = json.loads(run("compare", *runs, "--json"))
    assert [one["name"] for one in data["runs"]] == ["0.5", "0.2", "0.2-svd"]
    assert data["runs"][2]["method"] == "svd" and data["runs"][2]["drift"]["worst"] == 0.2
    assert run("compare", *(folder / "report.json" for folder in runs)) == out


def test_page_places_every_run_by_its_figures(runs, tmp_path):
    run("compare", *runs, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.html", "compare.json"]
    text = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    found = Checker(text)
    assert len(found.all("svg")) == 3 and not found.all("script") and "owner" not in found.words
    dots = [attrs for attrs in found.all("path") if "dot" in (attrs["class"] or "")]
    assert len(dots) == 2 * len(runs) and [d["class"] for d in dots[:3]] == ["dot series-0"] * 2 + ["dot series-1"]
    places = [tuple(map(float, (d["d"] or "")[1:].removesuffix("h0").split())) for d in dots[:3]]
    slow, fast, svd = places
    assert slow[0] < svd[0] < fast[0] and slow[1] > svd[1] > fast[1]  # down is less drift


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [report(tmp_path / name / "bench-0.5", 0.5, 1.2, 0.1) for name in ("a", "b")]
    assert [one.name for one in read(folders)] == [str(folder) for folder in folders]


def test_models_that_broke_are_infinitely_far(runs, tmp_path):
    broken = report(tmp_path / "bench-0.9", 0.9, 2.0, float("inf"))
    found = Comparison(read([*runs, broken]))
    assert "not finite" in found.table() and json.dumps(found.to_json(), allow_nan=False)
    Checker(found.html())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fingerprint", "0" * 64, "dense model"), ("prompts", ("a cat", "a boat"), "a boat"),
        ("steps", 9, "steps differs (3 and 9)"), ("seed", 1, "seed"), ("device", "another CPU", "another CPU"),
        ("precision", "float16", "precision"),
    ],
)  # fmt: skip
def test_runs_of_other_conditions_are_refused(runs, tmp_path, name, value, said):
    other = report(tmp_path / "bench-other", 0.2, 1.0, 0.1, **{name: value})
    out = run("compare", *runs, other, "-o", tmp_path / "out", code=1)
    assert said in out and "0.5 and other cannot be compared" in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be read"), ("{}", "is not a report"), ("[1]", "is not a report"), ('{"format": 99}', "newer")],
)
def test_what_is_no_report_is_refused(runs, tmp_path, text, said):
    (tmp_path / "odd").mkdir()
    if text is not None:
        (tmp_path / "odd/report.json").write_text(text)
    assert said in run("compare", runs[0], tmp_path / "odd", code=1)
