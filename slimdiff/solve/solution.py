"""What every solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A group at one width r.

    `into` holds one map per incoming projection that acts on the rows of its weight and bias: (h, r, d_h) per head for
    attention, or the kept hidden units (r,) as int64 for a feed-forward layer. `out` is the outgoing weight, (C, h r)
    or (C, r), and `bias` what has to be added to the outgoing bias, (C,), None where that is nothing; both are None for
    query-key groups, which have nothing outgoing.

    Of a ResNet block `into` holds the kept channels (r g,) as int64, r of each of the g groups of its norm, and `out`
    is (C, 9 r g). `norm` is what the norm's outputs on them are to be scaled by and moved by, (r g,) each.

    Where whole heads are the width, `into` holds the kept heads (r,) as int64, and `out` is (C, r d_h). Where a single
    matrix is the group, its rank is the width: `into` holds the inner matrix (r, d_in), and `out` is the outer one,
    (d_out, r).
    """

    into: tuple[Tensor, ...]
    out: Tensor | None = None
    bias: Tensor | None = None
    norm: tuple[Tensor, Tensor] | None = None


class Solution(Protocol):
    """A group's nested solution: best direction first, so that one solve serves every width."""

    @property
    def error(self) -> Tensor:
        """Relative squared error at every width 0..d, (d + 1,): 1 at width 0 (0 for a dead layer), 0 at full width."""

    def at(self, r: int) -> Factors: ...


@dataclass(frozen=True)
class Curve:
    """A solution of which only the error stays in memory: whoever wants factors has the group solved again."""

    error: Tensor
    solve: Callable[[], Solution]

    def at(self, r: int) -> Factors:
        return self.solve().at(r)


@runtime_checkable
class Refitted(Solution, Protocol):
    """A nested solution whose outgoing weight also uses what the kept directions say about the dropped ones."""

    def dropped(self, r: int, rank: int) -> tuple[Tensor, Tensor]:
        """The dropped part of what enters the outgoing weight, from the part kept at width r: two thin factors.

        With h heads (1 for a feed-forward layer) of d features each they are (h d, s) and (s, h r), s <= `rank`, and
        their product has the least expected square error up to that, the mean included.
        """
