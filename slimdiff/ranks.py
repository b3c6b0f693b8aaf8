"""Calibration by several processes, which `torchrun` or `accelerate launch` started: a part of the prompts each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import distributed

from slimdiff.calibrate import Calibrated, begun, collect, is_there
from slimdiff.errors import SlimdiffError
from slimdiff.merge import merge
from slimdiff.outputs import part_path
from slimdiff.pipeline import device_of
from slimdiff.recipe import Recipe, Shard
from slimdiff.source import Source

START = timedelta(minutes=10)
"""How long processes wait for each other to start."""

PATIENCE = timedelta(days=7)
"""How long the quickest process waits for the slowest. One that ends early ends the wait at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its launch: number `rank`, from 0, of `world`, and number `local` of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`auto` and `cuda` are this process's own GPU. Raises SlimdiffError if there are fewer GPUs than processes."""
        device = device_of(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise SlimdiffError(f"Each of {self.world} processes takes a GPU of its own; leave out --device {name}.")
        if self.local >= (gpus := torch.cuda.device_count()):
            raise SlimdiffError(f"There are {gpus} GPUs here for more processes; launch as many processes as GPUs.")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def wait(self) -> None:
        """Until all processes are here. Raises SlimdiffError if another one has ended instead."""
        if self.world == 1:
            return
        try:
            distributed.barrier(self.group)
        except RuntimeError as error:
            raise SlimdiffError(
                f"Process {self.rank} is done, but another one ended early; its message says why. Parts that are done "
                "are kept: the same command goes on from there."
            ) from error


@contextmanager
def launched() -> Iterator[Ranks]:
    """This process among those of its launch, connected to them while inside; alone if nothing launched several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    distributed.init_process_group("gloo", timeout=START)  # sums go through files: no GPU has to talk to another
    try:
        group, local = distributed.new_group(timeout=PATIENCE), int(os.environ.get("LOCAL_RANK", 0))
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local, group)
    finally:
        distributed.destroy_process_group()


def calibrate_together(
    ranks: Ranks, pipe: DiffusionPipeline, source: Source, recipe: Recipe, output: Path, *, force: bool, **options: Any
) -> Calibrated:
    """`collect` with the prompts shared out: each process writes its part beside `output`, the main one merges them.

    Parts stay until they are merged, so that after an error or Ctrl-C the same launch goes on from what was saved.
    Several machines have to see the same folder.

    Raises what `collect` and `merge` raise, and SlimdiffError if another process ended early.
    """
    if output.exists() and not force:
        is_there(output, begun(pipe, source, recipe))
        return Calibrated(output, len(recipe.prompts), 0.0, len(recipe.prompts), was_there=True)
    parts = [part_path(output, n, ranks.world) for n in range(1, ranks.world + 1)]
    shard = Shard(ranks.rank + 1, ranks.world)
    done = collect(
        pipe, source, recipe, parts[ranks.rank], force=force, shard=shard, show=ranks.is_main, **options
    )  # fmt: skip
    ranks.wait()
    if ranks.is_main:
        merge(parts, output, force=force)
        for part in parts:
            part.unlink()
    return Calibrated(output, len(recipe.prompts), done.seconds, done.resumed_at)
