"""The miniature's world: scenes of flat shapes, their captions, their drawing and their scoring.

A scene holds one or two things on a plain ground. `Scene.caption()` and `parse()` are inverses, so a caption alone is
enough to score a picture: `score()` segments it by colour, takes connected components and compares what it finds with
what was asked for. Nothing here needs a network or a learned model.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SIDE = 48
"""Side of a picture in pixels."""

COLOURS = {
    "red": (222, 40, 44),
    "green": (44, 170, 70),
    "blue": (48, 84, 222),
    "yellow": (244, 212, 48),
    "purple": (150, 52, 190),
    "cyan": (64, 204, 214),
}
GROUNDS = {"white": (246, 246, 246), "black": (18, 18, 18), "grey": (128, 128, 128), "brown": (116, 76, 44)}
KINDS = ("circle", "square", "triangle", "cross")
RADII = {"small": 5.5, "large": 10.0}
COLUMNS = ROWS = (9.0, 24.0, 39.0)
PLACES = {
    "at the top left": (0, 0), "at the top": (1, 0), "at the top right": (2, 0),
    "on the left": (0, 1), "in the centre": (1, 1), "on the right": (2, 1),
    "at the bottom left": (0, 2), "at the bottom": (1, 2), "at the bottom right": (2, 2),
}  # fmt: skip
OPPOSITES = {"on the left": "on the right", "at the top": "at the bottom"}
"""Where the first of two things may lie, and where the second lies then."""

ATTRIBUTES = ("count", "shape", "colour", "size", "position", "background")


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    kind: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One or two things; `place` is the first one's, and a second one lies opposite."""

    things: tuple[Thing, ...]
    place: str
    ground: str

    def caption(self) -> str:
        """Each thing names its own place: a causal text encoder could not tell an earlier word of a later one."""
        placed = zip(self.things, (self.place, OPPOSITES.get(self.place, "")), strict=False)
        return " and ".join(f"{thing} {place}" for thing, place in placed) + f" on a {self.ground} background"


def all_things() -> list[Thing]:
    return [Thing(*words) for words in itertools.product(RADII, COLOURS, KINDS)]


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn evenly: one thing in a third of the scenes, two in the others, never the same thing twice."""
    first = rng.choice(all_things())
    ground = rng.choice(list(GROUNDS))
    if rng.random() < 1 / 3:
        return Scene((first,), rng.choice(list(PLACES)), ground)
    second = rng.choice([thing for thing in all_things() if thing != first])
    return Scene((first, second), rng.choice(list(OPPOSITES)), ground)


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the eighth of all captions that training never sees."""
    return hashlib.sha256(caption.encode()).digest()[0] < 32


def scenes(seed: int, held_out: bool) -> Iterator[Scene]:
    """An endless stream of scenes from one side of the training split; a scene may come again."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if is_held_out(scene.caption()) == held_out:
            yield scene


def captions(count: int, seed: int, held_out: bool) -> list[str]:
    """`count` distinct captions from one side of the training split (which holds some 17300 and 2500 of them)."""
    chosen: dict[str, None] = {}
    for scene in scenes(seed, held_out):
        chosen.setdefault(scene.caption())
        if len(chosen) == count:
            break
    return list(chosen)


_THING = rf"a ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
_GROUND = rf"on a ({'|'.join(GROUNDS)}) background"
_PLACE = rf"({'|'.join(PLACES)})"
_ONE = re.compile(rf"{_THING} {_PLACE} {_GROUND}")
_TWO = re.compile(rf"{_THING} {_PLACE} and {_THING} {_PLACE} {_GROUND}")


def parse(caption: str) -> Scene | None:
    """The scene a caption describes, or None if it is not a caption of this grammar."""
    if found := _ONE.fullmatch(caption):
        *thing, place, ground = found.groups()
        return Scene((Thing(*thing),), place, ground)
    if found := _TWO.fullmatch(caption):
        *first, place, size, colour, kind, opposite, ground = found.groups()
        if OPPOSITES.get(place) == opposite:
            return Scene((Thing(*first), Thing(size, colour, kind)), place, ground)
    return None


def _distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the edge of a shape centred at the origin; negative inside."""
    if kind == "circle":
        return np.hypot(x, y) - radius
    if kind == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * radius
    if kind == "triangle":
        slope = 0.894 * abs(x) - 0.447 * (y + 1.05 * radius)
        return np.maximum(slope, y - 0.95 * radius)
    arm, reach = 0.36 * radius, 1.05 * radius
    bar = np.maximum(abs(x) - reach, abs(y) - arm)
    return np.minimum(bar, np.maximum(abs(x) - arm, abs(y) - reach))


def _mask(kind: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Coverage in [0, 1] of each pixel, (SIDE, SIDE), anti-aliased over one pixel."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return np.clip(0.5 - _distance(kind, x - centre[0], y - centre[1], radius), 0, 1)


def _direction(pair: Scene) -> tuple[int, int]:
    """From the first thing to the second: x to the right, y downwards."""
    column, row = PLACES[pair.place]
    return 1 - column, 1 - row


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """A picture of the scene, (SIDE, SIDE, 3) uint8, with a little jitter in place and size."""

    def jitter(amount: float) -> float:
        return rng.uniform(-amount, amount)

    if len(scene.things) == 1:
        column, row = PLACES[scene.place]
        centres = [(COLUMNS[column] + jitter(1.5), ROWS[row] + jitter(1.5))]
    else:
        across, down = _direction(scene)
        drift = jitter(4)
        centres = [
            (SIDE / 2 + side * 12 * across + jitter(1) + drift * abs(down),
             SIDE / 2 + side * 12 * down + jitter(1) + drift * abs(across))
            for side in (-1, 1)
        ]  # fmt: skip
    picture = np.empty((SIDE, SIDE, 3))
    picture[:] = GROUNDS[scene.ground]
    for thing, centre in zip(scene.things, centres, strict=True):
        cover = _mask(thing.kind, centre, RADII[thing.size] + jitter(0.4))[..., None]
        picture = picture * (1 - cover) + np.array(COLOURS[thing.colour]) * cover
    return picture.round().astype(np.uint8)


@dataclass(frozen=True)
class Found:
    """A thing seen in a picture; `x` and `y` are its box's centre in pixels of a SIDE x SIDE picture."""

    thing: Thing
    x: float
    y: float


_PALETTE_NAMES = (*GROUNDS, *COLOURS)
_PALETTE = np.array([*GROUNDS.values(), *COLOURS.values()], dtype=float)
_TEMPLATES = {  # per kind: the shape at a radius of 1, on a 16 x 16 grid over its own bounding box
    kind: (lambda mask: mask[np.ix_(mask.any(1), mask.any(0))])(_mask(kind, (24, 24), 18) > 0.5) for kind in KINDS
}


def _kind_of(mask: np.ndarray) -> str:
    """The kind whose template, stretched to the component's own box, overlaps it best."""

    def overlap(kind: str) -> float:
        template = _TEMPLATES[kind]
        rows = np.arange(mask.shape[0]) * template.shape[0] // mask.shape[0]
        columns = np.arange(mask.shape[1]) * template.shape[1] // mask.shape[1]
        fitted = template[np.ix_(rows, columns)]
        return (fitted & mask).sum() / (fitted | mask).sum()

    return max(KINDS, key=overlap)


def look(picture: np.ndarray) -> tuple[str, list[Found]]:
    """The ground and the things in a picture, (SIDE, SIDE, 3) uint8: colours, then connected components."""
    distances = ((picture[..., None, :].astype(float) - _PALETTE) ** 2).sum(-1)
    nearest = distances.argmin(-1)
    rim = np.concatenate([nearest[0], nearest[-1], nearest[1:-1, 0], nearest[1:-1, -1]])
    ground = int(np.bincount(rim[rim < len(GROUNDS)], minlength=1).argmax())
    labels, count = ndimage.label(nearest != ground)
    things = []
    for label in range(1, count + 1):
        mask = labels == label
        if mask.sum() < 20:  # a small cross covers 50 pixels; less than 20 is a stray blot
            continue
        votes = np.bincount(nearest[mask], minlength=len(_PALETTE))
        votes[: len(GROUNDS)] = 0
        colour = _PALETTE_NAMES[int(votes.argmax())] if votes.any() else "none"
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        extent = (box.shape[0] + box.shape[1]) / 4
        size = min(RADII, key=lambda name: abs(RADII[name] - extent))
        centre = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
        things.append(Found(Thing(size, colour, _kind_of(box)), *centre))
    return _PALETTE_NAMES[ground], things


def score(picture: np.ndarray, scene: Scene) -> dict[str, float]:
    """How much of the caption a picture, (SIDE, SIDE, 3) uint8, shows: each attribute's share in [0, 1].

    Things are matched one to one so that most attributes agree; a thing that is missing scores 0 on each of its
    attributes. `position` is the cell of a 3 x 3 grid for one thing and which lies where for a pair.
    """
    ground, found = look(picture)
    asked = scene.things
    padded: list[Found | None] = [*found, *[None] * max(0, len(asked) - len(found))]

    def agreement(seen: tuple[Found | None, ...]) -> dict[str, float]:
        def share(of: str) -> float:
            return sum(
                s is not None and getattr(s.thing, of) == getattr(a, of) for s, a in zip(seen, asked, strict=True)
            ) / len(asked)

        position = 0.0
        if len(asked) == 1 and (only := seen[0]) is not None:
            column, row = PLACES[scene.place]
            position = float(abs(only.x - COLUMNS[column]) < SIDE / 6 and abs(only.y - ROWS[row]) < SIDE / 6)
        elif len(asked) == 2 and (a := seen[0]) is not None and (b := seen[1]) is not None:
            across, down = _direction(scene)
            position = float((b.x - a.x) * across + (b.y - a.y) * down > SIDE / 8)
        return {"shape": share("kind"), "colour": share("colour"), "size": share("size"), "position": position}

    best = max((agreement(seen) for seen in itertools.permutations(padded, len(asked))), key=lambda s: sum(s.values()))
    return {
        "count": float(len(found) == len(asked)), **best, "background": float(ground == scene.ground),
    }  # fmt: skip


def mean_scores(pictures: list[np.ndarray], captions: list[str]) -> dict[str, float]:
    """Mean of each attribute over pictures and their captions, and `mean` over the attributes.

    Captions outside the grammar are left out; an empty result means that none could be scored.
    """
    scored = [score(p, s) for p, c in zip(pictures, captions, strict=True) if (s := parse(c)) is not None]
    if not scored:
        return {}
    means = {name: float(np.mean([one[name] for one in scored])) for name in ATTRIBUTES}
    return {**means, "mean": float(np.mean(list(means.values())))}
