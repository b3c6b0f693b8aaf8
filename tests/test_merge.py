"""Parts of a calibration add up to the whole, whoever ran them, and nothing else is taken for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_pipeline, tiny_unet
from test_calibrate import RECIPE, SOURCE, assert_close, interrupt_after, sums
from test_cli import QUICK, run

from slimdiff import states
from slimdiff.calibrate import Interrupted, collect
from slimdiff.errors import OutputError, SlimdiffError, StatisticsError
from slimdiff.merge import merge
from slimdiff.pipeline import fingerprint
from slimdiff.recipe import Shard
from slimdiff.statistics import StatisticsFile


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def parts(pipe, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts of the recipe's five prompts, and the whole behind them; states of four prompts are kept."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "PROMPTS", 4)
        for n in (1, 2, 3):
            collect(pipe, SOURCE, RECIPE, folder / f"{n}", batch_size=3, shard=Shard(n, 3))
        collect(pipe, SOURCE, RECIPE, folder / "whole", batch_size=3)
    return [folder / name for name in ("1", "2", "3", "whole")]


@pytest.mark.parametrize(("count", "of"), [(500, 16), (5, 3), (5, 5), (7, 1)])
def test_parts_hold_every_prompt_once_and_in_order(count, of):
    ranges = [Shard(n, of).of(count) for n in range(1, of + 1)]
    assert [i for part in ranges for i in part] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_all_kinds_of_sums_are_merged(pipe, tmp_path):
    job = replace(RECIPE, baselines=True, resnets=True, timestep_weights="decreasing")
    for n in (1, 2):
        collect(pipe, SOURCE, job, tmp_path / f"{n}", shard=Shard(n, 2))
    collect(pipe, SOURCE, job, tmp_path / "whole")
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    whole = sums(tmp_path / "whole")
    assert any(name.endswith("shifted") for name in whole)
    assert_close(whole, sums(tmp_path / "all"), tolerance=1e-4)


def test_merged_parts_are_the_whole(parts, pipe, tmp_path):
    *pieces, whole = parts
    assert [StatisticsFile(path).done for path in pieces] == [1, 2, 2]
    done = merge([pieces[2], pieces[0], pieces[1]], tmp_path / "all")
    assert (done.prompts, done.parts) == (5, 3)
    assert_close(sums(whole), sums(tmp_path / "all"), tolerance=1e-4)
    told, expected = (StatisticsFile(path).metadata for path in (tmp_path / "all", whole))
    assert {k: v for k, v in told.items() if k != "checksums"} == {
        k: v for k, v in expected.items() if k != "checksums"
    }
    StatisticsFile(tmp_path / "all").check_model(fingerprint(pipe.unet), "tiny")


def test_states_are_those_of_the_first_prompts_in_order(parts, tmp_path):
    *pieces, whole = parts
    assert [set(StatisticsFile(path).states().prompts) for path in pieces] == [{0}, {1, 2}, {3}]
    merge(pieces, tmp_path / "all")
    merged, expected = (StatisticsFile(path).states() for path in (tmp_path / "all", whole))
    assert merged.prompts == expected.prompts == sorted(merged.prompts)
    assert merged.timesteps == expected.timesteps


def test_a_part_is_resumed_within_itself(parts, tmp_path):
    stopped, pipe = tmp_path / "2", tiny_pipeline(tmp_path / "tokenizer")
    job = {"batch_size": 1, "shard": Shard(2, 3)}
    interrupt_after(pipe, 2)
    with pytest.raises(Interrupted, match="1 of 2 prompts"):
        collect(pipe, SOURCE, RECIPE, stopped, **job)
    with pytest.raises(StatisticsError, match=r"another part of the prompts \(2/3\)"):
        collect(pipe, SOURCE, RECIPE, stopped, batch_size=1, shard=Shard(3, 3))
    assert collect(pipe, SOURCE, RECIPE, stopped, **job).resumed_at == 1
    assert_close(sums(parts[1]), sums(stopped), tolerance=1e-4)
    assert collect(pipe, SOURCE, RECIPE, stopped, **job).was_there
    with pytest.raises(OutputError, match="another calibration"):
        collect(pipe, SOURCE, RECIPE, stopped)


def test_a_part_alone_is_refused_by_compression(parts, pipe):
    with pytest.raises(StatisticsError, match=r"part 2/3 .* 2 of 5 prompts\. Put all parts together .*slimdiff merge"):
        StatisticsFile(parts[1]).check_model(fingerprint(pipe.unet), "tiny")


def test_parts_that_are_missing_doubled_or_whole_are_named(parts, tmp_path):
    one, two, three, whole = parts
    with pytest.raises(StatisticsError, match=r"Of 3 parts 1/3, 3/3 are missing.*--shard 1/3"):
        merge([two], tmp_path / "all")
    shutil.copy(two, tmp_path / "again")
    with pytest.raises(StatisticsError, match=r"2 and .*again are both part 2/3"):
        merge([one, two, three, tmp_path / "again"], tmp_path / "all")
    with pytest.raises(StatisticsError, match=r"whole is no part"):
        merge([one, whole], tmp_path / "all")
    with pytest.raises(StatisticsError, match="no statistics file"):
        merge([one, tmp_path / "none"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    (tmp_path / "all").write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        merge([one, two, three], tmp_path / "all")
    assert merge([one, two, three], tmp_path / "all", force=True).prompts == 5


def test_parts_of_other_calibrations_are_refused(parts, pipe, tmp_path):
    other = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(seed=3))
    trailing = tiny_pipeline(tmp_path / "tokenizer", timestep_spacing="trailing")
    for name, kind, recipe, shard in (
        ("another model", other, RECIPE, Shard(2, 3)),
        ("another recipe", pipe, replace(RECIPE, seed=9), Shard(2, 3)),
        ("another scheduler's timestep_spacing", trailing, RECIPE, Shard(2, 3)),
        ("2 parts, not 3", pipe, RECIPE, Shard(2, 2)),
        ("other layers", pipe, RECIPE, Shard(2, 3)),
    ):
        collect(kind, SOURCE, recipe, tmp_path / name, shard=shard)
        if name == "other layers":
            read = StatisticsFile(tmp_path / name).read()
            del read.grams[next(iter(read.grams))]
            read.write(tmp_path / name)
        with pytest.raises(StatisticsError, match=name):
            merge([parts[0], tmp_path / name, parts[2]], tmp_path / "all")


def test_unfinished_parts_are_refused(parts, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    interrupt_after(pipe, 1)
    with pytest.raises(Interrupted):
        collect(pipe, SOURCE, RECIPE, tmp_path / "2", batch_size=1, shard=Shard(2, 3))
    with pytest.raises(StatisticsError, match=r"2\.partial covers 1 of 2 prompts"):
        merge([parts[0], tmp_path / "2.partial", parts[2]], tmp_path / "all")


def test_more_parts_than_prompts(pipe, tmp_path):
    with pytest.raises(SlimdiffError, match=r"Part 1/9 of 5 prompts is empty; make fewer parts"):
        collect(pipe, SOURCE, RECIPE, tmp_path / "s", shard=Shard(1, 9))


def test_parts_are_calibrated_merged_and_compressed_by_command(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("calibrate", model_folder, *QUICK, "--shard", "2/2")
    out = run("calibrate", model_folder, *QUICK, "--shard", "1/2")
    assert "part 1/2" in out and "next: slimdiff merge" in out
    one, two = (Path(f"slimdiff-out/tiny/statistics-{n}-of-2.safetensors") for n in (1, 2))
    options = ("--influence", "local", "--device", "cpu", "--dry-run")
    assert "slimdiff merge PART... -o ALL" in run("compress", one, *options, code=1)
    assert "1 of 2, part 1/2" in run("inspect", one)
    assert "--shard 2/2" in run("merge", one, code=1)
    assert "2 prompts of 2 parts" in run("merge", two, one)
    assert "achieved" in run("compress", *options)


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/2/3", "-1/4"])
def test_what_is_no_part_is_a_usage_error(text, tmp_path):
    assert "the first of 16 is 1/16" in run("calibrate", "--shard", text, "-o", tmp_path / "s", code=2)
