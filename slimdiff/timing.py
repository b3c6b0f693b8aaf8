"""Time of calls in turns, and memory of one."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from slimdiff.measured import Spread, Timing, quantile
from slimdiff.ready import eager

LONGEST = 60.0
"""Seconds after which slow calls are timed in fewer pairs than asked for, but in at least FEWEST."""

FEWEST = 5

WARM_UP = 3
"""Calls of each side before the clock starts: lazy initialisation, kernel choice, allocator."""

SHORTEST = 0.05
"""Seconds one measurement lasts at least, by repeating short calls: well above the jitter of clock and scheduler."""

ROUNDS, BRIEF = 25, 0.01
"""How often each of many calls is timed, and for how many seconds at least: medians of many short looks, since what
disturbs one spares the next."""

Call = Callable[[], Any]


def paired(what: str, dense: Call, slim: Call, *, pairs: int, device: torch.device) -> Timing:
    """Time two calls in turns, up to `pairs` times: dense and slim, slim and dense, dense and slim, ...

    The speed-up is computed within each pair, so what slows the machine down for a while slows both sides of it; and
    each side goes first in half of the pairs, so that going first is no advantage.
    """
    dense_time, slim_time = _warm(dense, device), _warm(slim, device)
    calls = math.ceil(SHORTEST / max(1e-6, min(dense_time, slim_time)))
    pairs = min(pairs, max(FEWEST, int(LONGEST / (calls * (dense_time + slim_time)))))
    times: tuple[list[float], list[float]] = ([], [])
    sides = list(zip((dense, slim), times, strict=True))
    for pair in tqdm(range(pairs), unit="pair", disable=None, leave=False, desc=what):
        for call, side in sides if pair % 2 == 0 else sides[::-1]:
            side.append(_time(call, calls, device))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return Timing(what, Spread.of(times[0]), Spread.of(times[1]), Spread.of(ratios), pairs, calls)


def in_turns(calls: Sequence[Call], *, device: torch.device, what: str) -> list[float]:
    """Median seconds of each call over up to ROUNDS rounds, in each of which every one has its turn.

    What slows the machine down for a while so slows all of them alike. Rounds go forwards and backwards by turns. Slow
    calls take fewer rounds, but at least FEWEST.
    """
    least = [_warm(call, device) for call in calls]
    repeats = [math.ceil(BRIEF / max(1e-6, time)) for time in least]
    one_round = sum(n * time for n, time in zip(repeats, least, strict=True))
    rounds = min(ROUNDS, max(FEWEST, int(LONGEST / one_round)))
    times: list[list[float]] = [[] for _ in calls]
    with tqdm(total=rounds * len(calls), unit="call", disable=None, leave=False, desc=what) as bar:
        for turn in range(rounds):
            for i in range(len(calls))[:: -1 if turn % 2 else 1]:
                times[i].append(_time(calls[i], repeats[i], device))
                bar.update()
    return [quantile(found, 0.5) for found in times]


def _warm(call: Call, device: torch.device) -> float:
    return min(_time(call, 1, device) for _ in range(WARM_UP))


def _time(call: Call, calls: int, device: torch.device) -> float:
    """Seconds per call."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_growth(call: Call, device: torch.device) -> int | None:
    """Bytes that a call adds, at its peak, to what was allocated before it; None where it cannot be measured.

    On CUDA the allocator's own count. On the CPU the tensors alive after each operator, which leaves out scratch space
    inside operators; a process's resident memory would say little, since freed memory is kept and used again.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        return None
    with eager(), _LiveTensors() as live:
        call()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Bytes of the storages made while inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                storage = tensor.untyped_storage()
                known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size
