"""Spectra of statistics: exact where the answer is known, and energies by timestep that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimdiff.errors import StatisticsError
from slimdiff.gram import Gram
from slimdiff.inspection import look
from slimdiff.recipe import Recipe
from slimdiff.report.of_statistics import StatisticsView
from slimdiff.spectra import spectrum
from slimdiff.statistics import Statistics, StatisticsFile
from slimdiff.timesteps import TENTHS, Clock

RECIPE = Recipe("sd1", ("a",), ("",), 4, 3.0, 16, 16)


def stored(path: Path, **grams: Gram) -> StatisticsFile:
    named = {f"down_blocks.0.attn1.vo:{name}": gram for name, gram in grams.items()}
    Statistics("tiny", None, "f" * 64, RECIPE, named, done=1).write(path)
    return StatisticsFile(path)


def gram_of(x: torch.Tensor, heads: int = 1) -> Gram:
    gram = Gram(x.shape[-1] // heads, heads)
    gram.add(x)
    return gram


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))


def test_tokens_on_one_line_have_rank_one_and_even_ones_the_width(tmp_path, tokens):
    """With orthonormal columns the covariance is the identity, whatever the mean."""
    even = torch.linalg.qr(tokens - tokens.mean(0))[0] * 60 + 3
    line = tokens[:, :1] * torch.arange(1.0, 9)
    file = stored(tmp_path / "s.safetensors", q=gram_of(even), k=gram_of(line), z=gram_of(torch.full_like(tokens, 2.0)))
    flat, thin, dead = (spectrum(file, f"down_blocks.0.attn1.vo:{name}") for name in "qkz")
    assert flat.effective_rank == pytest.approx(8, rel=1e-5) and flat.condition == pytest.approx(1, rel=1e-3)
    assert torch.allclose(flat.kept, torch.linspace(0, 1, 9, dtype=torch.float64), atol=1e-4)
    assert thin.effective_rank == pytest.approx(1, rel=1e-4) and thin.width_for(0.99) == 1
    assert 1e5 < thin.condition < 1e7  # the ridge of 1e-6 bounds it
    assert dead.effective_rank == 0 and dead.width_for(0.9) == 0 and dead.kept.sum() == 0


def test_known_spectrum_by_head(tmp_path, tokens):
    """Two heads of known variances: places are summed over heads, ranks are averaged."""
    white = torch.linalg.qr(tokens - tokens.mean(0))[0] * 4000**0.5
    scales = torch.tensor([2.0, 1, 1, 0, 1, 1, 1, 1])
    found = spectrum(stored(tmp_path / "s", q=gram_of(white * scales, 2)), "down_blocks.0.attn1.vo:q")
    assert found.values.tolist() == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=1e-4)
    assert found.effective_rank == pytest.approx((36 / 18 + 4) / 2, rel=1e-4)
    assert [found.width_for(share) for share in (0.49, 0.51, 0.91)] == [1, 2, 4]


def test_energies_by_tenth_add_up_and_survive_merging_and_storing(tmp_path, tokens):
    clock = Clock([1.5] * 10 + [0.5] * 10)
    whole, parts = Gram(8), [Gram(8), Gram(8)]
    expected = torch.zeros(TENTHS, dtype=torch.float64)
    for call in range(20):
        clock.call = call
        batch = tokens[call * 200 : (call + 1) * 200] * (1 + call) + 5
        expected[call // 2] += clock.weight() * batch.double().square().sum()
        for gram in (whole, parts[call % 2]):
            gram.add(batch, clock.weight(), clock.tenth())
    assert torch.allclose(whole.energy, expected, rtol=1e-5)
    second = whole.count * whole.moments().second.diagonal(dim1=1, dim2=2).sum()
    assert float(whole.energy.sum()) == pytest.approx(float(second), rel=1e-6)
    parts[0].merge(parts[1])
    assert torch.allclose(parts[0].energy, whole.energy)
    found = spectrum(stored(tmp_path / "s", z=whole), "down_blocks.0.attn1.vo:z").energy
    assert found is not None and torch.allclose(found, expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("missing", ["all", "of the first prompts"])
def test_energies_that_are_not_of_all_tokens_are_not_shown(tmp_path, tokens, missing):
    """A file of an earlier version, or one that such a version began."""
    gram = gram_of(tokens)
    gram.energy.zero_()
    if missing == "of the first prompts":
        gram.add(tokens, tenth=3)
    stored(tmp_path / "s.safetensors", z=gram)
    view = look(tmp_path / "s.safetensors")
    assert isinstance(view, StatisticsView) and view.energy_rows() == []
    assert "Energy by timestep" not in view.html() and "effective rank" in view.table()


def test_calibration_records_energies(model_folder, tmp_path):
    from diffusers import DiffusionPipeline

    from slimdiff.calibrate import collect
    from slimdiff.source import Source

    pipe = DiffusionPipeline.from_pretrained(model_folder)
    recipe = Recipe("sd1", ("cat", "red boat"), ("", ""), 5, 3.0, 16, 16)
    collect(pipe, Source("tiny", "tiny", None), recipe, tmp_path / "s.safetensors")
    stored_tensors = load_file(tmp_path / "s.safetensors")
    energies = {k.removesuffix(".energy"): x for k, x in stored_tensors.items() if k.endswith(".energy")}
    assert set(energies) == set(StatisticsFile(tmp_path / "s.safetensors").metadata["tokens"])
    for key, energy in energies.items():
        assert ((energy > 0) == torch.tensor([True, False] * 5)).all(), key  # five calls fill every other tenth
    keys = next(energy for key, energy in energies.items() if "attn2" in key and key.endswith(":k"))
    assert torch.allclose(keys[::2], keys[0], rtol=1e-5)  # of the text, which no timestep changes


def test_statistics_of_nothing_are_refused(tmp_path):
    stored(tmp_path / "s.safetensors", z=Gram(8))
    with pytest.raises(StatisticsError, match="no tokens at all"):
        look(tmp_path / "s.safetensors")


def test_a_statistic_that_is_not_finite_is_refused(tmp_path, tokens):
    tokens[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        spectrum(stored(tmp_path / "s", q=gram_of(tokens)), "down_blocks.0.attn1.vo:q")
