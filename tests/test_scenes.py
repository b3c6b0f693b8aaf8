"""The miniature's world: captions and scenes are inverses, and the scorer can tell pictures apart."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from slimdiff.demo.scenes import (
    ATTRIBUTES,
    GROUNDS,
    KINDS,
    OPPOSITES,
    PLACES,
    SIDE,
    Scene,
    Thing,
    all_things,
    captions,
    draw,
    is_held_out,
    look,
    mean_scores,
    parse,
    random_scene,
    score,
)


def sample(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def blank(ground: str) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), GROUNDS[ground], dtype=np.uint8)


def test_captions_and_scenes_are_inverses():
    things = all_things()
    every = [Scene((a,), place, ground) for a, place, ground in itertools.product(things, PLACES, GROUNDS)]
    pairs = itertools.product(things[::5], things[::3], OPPOSITES, GROUNDS)
    every += [Scene((a, b), place, ground) for a, b, place, ground in pairs]
    for scene in every + sample(300, seed=0):
        assert parse(scene.caption()) == scene
    assert len({scene.caption() for scene in every}) == len(every)


@pytest.mark.parametrize(
    "text",
    [
        "", "a cat", "a small red circle", "a small red circle on a white background",
        "a small red circle in the centre on a white background.",
        "a small pink circle in the centre on a white background",
        "a small red circle beside a large blue square on a white background",
        "a small red circle on the left and a large blue square at the top on a white background",
        "a small red circle on the right and a large blue square on the left on a white background",
    ],
)  # fmt: skip
def test_other_texts_are_no_scenes(text):
    assert parse(text) is None


def test_drawn_pictures_score_full_marks():
    scenes, rng = sample(300, seed=1), random.Random(2)
    means = mean_scores([draw(scene, rng) for scene in scenes], [scene.caption() for scene in scenes])
    assert means.keys() == {*ATTRIBUTES, "mean"}
    assert means["mean"] >= 0.97
    assert all(means[name] >= 0.95 for name in ATTRIBUTES)
    assert means["mean"] == pytest.approx(np.mean([means[name] for name in ATTRIBUTES]))


def test_pictures_of_other_scenes_score_much_lower():
    scenes, rng = sample(200, seed=3), random.Random(4)
    pictures = [draw(scene, rng) for scene in scenes]
    wrong = mean_scores(pictures, [scene.caption() for scene in scenes[1:] + scenes[:1]])
    assert wrong["mean"] < 0.55
    assert all(wrong[name] < 0.8 for name in ATTRIBUTES)


def test_each_attribute_is_scored_on_its_own():
    asked = Scene((Thing("large", "red", "square"), Thing("large", "blue", "square")), "on the left", "white")
    one, other = asked.things
    changes = {
        "shape": Scene((Thing("large", "red", "cross"), other), "on the left", "white"),
        "colour": Scene((Thing("large", "green", "square"), other), "on the left", "white"),
        "size": Scene((Thing("small", "red", "square"), other), "on the left", "white"),
        "position": Scene((one, other), "at the top", "white"),
        "background": Scene((one, other), "on the left", "black"),
    }
    perfect = score(draw(asked, random.Random(5)), asked)
    assert perfect == dict.fromkeys(ATTRIBUTES, 1.0)
    for name, drawn in changes.items():
        found = score(draw(drawn, random.Random(5)), asked)
        lost = {attribute for attribute in ATTRIBUTES if found[attribute] < 1}
        assert lost == {name}
        assert found[name] == (0.0 if name in ("position", "background") else 0.5)


def test_an_empty_ground_scores_for_its_ground_alone():
    for scene in sample(20, seed=6):
        found = score(blank(scene.ground), scene)
        assert found == {**dict.fromkeys(ATTRIBUTES, 0.0), "background": 1.0}


def test_a_third_thing_and_a_missing_one_change_the_count():
    pair = Scene((Thing("small", "red", "circle"), Thing("small", "blue", "square")), "at the top", "white")
    picture = draw(pair, random.Random(7))
    crowded = picture.copy()
    crowded[2:12, 2:12] = (44, 170, 70)
    assert score(crowded, pair) == {**dict.fromkeys(ATTRIBUTES, 1.0), "count": 0.0}
    single = picture.copy()
    single[: SIDE // 2] = GROUNDS["white"]
    found = score(single, pair)
    assert found == {"count": 0, "shape": 0.5, "colour": 0.5, "size": 0.5, "position": 0, "background": 1}


def test_small_blots_and_soft_noise_are_overlooked():
    scene = Scene((Thing("small", "purple", "triangle"),), "at the top right", "grey")
    picture = draw(scene, random.Random(8))
    picture[40:43, 4:7] = (222, 40, 44)
    noise = np.random.default_rng(9).normal(0, 12, picture.shape)
    noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
    assert score(noisy, scene) == dict.fromkeys(ATTRIBUTES, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_things_are_seen_where_they_are_drawn(kind):
    for place in PLACES:
        scene = Scene((Thing("small", "cyan", kind),), place, "brown")
        ground, (found,) = look(draw(scene, random.Random(10)))
        assert (ground, found.thing) == ("brown", scene.things[0])
        column, row = PLACES[place]
        assert abs(found.x - (9, 24, 39)[column]) < 4
        assert abs(found.y - (9, 24, 39)[row]) < 4


def test_training_and_held_out_captions_never_meet():
    training, held_out = captions(3000, seed=11, held_out=False), captions(400, seed=12, held_out=True)
    assert not set(training) & set(held_out)
    assert len(set(training)) == 3000
    assert not any(map(is_held_out, training))
    assert all(map(is_held_out, held_out))
    share = np.mean([is_held_out(scene.caption()) for scene in sample(4000, seed=13)])
    assert 0.1 < share < 0.15
    assert captions(5, seed=11, held_out=False) == training[:5]


def test_captions_outside_the_grammar_are_left_out():
    scene = sample(1, seed=14)[0]
    picture = draw(scene, random.Random(15))
    assert mean_scores([picture, picture], ["a cat", scene.caption()]) == mean_scores([picture], [scene.caption()])
    assert mean_scores([picture], ["a cat"]) == {}
