"""The benchmark script of benchmarks/quality.py: what it runs, what it skips, what it concludes, and its yardstick."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from slimdiff import methods, pipeline, source
from slimdiff.demo import scenes
from slimdiff.groups import KINDS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality
import yardstick

COMMON = {"fingerprint": "f", "steps": 25, "captions": 2}


def row(way: str, budget: float, final: list[float], of: str = "macs", seed: int = 0, **others: object) -> dict:
    """A finished row as the script writes it."""
    return {
        **COMMON, "mode": "main", "way": way, "method": quality.parse(way).method, "budget": budget, "of": of,
        "seed": seed, "prompts": 500, "final": final, "mse": [1.0, 4.0], "ssim": [0.9, 0.8],
        "accuracy": {"mean": 0.95}, "dense_accuracy": {"mean": 0.955}, "timesteps": [961.0, 1.0], "noise": [1e-4, 1e-5],
        "predicted_error": final[0], "lower_bound": final[0] / 2, **others,
    }  # fmt: skip


def asked(**changes: object) -> argparse.Namespace:
    ways = [quality.parse("slimdiff"), quality.parse("paper")]
    plain = {"seeds": [0, 1], "budgets": [0.2, 0.5], "of": ["macs"], "ways": ways, "prompts": 500}
    return argparse.Namespace(**{**plain, "ablation": False, "prompt_counts": [], "chosen": False, **changes})


def test_ways():
    assert quality.parse("slimdiff") == quality.Way("slimdiff")
    assert quality.parse("svd-llm:sampler") == quality.Way("svd-llm:sampler", "svd-llm", "sampler")
    both = quality.parse("paper:noise+refine+independent").options(0.3, "macs")
    assert (both.method, both.influence, both.budget, both.of) == ("paper", "noise", 0.3, "macs")
    assert both.refine and both.independent_ranks
    assert quality.parse("obs").options(0.3, "groups").influence is None
    assert [quality.parse(name).name for name in quality.WAYS] == quality.WAYS


@pytest.mark.parametrize("name", ["", "pruner", "slimdiff:", "slimdiff:all", "slimdiff+fast", "slimdiff+", "+refine"])
def test_what_is_no_way(name):
    with pytest.raises(argparse.ArgumentTypeError, match="is no way"):
        quality.parse(name)


def test_jobs_of_the_modes():
    assert len(list(quality.jobs(asked()))) == 8
    ablation = list(quality.jobs(asked(ablation=True)))
    assert {job.way.name for job in ablation if job.mode == "ablation"} == {
        "no key centring", "value covariances", "each head alone", "ridge leverage", "no guidance in the sums",
        "no bias correction", "no refitted output", "timesteps decreasing", "timesteps sigma",
    }  # fmt: skip
    assert all(job.way.name in quality.WAYS for job in ablation if job.mode == "main")
    counts = list(quality.jobs(asked(prompt_counts=[8, 500])))
    assert {(job.prompts, job.mode) for job in counts} == {(8, "prompts"), (500, "main")}
    counts = list(quality.jobs(asked(prompt_counts=[8, 500], chosen=True)))
    assert {(job.prompts, job.mode) for job in counts} == {(8, "chosen"), (500, "main")}


def test_variants_change_one_kind_of_group_each():
    own = methods.METHODS["slimdiff"]
    found = quality.variants()
    assert not set(found) & set(methods.METHODS)
    assert all((one.kinds, one.influence) == (own.kinds, own.influence) for one in found.values())
    assert not any(one.adapters for one in found.values())  # whitened and selected dimensions have no maps for them


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path):
    path, measured = tmp_path / "out/rows.jsonl", []

    def compute(job):
        measured.append((job.way.name, job.budget, job.seed))
        return {"final": [0.5]}

    first = list(quality.jobs(asked(seeds=[0])))
    quality.work_off(first[:3], path, COMMON, compute)
    assert len(measured) == 3 and len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text()[:-9])  # killed while writing
    measured.clear()
    quality.work_off(list(quality.jobs(asked())), path, COMMON, compute)
    assert len(measured) == 6 and measured[0] == ("paper", 0.2, 0)
    assert len({json.dumps(one) for one in yardstick.read(path)}) == 8
    quality.work_off(list(quality.jobs(asked())), path, COMMON, lambda job: pytest.fail("measured again"))
    measured.clear()
    for changed in ({"fingerprint": "g"}, {"steps": 3}, {"captions": 1}):
        quality.work_off(first[:1], path, {**COMMON, **changed}, compute)
    assert len(measured) == 3


def rows() -> list[dict]:
    return [
        row("slimdiff", 0.35, [1e-4, 2e-4, 3e-4]),
        row("slimdiff", 0.35, [1e-4, 2e-4, 3e-4], seed=1),
        row("paper:uniform", 0.35, [5e-3, 5e-3, 5e-3]),
        row("paper:uniform", 0.35, [5e-3, 5e-3, 5e-3], seed=1),
        row("wanda", 0.35, [5e-4, 5e-4, 9e-1]),
        row("wanda", 0.35, [5e-4, 5e-4, 9e-1], seed=1),
        row("slimdiff", 0.5, [1e-3, 1e-3, 1e-3], accuracy={"mean": 0.93}, predicted_error=3e-3),
        {**COMMON, "mode": "main", "way": "obs", "method": "obs", "budget": 0.5, "of": "macs", "seed": 0,
         "prompts": 500, "impossible": "too much"},
    ]  # fmt: skip


def test_goals_pass_and_fail():
    found = {goal: mark for goal, _, mark in yardstick.goals(rows())}
    assert found["0.35 of MACs: median at most 1/10 of paper:uniform"] == "pass"  # 25 times less
    assert found["0.35 of MACs: median at most 1/3 of the best baseline, wanda"] == "FAIL"  # 2.5 times
    assert found["0.35 of MACs: 90th percentile at most 1/3 of the best baseline, paper:uniform"] == "pass"
    assert found["0.5 of MACs: median at most 1/5 of paper:uniform"] == "not measured"
    assert found["0.5 of MACs: accuracy within 0.01 of dense"] == "FAIL"
    same = "predicted error within a factor of 2 of the median"
    assert [found[f"{budget} of MACs: {same}"] for budget in (0.2, 0.35, 0.5)] == ["not measured", "pass", "FAIL"]
    assert len(found) == 12


def test_report_tables():
    found = [*rows(), row("slimdiff", 0.35, [9e-4, 9e-4, 9e-4], prompts=8, mode="prompts")]
    found.append({**row("slimdiff", 0.35, [4e-4, 4e-4, 4e-4], mode="ablation"), "way": "ridge leverage"})
    text = quality.report(found, [one for one in found if one["mode"] == "main"], "demo", [("a.png", "A")])
    assert "| slimdiff | 2.0e-04 / 3.0e-04 / 3.0e-04 | 1.0e-03 / 1.0e-03 / 1.0e-03 † |" in text
    assert "| obs |  | cannot |" in text
    assert "| wanda | 44.2 / 0.8500 / 0.950 |  |" in text  # 10 lg(255² / 2.5)
    assert "accuracy (dense: 0.955)" in text
    assert "| 0.35 of the groups' MACs | 1.0e-04 | 5.0e-05 | 2.0e-04 | 0.50 |" in text
    assert "| ridge leverage | 4.0e-04 / 4.0e-04 / 4.0e-04 (2.00 times) † |" in text
    assert "| 8 | 9.0e-04 / 9.0e-04 / 9.0e-04 † |" in text
    assert "![A](a.png)" in text


def test_an_interrupted_prompt_is_infinitely_wrong_and_does_not_stop_the_tables():
    broken = [row("random", 0.35, [float("inf"), float("inf"), 1.0])]
    back = [json.loads(json.dumps(one)) for one in broken]
    assert yardstick.errors(back) == "inf / inf / inf"


def test_plots_and_contact_sheet(tmp_path: Path):
    pytest.importorskip("matplotlib")
    found = [row("slimdiff", budget, [1e-4, 2e-4]) for budget in (0.2, 0.35)]
    found += [row("slimdiff", 0.35, [9e-4, 9e-4], prompts=8, mode="prompts")]
    picture = scenes.draw(scenes.parse("a large red circle in the centre on a white background"), random.Random(0))
    yardstick.save_strip([picture] * 9, tmp_path / "pictures/dense.png")
    yardstick.save_strip([picture] * 9, quality.strip(tmp_path, "slimdiff", 0.35))
    drawn = quality.draw(found, found[:2], tmp_path, ["a large red circle in the centre on a white background"] * 9)
    assert [file for file, _ in drawn] == ["budgets-macs.png", "timesteps.png", "prompts.png", "pictures.png"]
    assert all((tmp_path / file).is_file() for file, _ in drawn)
    assert Image.open(tmp_path / "pictures/dense.png").size == (48, 8 * 48)
    sheet = Image.open(tmp_path / "pictures.png")
    assert sheet.size == (192 + 2 * 100, 30 + 8 * 96)


@pytest.fixture(scope="module")
def measured():
    pipe = pipeline.load(source.find(None))
    return pipe, yardstick.Yardstick(pipe, scenes.captions(2, seed=900, held_out=True), steps=2)


def test_all_methods_remove_shares_of_the_same_whole(measured, tmp_path: Path):
    bench = quality.Bench(measured[0], source.find(None), 2, 2, tmp_path)
    held = {name: bench.held(method.kinds, "macs") for name, method in methods.METHODS.items()}
    assert held["slimdiff"] == held["paper"] == held["obs"] == bench.held(KINDS, "macs")
    assert held["svd-llm"] < held["slimdiff"]  # hence its budget is a larger share of its own groups
    assert bench.held(("linear",), "unet") == bench.held(KINDS, "unet")


def test_the_dense_unet_has_no_error_at_all(measured, tmp_path: Path):
    pipe, measure = measured
    dense = pipe.unet
    found = measure.measure(dense, tmp_path / "strip.png")
    assert found["final"] == [0, 0] and found["mse"] == [0, 0] and found["noise"] == [0, 0]
    assert found["ssim"] == pytest.approx([1, 1])
    assert found["accuracy"] == found["dense_accuracy"] and set(found["accuracy"]) == {*scenes.ATTRIBUTES, "mean"}
    assert len(found["timesteps"]) == 2 and found["timesteps"][0] > found["timesteps"][1]
    assert pipe.unet is dense and not dense._forward_hooks
    assert Image.open(tmp_path / "strip.png").size == (48, 96)
    assert json.loads(json.dumps(found)) == found


def test_a_changed_unet_has_some_and_a_broken_one_any(measured):
    pipe, measure = measured
    weight = pipe.unet.conv_out.bias
    before = weight.data.clone()
    try:
        weight.data += 0.1
        found = measure.measure(pipe.unet)
        assert all(0 < error < 1 for error in [*found["final"], *found["noise"]])
        weight.data += torch.nan
        assert measure.measure(pipe.unet)["final"] == [float("inf")] * 2
    finally:
        weight.data = before
