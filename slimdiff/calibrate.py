"""`slimdiff calibrate`: run the real pipeline over all prompts and timesteps, and sum what the groups see."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from slimdiff.batches import automatic_batch_size
from slimdiff.capture import captured
from slimdiff.conditions import conditions, differing
from slimdiff.errors import OutputError, SlimdiffError, StatisticsError
from slimdiff.files import check_file
from slimdiff.groups import find_groups
from slimdiff.guidance import guided
from slimdiff.inpainting import canvases
from slimdiff.pipeline import fingerprint, paint, use_scheduler
from slimdiff.progress import Log
from slimdiff.ready import eager
from slimdiff.recipe import WHOLE, Recipe, Shard
from slimdiff.source import Source
from slimdiff.states import recorded
from slimdiff.statistics import Statistics, StatisticsFile
from slimdiff.timesteps import Clock, weights

SAVE_EVERY, SAVE_SHARE = 120.0, 0.05
"""Seconds between two saves of the partial file, at least, and the most of the time that saving may take."""


class Interrupted(SlimdiffError):
    """Ctrl-C or SIGTERM: what was done is saved."""

    exit_code = 130  # what shells report for a command that SIGINT ended


@dataclass(frozen=True)
class Calibrated:
    path: Path
    prompts: int
    seconds: float
    resumed_at: int
    was_there: bool = False

    def __str__(self) -> str:
        if self.was_there:
            return "already holds this calibration; --force runs it again"
        again = f", resumed at prompt {self.resumed_at}" if self.resumed_at else ""
        return f"{self.prompts} prompts in {self.seconds:.0f} s{again}"


@eager()
def collect(
    pipe: DiffusionPipeline,
    source: Source,
    recipe: Recipe,
    output: Path | str,
    *,
    batch_size: int | None = None,
    resume: bool = True,
    force: bool = False,
    shard: Shard = WHOLE,
    show: bool = True,
) -> Calibrated:
    """Run `recipe` through `pipe`, on the pipeline's device and dtype, and write the statistics file `output`.

    With a `shard` only that part of its prompts runs, each from the same seed as in the whole, to be merged later.
    Progress is a bar on a terminal and a line a minute elsewhere; without `show` there is none.

    A partial file lies beside it meanwhile. Ctrl-C, like SIGTERM, ends the batch at hand and saves; the next call goes
    on from there and ends with the same sums. The batch size changes nothing but rounding.

    Raises OutputError if `output` holds another calibration or cannot be written, StatisticsError if a partial file is
    of another model, recipe, part, sampler or text encoder, or a layer is never seen, SlimdiffError for a part without
    prompts or a GPU too small for one, ModelError for a model without groups, Interrupted on Ctrl-C.
    """
    started, output = time.monotonic(), Path(output)
    statistics = begun(pipe, source, recipe, shard)
    groups = find_groups(pipe.unet)
    groups += find_groups(pipe.unet, kinds=("linear",)) if recipe.baselines else []
    groups += find_groups(pipe.unet, kinds=("resnet",)) if recipe.resnets else []
    prompts = statistics.prompts
    if not prompts:
        raise SlimdiffError(f"Part {shard} of {len(recipe.prompts)} prompts is empty; make fewer parts.")
    check_file(output)
    if not force and is_there(output, statistics):
        return Calibrated(output, len(prompts), 0.0, len(prompts), was_there=True)
    unfinished = output.with_name(output.name + ".partial")
    earlier = _resumable(unfinished, statistics) if resume and unfinished.exists() else None
    batch_size = batch_size or automatic_batch_size(pipe, groups, recipe)  # tried while no other sums are on the device
    if earlier:
        statistics = earlier.read(pipe.unet.device)
    first = statistics.done
    pipe.scheduler.set_timesteps(recipe.steps)
    calls, shares = len(pipe.scheduler.timesteps), weights(recipe.timestep_weights, pipe.scheduler)
    saved, pause = time.monotonic(), SAVE_EVERY
    log = Log("calibrate", "prompt", len(prompts), first, show)
    with (
        tqdm(total=len(prompts) * calls, initial=first * calls, unit="step", disable=None if show else True,
             desc="calibrate", smoothing=0.05) as bar,
        graceful_interrupt() as interrupted,
    ):  # fmt: skip

        def step(index: int) -> None:
            clock.tick(index)
            bar.update(len(chosen))

        for done in range(first, len(prompts), batch_size):
            chosen = prompts[done : done + batch_size]
            clock = Clock(shares)
            canvas = canvases(pipe, recipe, chosen)
            guide = partial(guided, prompts=len(chosen), guidance_scale=recipe.guidance_scale)
            with (
                captured(pipe.unet, groups, statistics.grams, clock, guide),
                recorded(pipe.unet, statistics.states, chosen[0], len(chosen), calls),
            ):
                latents = paint(pipe, recipe, chosen, step, canvas=canvas)
            if not torch.isfinite(latents).all():
                raise StatisticsError(
                    f"The model produced NaN or infinite values for prompts {chosen[0]} to {chosen[-1]}, in "
                    f"{pipe.unet.dtype}. Calibrate with --dtype float32, or check the checkpoint."
                )
            _check_all_seen(statistics)
            statistics.done = done + len(chosen)
            log(statistics.done)
            if interrupted() and statistics.done < len(prompts):
                statistics.write(unfinished)
                raise Interrupted(
                    f"Interrupted after {statistics.done} of {len(prompts)} prompts, all saved in {unfinished}. "
                    "The same command goes on from there."
                )
            if (due := time.monotonic()) - saved > pause:
                statistics.write(unfinished)
                saved = time.monotonic()
                pause = max(SAVE_EVERY, (saved - due) / SAVE_SHARE)
    statistics.write(output)
    unfinished.unlink(missing_ok=True)
    return Calibrated(output, statistics.done, time.monotonic() - started, first)


def begun(pipe: DiffusionPipeline, source: Source, recipe: Recipe, shard: Shard = WHOLE) -> Statistics:
    """A calibration without sums yet. Gives the pipeline the recipe's scheduler."""
    use_scheduler(pipe, recipe.scheduler)
    return Statistics(
        source.reference, dict(source.options), fingerprint(pipe.unet), recipe, loras=source.loras, shard=shard,
        conditions=conditions(pipe),
    )  # fmt: skip


def _check_all_seen(statistics: Statistics) -> None:
    if unseen := [key for key, sums in statistics.grams.items() if not sums.count]:
        raise StatisticsError(
            f"The UNet ran, but nothing was seen of {unseen[0]}, nor of {len(unseen) - 1} other statistics of "
            f"{len(statistics.grams)}: something calls these layers past their hooks, as attention processors may that "
            "read weights themselves. Set the model's own: pipe.unet.set_default_attn_processor()."
        )


def is_there(path: Path, wanted: Statistics) -> bool:
    """Whether `path` holds a finished calibration of this model, recipe and part, under the same conditions.

    Raises OutputError if it holds anything else.
    """
    if not path.exists():
        return False
    what = "no calibration that can be read"
    with suppress(StatisticsError):
        found = StatisticsFile(path)
        difference = _difference(found, wanted)
        if difference is None and found.done == len(wanted.prompts):
            return True
        what = f"another calibration, of {difference}" if difference else "an unfinished calibration"
    raise OutputError(f"{path} holds {what}; pass --force to replace it, or -o for another file.")


def _resumable(unfinished: Path, wanted: Statistics) -> StatisticsFile:
    """The partial file. Raises StatisticsError if it is of another calibration."""
    found = StatisticsFile(unfinished)
    if difference := _difference(found, wanted):
        raise StatisticsError(
            f"{unfinished} is an unfinished calibration of {difference}. Repeat the command that began it, pass "
            "--no-resume to start afresh, or -o for another file."
        )
    return found


def _difference(found: StatisticsFile, wanted: Statistics) -> str | None:
    """What tells a calibration from the wanted one, but for how far it came, in words."""
    if found.fingerprint != wanted.fingerprint:
        return f"another model ({found.model})"
    if found.recipe != wanted.recipe:
        return "another recipe (prompts, steps, guidance, scheduler, size or seed)"
    if found.shard != wanted.shard:
        return f"another part of the prompts ({found.shard})"
    return differing(found.conditions, wanted.conditions)


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C or SIGTERM (which job queues send) sets a flag, which the yielded function reads;
    a second stops."""
    seen = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        what = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        tqdm.write(f"{what}: finishing this batch, then saving. Again to stop at once.")

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, which alone gets signals
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
