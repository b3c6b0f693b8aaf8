"""The latency table: curves that never fall, stairs where kernels pad, a file that comes back or is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from slimdiff.errors import SlimdiffError
from slimdiff.latency import Conditions, Curve, Shape, Table

CONDITIONS = Conditions("some device", "float16", 0, "2.13.0", "0.42.1", 512, 512, 2, 859_520_964)
HEADS = Shape("Attention", "qk+vo", 8, 40, 409_920, ((2, 4096, 320), (2, 77, 768)))
UNITS = Shape("FeedForward", "ffn", 1, 1280, 1_231_680, ((2, 4096, 320),))
TABLE = Table(
    CONDITIONS,
    0.03,
    1.0,
    {HEADS: Curve((8, 16, 32, 40), (1e-4, 2e-4, 2e-4, 4e-4)), UNITS: Curve((640, 1280), (2e-4, 4e-4))},
)


def test_a_smoothed_curve_never_falls_and_leaves_rising_ones_alone():
    widths, rising = (40, 32, 24, 16, 8), (5.0, 4.0, 3.0, 2.0, 1.0)
    assert Curve.smoothed(widths, rising) == Curve(widths[::-1], rising[::-1])
    noisy = np.random.default_rng(0).normal(1, 0.3, 50)
    curve = Curve.smoothed(range(1, 51), list(noisy))
    assert list(curve.seconds) == sorted(curve.seconds)
    assert sum(curve.seconds) == pytest.approx(noisy.sum())  # least squares keeps the mean
    assert Curve.smoothed((1, 2, 3), (1.0, 3.0, 2.0)).seconds == (1.0, 2.5, 2.5)


def test_head_widths_take_the_time_of_the_next_wider_one_and_hidden_units_that_in_between():
    assert [TABLE.seconds(HEADS, w) for w in (40, 39, 33, 32, 17, 9, 1)] == [4e-4, 4e-4, 4e-4, 2e-4, 2e-4, 2e-4, 1e-4]
    assert TABLE.seconds(UNITS, 960) == pytest.approx(3e-4)
    assert TABLE.seconds(UNITS, 64) == 2e-4  # nothing is claimed below what was timed
    assert replace(TABLE, scale=1.5).seconds(UNITS, 640) == pytest.approx(3e-4)


def test_a_table_comes_back_from_its_file(tmp_path):
    TABLE.write(tmp_path / "t.json")
    assert Table.read(tmp_path / "t.json") == TABLE
    assert TABLE.missing([HEADS, UNITS]) == []
    assert TABLE.missing([replace(HEADS, cut="qk"), HEADS]) == [replace(HEADS, cut="qk")]


def test_conditions_say_what_differs():
    other = replace(CONDITIONS, device="another", rows=8)
    assert CONDITIONS.differences(CONDITIONS) == []
    assert CONDITIONS.differences(other) == ["device some device instead of another", "rows 2 instead of 8"]


def broken(change):
    data = {"format": 1, "call": 1.0, "scale": 1.0, "conditions": {}, "layers": []}
    return json.dumps({**data, **change})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no latency table"),
        ("[]", "no latency table"),
        ("{}", "no latency table"),
        (broken({}), "no latency table"),
        (broken({"format": 2}), "format 2"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, says):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(SlimdiffError, match=f"{says}.*slimdiff profile"):
        Table.read(path)
    with pytest.raises(SlimdiffError, match="No such file"):
        Table.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [8, 16, 32]},
        {"widths": [40, 32, 16, 8]},
        {"widths": [8, 16, 24, 32]},
        {"seconds": [2e-4, 1e-4, 3e-4, 4e-4]},
        {"seconds": [-1e-4, 1e-4, 3e-4, 4e-4]},
        {"seconds": [1e-4, 1e-4, 3e-4, "nan"]},
        {"more": 1},
    ],
)
def test_damaged_curves_are_refused(tmp_path, change):
    path = tmp_path / "t.json"
    TABLE.write(path)
    data = json.loads(path.read_text())
    data["layers"][0] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(SlimdiffError, match="no latency table"):
        Table.read(path)
