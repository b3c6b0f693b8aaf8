"""Choosing prompts: the rows that pivoted QR takes, a pool better covered than by chance, the UNet left alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNETS, tiny_pipeline, tiny_unet
from scipy.linalg import qr
from test_cli import run

from slimdiff import pipeline, source
from slimdiff.errors import OutputError, SlimdiffError
from slimdiff.prompts import check_output, choose, cover, coverage, embeddings, write
from slimdiff.recipe import folder, read_prompts

POOL = tuple(f"{a} {b}" for a in ("red", "old", "my", "tall", "dim") for b in ("cat", "sea", "hill", "bag"))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    spread = np.random.default_rng(0)
    return spread.normal(size=(60, 12)) * np.geomspace(3, 0.1, 12)


@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_the_rows_are_those_of_pivoted_qr_also_beyond_the_rank(rows, ridge):
    """Columns of [Xᵀ; √ridge I] have the Gram matrix X Xᵀ + ridge I."""
    columns = np.concatenate([rows.T, np.sqrt(ridge) * np.eye(len(rows))])
    count = 12 if ridge < 1 else 40  # with almost no ridge rounding decides beyond the rank
    assert cover(rows, count, ridge) == qr(columns, mode="r", pivoting=True)[1][:count].tolist()


def test_coverage_is_the_distance_from_the_span(rows):
    chosen = [3, 14, 15, 9, 26]
    basis = np.linalg.qr(rows[chosen].T)[0]
    left = np.square(rows - rows @ basis @ basis.T).sum(1)
    energy = np.square(rows).sum(1)
    found = coverage(rows, chosen, 1e-9)
    assert found.overall == pytest.approx(1 - left.sum() / energy.sum(), abs=1e-6)
    assert found.worst == pytest.approx(1 - (left / energy).max(), abs=1e-6)


def test_embeddings_are_means_over_the_text_only(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    ids = pipe.tokenizer("cat")["input_ids"]  # start, three letters, end
    with torch.no_grad():
        tokens = pipe.text_encoder(torch.tensor([ids])).last_hidden_state[0, 1:]
    found = embeddings(pipe, ["a dog", "cat"])
    assert np.allclose(found[1], tokens.mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sdxl"])
def test_only_text_encoders_are_loaded_and_both_of_sdxl(family, tmp_path):
    whole = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(**UNETS[family]))
    whole.save_pretrained(tmp_path / "model")
    for weights in (*(tmp_path / "model/unet").glob("*.safetensors"), *(tmp_path / "model/vae").glob("*.safetensors")):
        weights.write_bytes(b"never read")
    pipe = pipeline.load_text(source.find(str(tmp_path / "model")))
    assert pipe.unet is None and pipe.vae is None
    assert np.allclose(embeddings(pipe, POOL), embeddings(whole, POOL), atol=1e-5)
    assert choose(pipe, POOL, 4).width == whole.unet.config.cross_attention_dim


def test_the_choice_covers_the_miniatures_captions_better_than_chance():
    pipe = pipeline.load_text(source.find(None))
    pool = read_prompts(folder() / "prompts-demo.txt")[:120]
    chosen = choose(pipe, pool, 20)
    assert len(set(chosen.prompts)) == 20 and set(chosen.prompts) <= set(pool)
    assert 1 - chosen.coverage.overall < 0.8 * (1 - chosen.random.overall)
    assert chosen.coverage.worst > chosen.random.worst
    assert choose(pipe, pool, 20) == chosen
    assert choose(pipe, pool, 5).prompts == chosen.prompts[:5]


def test_doubled_prompts_count_once_and_too_many_are_refused(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    assert set(choose(pipe, POOL + POOL, 20).prompts) == set(POOL)
    with pytest.raises(SlimdiffError, match=r"21 prompts were asked for, but the pool has 20 different ones"):
        choose(pipe, POOL + POOL, 21)
    assert choose(pipe, ["one"], 1).prompts == ("one",)


def test_prompts_of_several_lines_stay_one(tmp_path):
    write(["a\nb", "c"], tmp_path / "p.txt")
    assert read_prompts(tmp_path / "p.txt") == ("a b", "c")
    for path in (tmp_path / "p.txt", tmp_path / "p.csv"):
        with pytest.raises(OutputError):
            check_output(path, force=False)


def test_the_command(tmp_path: Path):
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in POOL))
    (tmp_path / "empty.txt").write_text("\n")
    arguments = ("prompts", "--from", tmp_path / "pool.jsonl", "--column", "text", "--device", "cpu", "--model", "demo")
    table = run(*arguments, "--select", 3, "-o", tmp_path / "p.txt")
    assert "3 of 20 different prompts" in table and "random" in table
    assert f"next: slimdiff calibrate demo --prompts {tmp_path / 'p.txt'}\n" in table
    out = run(*arguments, "--select", 3, "--json", "--force", "-o", tmp_path / "p.txt")
    data = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert tuple(data["prompts"]) == read_prompts(tmp_path / "p.txt")
    assert "--force" in run(*arguments, "-o", tmp_path / "p.txt", code=1)
    assert "lower --select" in run(*arguments, "-o", tmp_path / "q.txt", code=1)
    assert "holds no prompt" in run("prompts", "--from", tmp_path / "empty.txt", "-o", tmp_path / "q.txt", code=1)
    assert not (tmp_path / "q.txt").exists()


def test_real_prompts_are_not_read_by_the_miniature_unasked(tmp_path: Path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text("\n".join(POOL))
    Path("shapes.txt").write_text("\n".join(read_prompts(folder() / "prompts-demo.txt")[:6]))
    quick = ("--num-prompts", 1, "--steps", 1, "--device", "cpu")
    choosing = ("--select", 2, "--force", "--device", "cpu", "-o", "p.txt")
    assert "--model" in run("prompts", "--from", "pool.txt", *choosing, code=1)
    run("calibrate", *quick)
    assert "--model" in run("prompts", "--from", "pool.txt", *choosing, code=1)
    assert "next: slimdiff calibrate --prompts p.txt\n" in run("prompts", "--from", "shapes.txt", *choosing)
    run("calibrate", model_folder, *quick)
    out = run("prompts", "--from", "pool.txt", *choosing)
    assert f"model: {model_folder}, as in slimdiff-out/tiny/statistics.safetensors" in out
    assert f"next: slimdiff calibrate {model_folder} --prompts p.txt\n" in out and "embeddings of 12" in out
