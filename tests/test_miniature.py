"""The whole way on the bundled miniature, a real trained model: small runs here, the full recipe in the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from slimdiff import pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut
from slimdiff.demo import scenes
from slimdiff.influence import relative_error
from slimdiff.source import DEMO
from slimdiff.statistics import StatisticsFile

SIZE = {"guidance_scale": 4.0, "height": scenes.SIDE, "width": scenes.SIDE}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    pipe = pipeline.load(source.find(None))
    job = recipe.family_recipe("demo", pipeline.native_size(pipe), num_prompts=24, steps=6)
    path = tmp_path_factory.mktemp("miniature") / "s.safetensors"
    collect(pipe, source.find(None), job, path)
    return pipe, StatisticsFile(path)


def final_errors(pipe, unets, captions, steps: int) -> list[torch.Tensor]:
    """Relative squared error of the final latents of each UNet, per caption, against the pipeline's own."""
    conditioning = pipeline.encode(pipe, captions, [""] * len(captions))
    seeds = range(30_000, 30_000 + len(captions))
    dense_unet, found = pipe.unet, []
    dense = pipeline.sample(pipe, conditioning, seeds, steps=steps, **SIZE)
    for unet in unets:
        pipe.unet = unet
        found.append(relative_error(pipeline.sample(pipe, conditioning, seeds, steps=steps, **SIZE), dense))
    pipe.unet = dense_unet
    return found


def test_probing_the_sampler_beats_local_errors_by_far_on_unseen_captions(calibrated):
    pipe, statistics = calibrated
    options = {"probe_prompts": 3, "probe_steps": 4}
    sampler, plan = cut(pipe, statistics, Options(0.45, **options))
    local, _ = cut(pipe, statistics, Options(0.45, influence="local"))
    by_sampler, by_local = final_errors(pipe, (sampler, local), recipe.bench_prompts("demo")[:12], steps=6)
    assert by_sampler.median() < by_local.median() / 2
    assert plan.predicted_error / 30 < by_sampler.median() < plan.predicted_error * 30


def paint(pipe, captions, steps: int = 25) -> dict[str, float]:
    pictures = []
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        conditioning = pipeline.encode(pipe, part, [""] * len(part))
        images = pipeline.sample(pipe, conditioning, range(start, start + len(part)), steps=steps, output="np", **SIZE)
        pictures += [(255 * image).round().astype(np.uint8) for image in images]
    return scenes.mean_scores(pictures, list(captions))


def test_the_text_encoder_loads_in_transformers_4_too():
    """Version 5 saves names without the prefix and reads both; 4 fills what it does not find with random numbers."""
    with safe_open(DEMO / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_the_dense_miniature_paints_what_it_is_asked_for():
    marks = paint(pipeline.load(source.find(None)), scenes.captions(256, seed=11, held_out=True))
    assert marks["mean"] >= 0.90
    assert min(marks.values()) >= 0.80, marks


@pytest.mark.slow
def test_the_three_commands_keep_the_pictures(tmp_path: Path):
    """As typed, with no further argument: accuracy within 0.01 of dense at 35%, and the report says so."""
    for command in (["calibrate"], ["compress", "--budget", "0.35"], ["bench"]):
        subprocess.run([sys.executable, "-m", "slimdiff", *command], cwd=tmp_path, check=True)
    report = json.loads((tmp_path / "slimdiff-out/demo/bench-0.35/report.json").read_text())
    dense, slim = (report["fidelity"]["attributes"][side]["mean"] for side in ("dense", "slim"))
    assert slim >= dense - 0.01
