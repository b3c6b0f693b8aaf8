"""Measuring slim UNets against the dense one, caption by caption, and drawing what was measured."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from slimdiff.demo import scenes
from slimdiff.fidelity import decode, finite, mean_squared_error, structural_similarity
from slimdiff.guidance import guided
from slimdiff.influence import relative_error
from slimdiff.measured import QUANTILES, psnr_of, quantile
from slimdiff.pipeline import Conditioning, encode, sample

BATCH = 32
SEED = 20_000
GUIDANCE = 4.0
CALLS = 8
"""UNet calls of each trajectory whose predictions are compared, spread evenly over it."""

SHOWN = 8
"""Captions, the first ones, whose pictures can be kept."""

DEFAULT, PLAIN = "slimdiff", "paper:uniform"
GOALS = {0.35: (10, 3), 0.5: (5, 2)}
"""By budget of MACs: how many times less error than PLAIN, and than the best baseline, the default has to have."""
OF = {"groups": "the groups' parameters", "unet": "the UNet's parameters", "macs": "the groups' MACs"}

Row = dict[str, Any]
Curve = Sequence[tuple[float, float, float | None]]
"""Points: where, how high, and how high a thin second line is there (None where there is none)."""


@dataclass(frozen=True)
class Call:
    """One call of the dense UNet on a batch of prompts, and the guided prediction that came of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


class Yardstick:
    """The dense pipeline's run over captions of the miniature's grammar, and the errors of other UNets against it.

    Caption i starts from the noise of seed 20,000 + i, with the empty negative prompt. `accuracy` is the dense
    model's, by attribute; `timesteps` are those of the calls that are compared.
    """

    def __init__(self, pipe: DiffusionPipeline, captions: Sequence[str], steps: int = 25) -> None:
        self.pipe, self.captions, self.steps = pipe, list(captions), steps
        self.timesteps: list[float] = []
        self._calls: list[list[Call]] = []
        self._batches = [self.captions[i : i + BATCH] for i in range(0, len(self.captions), BATCH)]
        self._conditioning: list[Conditioning] = [encode(pipe, part, [""] * len(part)) for part in self._batches]
        with self._recorded():
            self._latents, self.pictures = self._paint(pipe.unet)
        self.accuracy = scenes.mean_scores(self.pictures, self.captions)

    def measure(self, unet: nn.Module, keep: Path | None = None) -> dict[str, Any]:
        """How far `unet` is from the dense one, JSON-ready; the pictures of the first captions go to `keep`.

        `final` is the relative squared error of the final latents, `mse` and `ssim` compare 8-bit pictures, all by
        caption. `noise` is the relative squared error of the guided prediction at each of `timesteps` of the dense
        trajectory, the mean over captions. What is not finite is infinitely wrong.
        """
        latents, pictures = self._paint(unet)
        if keep is not None:
            save_strip(pictures, keep)
        pairs = list(zip(self.pictures, pictures, strict=True))
        return {
            "final": finite(relative_error(latents, self._latents)),
            "mse": [mean_squared_error(a, b) for a, b in pairs],
            "ssim": [structural_similarity(a, b) for a, b in pairs],
            "accuracy": scenes.mean_scores(pictures, self.captions),
            "dense_accuracy": self.accuracy,
            "timesteps": self.timesteps,
            "noise": self._noise(unet),
        }

    def _paint(self, unet: nn.Module) -> tuple[Tensor, list[np.ndarray]]:
        """Final latents and 8-bit pictures of all captions, with `unet` in the pipeline."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        own, parts, first = self.pipe.unet, [], SEED
        self.pipe.unet = unet
        try:
            for conditioning, captions in zip(self._conditioning, self._batches, strict=True):
                seeds = range(first, first + len(captions))
                parts.append(sample(
                    self.pipe, conditioning, seeds, steps=self.steps, guidance_scale=GUIDANCE, height=side, width=side
                ))  # fmt: skip
                first += len(captions)
        finally:
            self.pipe.unet = own
        return torch.cat(parts), [picture for part in parts for picture in decode(self.pipe, part)]

    @torch.no_grad()
    def _noise(self, unet: nn.Module) -> list[float]:
        found = []
        for place in range(len(self.timesteps)):
            errors = []
            for calls, captions in zip(self._calls, self._batches, strict=True):
                call = calls[place]
                prediction = guided(unet(*call.args, **call.kwargs)[0], len(captions), GUIDANCE)
                errors += finite(relative_error(prediction, call.prediction))
            found.append(float(np.mean(errors)))
        return found

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """While inside, the calls of the pipeline's own UNet that are to be compared are kept, batch by batch."""
        self.pipe.scheduler.set_timesteps(self.steps)
        total = len(self.pipe.scheduler.timesteps)
        wanted = {round(place) for place in np.linspace(0, total - 1, CALLS)}
        seen = 0

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal seen
            batch, step = divmod(seen, total)
            seen += 1
            if step not in wanted:
                return
            if batch == len(self._calls):
                self._calls.append([])
            if batch == 0:
                self.timesteps.append(float(args[1] if len(args) > 1 else kwargs["timestep"]))
            self._calls[batch].append(Call(args, kwargs, guided(output[0], len(self._batches[batch]), GUIDANCE)))

        handle = self.pipe.unet.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def read(path: Path) -> list[Row]:
    """The rows of a file; a line that an interruption cut short is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """In one write, so that the lines of runs side by side do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("ab", buffering=0) as file:
        file.write(b"\n" * is_cut + json.dumps(row).encode() + b"\n")


def spread(rows: Iterable[Row]) -> tuple[float, ...]:
    """Median, 90th percentile and worst of the final latents' errors, over the captions of all rows together."""
    errors = [error for row in rows for error in row["final"]]
    return tuple(quantile(errors, q) for q in QUANTILES)


def pick(rows: Sequence[Row], **where: Any) -> list[Row]:
    """The rows with these values, but for those of ways that could not meet their budget."""
    return [row for row in rows if "final" in row and all(row[key] == value for key, value in where.items())]


def mean(rows: Sequence[Row], key: str) -> float:
    """Of an accuracy: over all attributes and rows."""
    return float(np.mean([row[key]["mean"] for row in rows]))


def middle(rows: Sequence[Row], key: str) -> float:
    """The median of a number, or of all captions' numbers."""
    return quantile(np.concatenate([np.atleast_1d(row[key]) for row in rows]).tolist(), 0.5)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def errors(rows: Sequence[Row]) -> str:
    """A cell: `spread`."""
    return " / ".join(f"{value:.1e}" for value in spread(rows))


def look(rows: Sequence[Row]) -> str:
    """A cell: median PSNR and SSIM, mean accuracy."""
    psnr, ssim = psnr_of(middle(rows, "mse")), middle(rows, "ssim")
    return f"{psnr:.1f} / {ssim:.4f} / {mean(rows, 'accuracy'):.3f}"


def grid(rows: Sequence[Row], key: str, cell: Callable[[list[Row]], str]) -> str:
    """The values of `key`, in the order of rows, by budgets. A dagger marks a cell that lacks a seed others have."""
    budgets, seeds = sorted({row["budget"] for row in rows}), len({row["seed"] for row in rows})

    def fill(value: Any, budget: float) -> str:
        if found := pick(rows, **{key: value}, budget=budget):
            return cell(found) + " †" * (len(found) < seeds)
        return "cannot" if any((row[key], row["budget"]) == (value, budget) for row in rows) else ""

    values = list(dict.fromkeys(row[key] for row in rows))
    return table([key, *map(str, budgets)], [[str(value), *(fill(value, b) for b in budgets)] for value in values])


def goals(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """What was aimed at, what was found, and whether it passes, by budgets of MACs; `rows` are those of mode "main"."""
    rows, found = pick(rows, of="macs"), []

    def add(budget: float, goal: str, value: str = "", passed: bool | None = None) -> None:
        mark = {True: "pass", False: "FAIL", None: "not measured"}[passed]
        found.append((f"{budget:g} of MACs: {goal}", value, mark))

    for budget, times in GOALS.items():
        mine, plain = pick(rows, way=DEFAULT, budget=budget), pick(rows, way=PLAIN, budget=budget)
        others = [row for row in pick(rows, budget=budget) if row["method"] != DEFAULT]
        baselines = [pick(others, way=way) for way in dict.fromkeys(row["way"] for row in others)]
        for rank, what in enumerate(("median", "90th percentile")):
            best = min(baselines, key=lambda chosen: spread(chosen)[rank], default=[])
            name = f"the best baseline, {best[0]['way']}" if best else "the best baseline"
            for other, against, factor in ((PLAIN, plain, times[0]), (name, best, times[1])):
                goal = f"{what} at most 1/{factor} of {other}"
                if mine and against:
                    value, theirs = spread(mine)[rank], spread(against)[rank]
                    ratio = theirs / value if value else math.inf
                    add(budget, goal, f"1/{ratio:.1f} ({value:.1e} against {theirs:.1e})", value * factor <= theirs)
                else:
                    add(budget, goal)
    if mine := pick(rows, way=DEFAULT, budget=0.5):
        slim, dense = mean(mine, "accuracy"), mean(mine, "dense_accuracy")
        add(0.5, "accuracy within 0.01 of dense", f"{slim:.3f}, dense {dense:.3f}", slim >= dense - 0.01)
    else:
        add(0.5, "accuracy within 0.01 of dense")
    for budget in (0.2, *GOALS):
        goal = "predicted error within a factor of 2 of the median"
        if mine := pick(rows, way=DEFAULT, budget=budget):
            ratio = middle(mine, "predicted_error") / spread(mine)[0]
            add(budget, goal, f"{ratio:.2f} times", 0.5 <= ratio <= 2)
        else:
            add(budget, goal)
    return found


def predictions(rows: Sequence[Row]) -> str:
    """Predicted against measured error of the default way."""
    body = []
    for of, budget in sorted({(row["of"], row["budget"]) for row in pick(rows, way=DEFAULT)}):
        mine = pick(rows, way=DEFAULT, of=of, budget=budget)
        predicted, bound, median = middle(mine, "predicted_error"), middle(mine, "lower_bound"), spread(mine)[0]
        numbers = (f"{predicted:.1e}", f"{bound:.1e}", f"{median:.1e}", f"{predicted / median:.2f}")
        body.append((f"{budget:g} of {OF[of]}", *numbers))
    return table(("budget", "predicted", "lower bound", "measured median", "predicted / measured"), body)


def save_strip(pictures: Sequence[np.ndarray], path: Path) -> None:
    """The first `SHOWN` pictures, one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(pictures[:SHOWN])).save(path)


def contact_sheet(columns: Mapping[str, Path], captions: Sequence[str], path: Path, scale: int = 2) -> None:
    """Strips side by side, enlarged, captions at the left; a label breaks after its first word."""
    side, margin, head = scale * scenes.SIDE, 2 * scale * scenes.SIDE, 30
    strips = {label: Image.open(file) for label, file in columns.items()}
    rows = max(strip.height // scenes.SIDE for strip in strips.values())
    sheet = Image.new("RGB", (margin + len(columns) * (side + 4), head + rows * side), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, strip) in enumerate(strips.items()):
        left = margin + column * (side + 4)
        draw.multiline_text((left, 2), label.replace(" ", "\n", 1), fill="black")
        larger = strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST)
        sheet.paste(larger, (left, head))
    for row, caption in enumerate(captions[:rows]):
        draw.multiline_text((4, head + row * side + 4), "\n".join(textwrap.wrap(caption, 30)), fill="black")
    sheet.save(path)


def chart(curves: Mapping[str, Curve], path: Path, title: str, across: str, log_across: bool = False) -> None:
    """Errors on a logarithmic axis, a line for each of `curves`, the highest at its end named first; needs matplotlib.

    `across` names the other axis; timesteps run from the noisiest to the last.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120, layout="constrained")
    colours = {label: f"C{i % 10}" for i, label in enumerate(curves)}
    for label, curve in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        x, y, thin = zip(*curve, strict=True)
        axes.plot(x, y, color=colours[label], label=label, marker="o", markersize=3, linewidth=1.8)
        if None not in thin:
            axes.plot(x, thin, color=colours[label], linewidth=0.7)
    axes.set_yscale("log")
    axes.set_xscale("log" if log_across else "linear")
    if log_across:
        ticks = sorted({point[0] for curve in curves.values() for point in curve})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if across == "timestep":
        axes.invert_xaxis()
    axes.set(xlabel=across, ylabel="relative squared error")
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)
