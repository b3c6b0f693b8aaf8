"""Recipes and prompt files: what is read, what is refused, what is bundled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from slimdiff.demo import scenes
from slimdiff.errors import SlimdiffError
from slimdiff.recipe import SCHEDULERS, Recipe, bench_prompts, family_recipe, folder, read_prompts

FAMILIES = ("sd1", "sd2", "sdxl", "demo")


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines(name: str) -> list[str]:
    return (folder() / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "a cat\n\n  two dogs \r\n\n", ("a cat", "two dogs")),
        ("a.txt", "\ufeffein Stück Käse\n猫\n", ("ein Stück Käse", "猫")),
        ("a.csv", 'id,prompt\n1,"a cat, sitting"\n2,\n3,a dog\n', ("a cat, sitting", "a dog")),
        ("a.tsv", "id\tprompt\n1\ta cat, sitting\n", ("a cat, sitting",)),
        ("a.csv", '\ufeffprompt,id\n"a ""big"" cat",1\n', ('a "big" cat',)),
        ("a.jsonl", '{"prompt": "a cat", "id": 1}\n\n{"prompt": "a \\u732b"}\n', ("a cat", "a 猫")),
        ("a.jsonl", '{"prompt": "a\u2028b\u0085c"}\n', ("a\u2028b\u0085c",)),  # JSON allows these unescaped
    ],
    ids=["txt", "byte-order mark", "csv", "tsv", "csv with mark", "jsonl", "jsonl with odd separators"],
)
def test_prompts_are_read_as_they_stand(tmp_path, name, text, prompts):
    assert read_prompts(written(tmp_path / name, text)) == prompts


def test_a_prompt_over_two_lines_of_a_table_keeps_its_words_apart(tmp_path):
    (prompt,) = read_prompts(written(tmp_path / "a.csv", 'prompt\n"a cat\non a mat"\n'))
    assert prompt.split() == ["a", "cat", "on", "a", "mat"]


def test_another_column_is_read_by_its_name(tmp_path):
    table = written(tmp_path / "a.csv", "prompt,caption\nwrong,right\n")
    rows = written(tmp_path / "a.jsonl", '{"prompt": "wrong", "caption": "right"}\n')
    assert read_prompts(table, "caption") == read_prompts(rows, "caption") == ("right",)


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("missing.txt", None, "--prompts"),
        ("empty.txt", "", "one on each line"),
        ("blank.txt", "\n  \n", "one on each line"),
        ("header.csv", "prompt,id\n", "one on each line"),
        ("latin.txt", "Käse".encode("latin-1"), "UTF-8"),
        ("other.csv", "text,id\na cat,1\n", "--column"),
        ("commas.csv", "text\na cat, sitting\n", "--column"),
        ("other.jsonl", '{"text": "a cat"}\n', "--column"),
        ("late.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "line 2"),
        ("list.jsonl", '["a cat"]\n', "JSON object"),
        ("huge.csv", "prompt\n" + "x" * 200_000 + "\n", ""),
        ("prompts.md", "a cat\n", ".jsonl"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_a_remedy(tmp_path, name, text, remedy):
    path = tmp_path / name
    if text is not None:
        written(path, text)
    with pytest.raises(SlimdiffError) as error:
        read_prompts(path)
    assert name in str(error.value)
    assert remedy in str(error.value)


def test_the_default_prompts_are_500_distinct_ones():
    for name in ("prompts-500.txt", "prompts-demo.txt"):
        prompts = lines(name)
        assert len({prompt.strip().casefold() for prompt in prompts}) == len(prompts) == 500
        assert all(prompt and prompt == prompt.strip() for prompt in prompts)


def test_the_miniatures_prompts_are_those_of_its_grammar():
    assert lines("prompts-demo.txt") == scenes.captions(500, seed=500, held_out=False)
    assert lines("bench-prompts-demo.txt") == scenes.captions(64, seed=900, held_out=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_recipe_is_complete_and_measured_on_other_prompts(family):
    recipe = family_recipe(family, (64, 48))
    assert (recipe.family, recipe.height, recipe.width, recipe.seed) == (family, 64, 48, 0)
    assert len(recipe.prompts) == len(recipe.negatives) == 500
    assert recipe.steps > 0
    assert recipe.guidance_scale > 1
    measured = bench_prompts(family)
    assert len(set(measured)) == len(measured) > 0
    assert not {p.casefold() for p in measured} & {p.casefold() for p in recipe.prompts}


def test_every_other_prompt_runs_with_a_negative_one_in_turn():
    recipe = family_recipe("sd1", (512, 512))
    negatives = lines("negative-prompts.txt")
    assert set(recipe.negatives[::2]) == {""}
    given = recipe.negatives[1::2]
    assert list(given[: len(negatives)]) == negatives
    assert list(given[len(negatives) : 2 * len(negatives)]) == negatives


def test_the_users_changes_win_and_none_keeps_the_familys_own():
    own = family_recipe("sd1", (512, 512))
    assert family_recipe("sd1", (512, 512), steps=None, scheduler=None, seed=None) == own
    changed = family_recipe("sd1", (512, 512), steps=7, guidance_scale=1.0, height=256, seed=3, scheduler="euler")
    assert changed == replace(own, steps=7, guidance_scale=1.0, height=256, seed=3, scheduler="euler")
    assert family_recipe("sd1", (512, 512), num_prompts=5).prompts == own.prompts[:5]
    mine = family_recipe("sd1", (512, 512), prompts=("a", "b", "c"))
    assert (mine.prompts, len(mine.negatives)) == (("a", "b", "c"), 3)


def test_more_prompts_than_there_are_is_refused_with_both_numbers():
    for arguments, there in (({}, 500), ({"prompts": ("a", "b")}, 2)):
        with pytest.raises(SlimdiffError, match=rf"{there + 1} .*only {there}.*--num-prompts"):
            family_recipe("sd1", (512, 512), num_prompts=there + 1, **arguments)


def test_json_holds_the_whole_recipe_and_any_change_changes_its_digest():
    recipe = family_recipe("demo", (48, 48), num_prompts=4, scheduler="ddim")
    again = Recipe.from_json({**json.loads(json.dumps(recipe.to_json())), "from a newer version": 1})
    assert again == recipe
    assert again.digest() == recipe.digest()
    changes = (
        {"family": "sd1"}, {"prompts": recipe.prompts[::-1]}, {"negatives": recipe.negatives[::-1]}, {"steps": 21},
        {"guidance_scale": 4.5}, {"height": 56}, {"width": 56}, {"scheduler": None}, {"seed": 1},
        {"timestep_weights": "sigma"}, {"baselines": True}, {"resnets": True},
    )  # fmt: skip
    assert {key for change in changes for key in change} == recipe.to_json().keys()
    assert len({replace(recipe, **change).digest() for change in changes} | {recipe.digest()}) == len(changes) + 1


@pytest.mark.parametrize("side", [0, -8, 50])
@pytest.mark.parametrize("name", ["height", "width"])
def test_sizes_that_cannot_be_painted_are_refused(name, side):
    with pytest.raises(SlimdiffError, match=rf"A {name} of {side} pixels.*a multiple of 8"):
        family_recipe("demo", (48, 48), **{name: side})


def test_schedulers_are_those_of_diffusers():
    assert all(hasattr(getattr(diffusers, name), "from_config") for name in SCHEDULERS.values())
