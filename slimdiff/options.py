"""What a user may choose about a compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from slimdiff.errors import BudgetError

Of = Literal["groups", "unet", "macs", "latency"]
OFS: tuple[Of, ...] = get_args(Of)

MethodName = Literal["slimdiff", "paper", "obs", "svd-llm", "svd", "wanda", "magnitude", "random"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)

Influence = Literal["sampler", "noise", "local", "uniform", "energy"]
INFLUENCES: tuple[Influence, ...] = get_args(Influence)


@dataclass(frozen=True)
class Options:
    """How to compress.

    `budget` is the share to remove, in [0, 1), `of` the groups' parameters, the whole UNet's parameters, the groups'
    MACs (without the zeros that pad unequal widths at run time), or the time of one UNet call. `kinds` are the kinds of
    groups to cut, None all that the method cuts. `method` is one of METHODS. `round_to` is the step of head widths
    (feed-forward widths take eight times that); None picks it by layer. `min_width` is the least share of its width a
    group keeps. `independent_ranks` lets the query-key and value-output widths of one attention differ.

    `influence` decides the widths: "sampler" and "noise" weigh local errors by what they do to the final latents or to
    the predicted noise (probed with `probe_prompts` prompts, `probe_steps` sampler steps, at these `probe_shares` of
    the width), "local" takes them as they are, "uniform" keeps the same share of every group, "energy" the same share
    of every group's energy; None is the method's own. `refine` refits output projections on the calibration states
    afterwards. `lora_maps` is the rank of the maps by which LoRAs of the dense model fit the slim one; 0 leaves them
    out.

    Raises BudgetError for a `budget` or `min_width` out of range.
    """

    budget: float
    of: Of = "groups"
    kinds: tuple[str, ...] | None = None
    method: MethodName = "slimdiff"
    round_to: int | None = None
    min_width: float = 0.125
    independent_ranks: bool = False
    influence: Influence | None = None
    probe_prompts: int = 8
    probe_steps: int = 7
    probe_shares: tuple[float, ...] = (0.5,)
    refine: bool = False
    lora_maps: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise BudgetError(
                f"A budget of {self.budget:g} was asked for; it is the share to remove, at least 0 "
                "(which changes nothing) and below 1. Try --budget 0.35."
            )
        if not 0 < self.min_width <= 1:
            raise BudgetError(f"--min-width {self.min_width:g} is not a share of the width: above 0, at most 1.")


def share_of(speedup: float) -> float:
    """The share of the time that has to go. Raises BudgetError unless `speedup` is a number above 1."""
    if not 1 < speedup < float("inf"):
        raise BudgetError(
            f"A speed-up of {speedup:g} was asked for; it is how many times as fast a UNet call shall be: above 1. Try "
            "--speedup 1.2."
        )
    return 1 - 1 / speedup
