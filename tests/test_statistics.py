"""The statistics file: round trip, and every kind of damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimdiff.errors import OutputError, StatisticsError
from slimdiff.gram import Gram
from slimdiff.recipe import Recipe
from slimdiff.statistics import Statistics, StatisticsFile

RECIPE = Recipe("sd1", ("a", "b"), ("", ""), 2, 4.0, 16, 16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gram = Gram(6, heads=2)
    gram.add(torch.randn(50, 12))
    statistics = Statistics("model", {}, "f" * 64, RECIPE, {"block.attn1.qk:q": gram}, done=2)
    statistics.write(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_round_trip(path):
    torch.manual_seed(0)
    x = torch.randn(50, 12).view(50, 2, 6).double()
    moments = StatisticsFile(path).moments("block.attn1.qk:q")
    assert torch.allclose(moments.second, torch.einsum("nhd,nhe->hde", x, x) / 50, atol=1e-6)
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-6)
    assert moments.count == 50
    assert StatisticsFile(path).recipe == RECIPE


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_truncated(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(StatisticsError, match=r"truncated or damaged.*Calibrate again"):
        StatisticsFile(path).moments("block.attn1.qk:q")


def test_every_flipped_byte_is_noticed(path):
    data = path.read_bytes()
    for at in range(8, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(StatisticsError):
            StatisticsFile(path).read()


def test_other_safetensors_file(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(StatisticsError, match="not a statistics file"):
        StatisticsFile(tmp_path / "x.safetensors")


def test_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(StatisticsError, match="slimdiff calibrate"):
        StatisticsFile(tmp_path / "none")


def test_missing_and_empty_groups(path):
    with pytest.raises(StatisticsError, match="no tokens"):
        StatisticsFile(path).moments("block.attn1.vo:z")
    Statistics("model", {}, "f", RECIPE, {"g:q": Gram(4)}, done=2).write(path)
    with pytest.raises(StatisticsError, match="no tokens"):
        StatisticsFile(path).moments("g:q")


def test_another_model_and_an_unfinished_file(path):
    file = StatisticsFile(path)
    file.check_model("f" * 64, "model")
    with pytest.raises(StatisticsError, match="another model"):
        file.check_model("0" * 64, "other")
    Statistics("model", {}, "f", RECIPE, {}, done=1).write(path)
    with pytest.raises(StatisticsError, match="1 of 2 prompts"):
        StatisticsFile(path).check_model("f", "model")


def test_unwritable_place_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        Statistics("model", {}, "f", RECIPE).write(tmp_path / "file" / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
