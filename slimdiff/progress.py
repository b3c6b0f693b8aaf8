"""How far a long job is, where no bar can be drawn: a line now and then, as in the log of a job queue."""

from __future__ import annotations

import sys
import time

from slimdiff.report.wording import duration

EVERY = 60.0
"""Seconds between two lines, at least."""


class Log:
    """Call it with the number of things done: "calibrate: prompt 64 of 500, 12 min, about 1 h 20 min left".

    It writes to stderr, and nothing where that is a terminal, which shows a bar, or without `show`. `first` things were
    done by an earlier run.
    """

    def __init__(self, what: str, thing: str, total: int, first: int = 0, show: bool = True) -> None:
        self.what, self.thing, self.total, self.first = what, thing, total, first
        self.show = show and not sys.stderr.isatty()
        self.began = self.told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if not self.show or now - self.told < EVERY or not self.first < done < self.total:
            return
        self.told = now
        past = now - self.began
        left = past / (done - self.first) * (self.total - done)
        how_far = f"{self.thing} {done} of {self.total}, {duration(past)}, about {duration(left)} left"
        print(f"{self.what}: {how_far}", file=sys.stderr, flush=True)
