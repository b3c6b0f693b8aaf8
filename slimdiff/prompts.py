"""`slimdiff prompts`: few prompts whose texts cover a pool of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from tqdm import tqdm

from slimdiff.errors import OutputError, SlimdiffError
from slimdiff.files import check_file, replacing

Array = NDArray[np.float64]

BATCH = 64
"""Prompts encoded at once."""

DRAWS = 20
"""Random choices that the coverage is compared with."""


@dataclass(frozen=True)
class Coverage:
    """Share of the energy of a pool's embeddings that some of its prompts explain, of all and of the worst prompt."""

    overall: float
    worst: float


@dataclass(frozen=True)
class Chosen:
    """Prompts of a pool of `pool` different ones, the first choice first, their coverage, and that of random choices
    of as many prompts on average."""

    prompts: tuple[str, ...]
    pool: int
    width: int
    coverage: Coverage
    random: Coverage

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": list(self.prompts),
            "pool": self.pool,
            "width": self.width,
            "coverage": vars(self.coverage),
            "random": {**vars(self.random), "draws": DRAWS},
        }

    def __str__(self) -> str:
        rows = (("these", self.coverage), (f"random, mean of {DRAWS} draws", self.random))
        return "\n".join(
            [
                f"{len(self.prompts)} of {self.pool} different prompts, embeddings of {self.width} dimensions",
                "coverage of the pool          of all   of the worst prompt",
                *(f"  {name:<26} {100 * c.overall:7.2f}% {100 * c.worst:20.2f}%" for name, c in rows),
            ]
        )


def choose(pipe: DiffusionPipeline, pool: Sequence[str], count: int) -> Chosen:
    """The `count` prompts of a pool that cover it best, by `cover` on their `embeddings`. Deterministic.

    Raises SlimdiffError if the pool has fewer different prompts.
    """
    different = tuple(dict.fromkeys(pool))
    if count > len(different):
        raise SlimdiffError(
            f"{count} prompts were asked for, but the pool has {len(different)} different ones; lower --select."
        )
    x = embeddings(pipe, different)
    x -= x.mean(0)
    ridge = max(float(np.square(x).mean()), np.finfo(np.float64).tiny)
    draw = np.random.default_rng(0)
    drawn = [coverage(x, draw.choice(len(x), count, replace=False), ridge) for _ in range(DRAWS)]
    random = Coverage(*(float(np.mean([getattr(c, name) for c in drawn])) for name in ("overall", "worst")))
    chosen = cover(x, count, ridge)
    return Chosen(tuple(different[i] for i in chosen), len(different), x.shape[1], coverage(x, chosen, ridge), random)


@torch.no_grad()
def embeddings(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Array:
    """A row for each prompt, (n, C): the mean of what the UNet's cross-attention gets of its tokens, without the start
    token, which is the same in all prompts, and without the padding after the end of the text."""
    rows = []
    for first in tqdm(range(0, len(prompts), BATCH), unit="batch", disable=None, desc="prompts", leave=False):
        texts = list(prompts[first : first + BATCH])
        given = {"prompt": texts, "device": pipe.device, "num_images_per_prompt": 1}
        tokens = pipe.encode_prompt(**given, do_classifier_free_guidance=False)[0].double().cpu().numpy()
        ends = [len(ids) for ids in pipe.tokenizer(texts, truncation=True, max_length=tokens.shape[1])["input_ids"]]
        rows += [text[1:end].mean(0) for text, end in zip(tokens, ends, strict=True)]
    return np.stack(rows)


def cover(x: Array, count: int, ridge: float) -> list[int]:
    """Greedy maximisation of `det(ridge I + Σ xᵢ xᵢᵀ)` over `count` of the rows xᵢ, (n, C); first choice first.

    Each step takes the row of the largest `xᵀ M⁻¹ x`, by which its choice multiplies the determinant but for one (the
    matrix determinant lemma), and updates M⁻¹ (Sherman & Morrison). The same rows in the same order as a pivoted
    Cholesky factorisation of `X Xᵀ + ridge I` picks, without the n x n matrix.
    """
    inverse = np.eye(x.shape[1]) / ridge
    gains = np.square(x).sum(1) / ridge
    chosen: list[int] = []
    for _ in range(count):
        best = int(gains.argmax())
        chosen.append(best)
        step = inverse @ x[best]
        step /= np.sqrt(1 + x[best] @ step)
        inverse -= np.outer(step, step)
        gains -= np.square(x @ step)
        gains[chosen] = -np.inf
    return chosen


def coverage(x: Array, chosen: Sequence[int] | NDArray[np.int64], ridge: float) -> Coverage:
    """How much of the rows of x, (n, C), the chosen ones explain: less `ridge xᵀ M⁻¹ x` of |x|² is left of each.

    With a ridge of nearly 0 that is the squared distance from the span of the chosen ones.
    """
    picked = x[list(chosen)]
    energy = np.square(x).sum(1)
    solved = np.linalg.solve(picked.T @ picked + ridge * np.eye(x.shape[1]), x.T)
    left = ridge * np.einsum("ij,ji->i", x, solved)
    present = energy > 0
    return Coverage(
        float(1 - left.sum() / max(energy.sum(), ridge)),
        float(1 - (left[present] / energy[present]).max(initial=0.0)),
    )


def check_output(path: Path, force: bool) -> None:
    """Raises OutputError if prompts are not to be written there, or cannot be."""
    if path.suffix != ".txt":
        raise OutputError(f"The chosen prompts are written one a line, as .txt; {path} ends in '{path.suffix}'.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; pass --force to replace it, or -o for another file.")
    check_file(path)


def write(prompts: Sequence[str], path: Path) -> None:
    """One a line. Raises OutputError if the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{' '.join(prompt.splitlines())}\n" for prompt in prompts), encoding="utf-8")
