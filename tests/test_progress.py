"""Long jobs say how far they are also where no bar can be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import tiny_pipeline

from slimdiff import progress
from slimdiff.calibrate import collect
from slimdiff.progress import Log
from slimdiff.recipe import family_recipe
from slimdiff.source import Source


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_says_what_is_done_and_what_is_left(clock, capsys):
    log = Log("calibrate", "prompt", 500, first=4)
    for done in range(5, 501):
        clock[0] += 12
        log(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "calibrate: prompt 9 of 500, 1 min, about 1 h 38 min left"
    assert lines[11] == "calibrate: prompt 64 of 500, 12 min, about 1 h 27 min left"
    assert len(lines) == 99


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_where_a_bar_is_drawn_or_nothing_is_wanted(clock, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    log = Log("calibrate", "prompt", 3, show=terminal)
    clock[0] += 1000
    log(1)
    assert capsys.readouterr().err == ""


def test_calibration_tells_its_prompts(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    job = family_recipe("sd1", (16, 16), num_prompts=3, steps=1)
    for show in (False, True):
        collect(pipe, Source("tiny", "tiny", None), job, tmp_path / f"{show}.safetensors", batch_size=1, show=show)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibrate: ")]
    assert [line.partition(",")[0] for line in told] == ["calibrate: prompt 1 of 3", "calibrate: prompt 2 of 3"]
