"""`slimdiff eval` from end to end on tiny models and stand-in weights: what is painted, kept, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DiffusionPipeline
from PIL import Image

import slimdiff
from slimdiff import painting
from slimdiff.cli import main
from slimdiff.errors import OutputError, SlimdiffError
from slimdiff.measured import Settings
from slimdiff.metrics import choice

WORDS = ("cat", "red boat", "hill", "big owl", "the sea")
SIZE: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def dense(model_folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def slim_folder(dense: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    statistics = slimdiff.calibrate(dense, WORDS[:2], folder / "s.safetensors", **SIZE)
    slimdiff.save(slimdiff.compress(dense, statistics, 0.35, influence="local"), folder / "slim-0.35")
    return folder / "slim-0.35"


@pytest.fixture(scope="module")
def slim(slim_folder: Path) -> DiffusionPipeline:
    return slimdiff.load(slim_folder)


def evaluate(dense: Any, slim: Any, output: Path, clip_folder: Path, **changes: Any) -> Any:
    """With the one metric that is fast, unless told otherwise."""
    options = SIZE | {"metrics": ["clip"], "clip_model": str(clip_folder), "batch_size": 2} | changes
    return slimdiff.evaluate(dense, slim, options.pop("prompts", WORDS), output, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_pictures_are_those_of_the_pipelines_shrunk(dense, slim, clip_folder, tmp_path):
    found = evaluate(dense, slim, tmp_path, clip_folder, size=16, prompts=WORDS[:2])
    assert found.size == (16, 16) and sorted(contents(tmp_path)) == [
        f"{side}/{name}.png" for side in ("dense", "slim") for name in ("000000", "000001")
    ]
    for side, pipe in (("dense", dense), ("slim", slim)):
        pipe.set_progress_bar_config(disable=True)
        [full] = pipe(
            WORDS[1], num_inference_steps=2, guidance_scale=3.0, height=32, width=32,
            generator=torch.Generator().manual_seed(10_001),
        ).images  # fmt: skip
        expected = np.asarray(full.resize((16, 16), Image.Resampling.BICUBIC), float)
        kept = np.asarray(Image.open(tmp_path / side / "000001.png"), float)
        assert np.abs(kept - expected).max() <= 1
    assert painting.shrunk(Settings.like(SIZE, WORDS, width=64), 16) == (32, 16)
    assert painting.shrunk(Settings.like(SIZE, WORDS), 256) == (32, 32)


def test_a_stopped_run_goes_on_where_it_was(dense, slim, clip_folder, tmp_path, monkeypatch):
    whole = evaluate(dense, slim, tmp_path / "whole", clip_folder)
    really, calls = painting.paint, []

    def counted(pipe: Any, job: Any, chosen: Any, **kwargs: Any) -> Any:
        calls.append(list(chosen))
        if len(calls) == 4:
            raise KeyboardInterrupt  # while the slim model paints the second batch
        return really(pipe, job, chosen, **kwargs)

    monkeypatch.setattr(painting, "paint", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(dense, slim, tmp_path / "stopped", clip_folder)
    assert sorted(contents(tmp_path / "stopped")) == [
        *(f"dense/00000{i}.png" for i in range(4)), *(f"slim/00000{i}.png" for i in range(2)),
    ]  # fmt: skip
    assert not (tmp_path / "stopped" / "eval.json").exists()
    found = evaluate(dense, slim, tmp_path / "stopped", clip_folder)
    assert calls[4:] == [[2, 3], [2, 3], [4], [4]]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole") and found.scores == whole.scores

    calls.clear()  # another metric costs no painting
    again = evaluate(dense, slim, tmp_path / "stopped", clip_folder)
    assert calls == [] and again.scores == whole.scores


def test_more_prompts_go_on_fewer_take_the_first(dense, slim, clip_folder, tmp_path):
    evaluate(dense, slim, tmp_path, clip_folder, prompts=WORDS[:3])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(evaluate(dense, slim, tmp_path, clip_folder).settings.prompts) == 5
    few = evaluate(dense, slim, tmp_path, clip_folder, num_prompts=2)
    assert len(few.settings.prompts) == 2 and len(contents(tmp_path)) == 10
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((tmp_path / "pictures.json").read_text())["prompts"] == list(WORDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 3}, r"other steps \(2, not 3\)"), ({"seed": 1}, r"other seed \(10000, not 1\)"),
     ({"size": 16}, "other size"), ({"prompts": ("dog", *WORDS[1:])}, "other prompts"),
     ({"steps": 3, "height": 16}, "other steps, height, size")],
)  # fmt: skip
def test_pictures_of_something_else_are_never_mixed_in(dense, slim, clip_folder, tmp_path, changes, message):
    evaluate(dense, slim, tmp_path, clip_folder, prompts=WORDS[:1])
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=message):
        evaluate(dense, slim, tmp_path, clip_folder, **changes)
    assert contents(tmp_path) == before


def test_pictures_of_another_model_or_of_nobody_knows_what_are_refused(dense, slim, clip_folder, tmp_path):
    evaluate(dense, slim, tmp_path, clip_folder, prompts=WORDS[:1])
    other = slimdiff.load(slim.config._name_or_path)
    next(other.unet.parameters()).data += 1
    with pytest.raises(OutputError, match="other slim model"):
        evaluate(dense, other, tmp_path, clip_folder)
    (tmp_path / "pictures.json").write_text("{}")
    with pytest.raises(OutputError, match=r"pictures\.json cannot be read"):
        evaluate(dense, slim, tmp_path, clip_folder)
    (tmp_path / "pictures.json").unlink()
    with pytest.raises(OutputError, match=r"no pictures\.json"):
        evaluate(dense, slim, tmp_path, clip_folder)


def test_pictures_go_if_nobody_keeps_them(dense, slim, clip_folder, tmp_path):
    evaluate(dense, slim, tmp_path, clip_folder, keep_images=False)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_nothing_is_painted_that_cannot_be_measured(dense, slim, clip_folder, metric_weights, tmp_path):
    with pytest.raises(SlimdiffError, match="more than one prompt"):
        evaluate(dense, slim, tmp_path / "a", clip_folder, metrics=["fid"], weights=metric_weights, num_prompts=1)
    with pytest.raises(SlimdiffError, match="at least 31 px"):
        evaluate(dense, slim, tmp_path / "a", clip_folder, metrics=["lpips"], weights=metric_weights, size=16)
    with pytest.raises(SlimdiffError, match="holds 0 pictures"):
        evaluate(
            dense, slim, tmp_path / "a", clip_folder, metrics=["fid"], weights=metric_weights, reference=tmp_path
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_a_model_is_as_good_as_itself(dense, slim_folder, clip_folder, metric_weights, tmp_path):
    same = slimdiff.compress(dense, slim_folder.with_name("s.safetensors"), 0, influence="local")
    found = evaluate(
        dense, same, tmp_path, clip_folder, metrics=("clip", "fid", "lpips"), weights=metric_weights, fid_features=64
    )
    clip, fid, lpips = found.scores
    assert clip.difference.value == pytest.approx(0, abs=0.05) and clip.dense.error > 0
    assert fid.slim.value == pytest.approx(0, abs=1e-2) and lpips.slim.value == pytest.approx(0, abs=1e-3)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result


def test_the_command_takes_a_file_of_captions_and_prints_a_table(
    slim_folder, model_folder, clip_folder, metric_weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{i},"{word}"\n' for i, word in enumerate(WORDS))
    Path("captions.csv").write_text(f"image_id,caption\n{rows}")
    weights = ["--clip-model", clip_folder, "--weights", metric_weights, "--fid-features", 64, "--device", "cpu"]
    quick = ["--steps", 2, "--height", 32, "--width", 32, "--num-prompts", 3]
    out = run(
        model_folder, slim_folder, "--metrics", "clip,fid,lpips", "--prompts", "captions.csv", "--column", "caption",
        *quick, *weights,
    ).stdout  # fmt: skip
    for words in ("Score", "CLIP score", "FID", "LPIPS", "slim - dense", "±", "DENSE ones", "3 prompts, 2 steps"):
        assert words in out
    folder = slim_folder.parent / "eval-0.35"
    data = json.loads((folder / "eval.json").read_text())
    assert [score["name"] for score in data["scores"]] == ["CLIP score", "FID", "LPIPS"]
    assert data["settings"]["prompts"] == list(WORDS[:3]) and data["settings"]["measured_size"] == [32, 32]

    # A single path may be the slim checkpoint; without --steps there are 25.
    printed = run(slim_folder, "--metrics", "clip", "--json", "-o", "other", "--no-keep-images", *quick[2:], *weights)
    data = json.loads(printed.stdout)
    assert data["settings"]["steps"] == 25 and data["settings"]["guidance_scale"] == 3.0
    assert [path.name for path in Path("other").iterdir()] == ["eval.json"]


def test_mistakes_get_one_paragraph(slim_folder, model_folder, clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'is' is not a metric; choose from clip, fid, lpips" in run("--metrics", "clip,is", code=2).output
    assert "no slim checkpoint under" in run(model_folder, code=1).output
    assert "not a slim checkpoint" in run(slim_folder, model_folder, code=1).output
    said = run(slim_folder, "--metrics", "clip", "--clip-model", tmp_path, code=1).output
    assert "nothing was painted" in said and "--clip-model" in said


def test_names_of_metrics_are_the_same_everywhere():
    from slimdiff.commands.parameters import METRIC_NAMES

    with pytest.raises(SlimdiffError, match=", ".join(METRIC_NAMES)):
        choice.load(["none of them"])
