"""The ways to compress: slimdiff's own and the field's baselines, all through the same surgery, checkpoint and bench.

A method says what it cuts, how it solves a group, and how its widths are chosen unless the user says otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimdiff.errors import StatisticsError
from slimdiff.gram import Moments
from slimdiff.groups import KINDS, Group, Kind, guided_key, inputs, names, probes
from slimdiff.options import Influence, MethodName
from slimdiff.patches import PatchMoments
from slimdiff.recipe import Recipe
from slimdiff.solve import selection
from slimdiff.solve.ffn import Rule, elimination, leverage, solve_ffn
from slimdiff.solve.heads import solve_heads
from slimdiff.solve.linear import solve_linear
from slimdiff.solve.qk import solve_qk
from slimdiff.solve.resnet import ResnetSolution, solve_resnet
from slimdiff.solve.solution import Curve, Solution
from slimdiff.solve.vo import solve_vo
from slimdiff.solve.whitening import whiten_vo


@dataclass(frozen=True)
class Evidence:
    """What a solve goes by: one group of a UNet, and the moments of statistics by key, of patches for ResNet groups.

    It remembers the order in which hidden units were dropped, so that solving again costs little.
    """

    unet: nn.Module
    group: Group
    moments: Callable[[str], Moments]
    patch_moments: Callable[[str], PatchMoments] | None = None
    _orders: dict[Rule, Tensor] = field(default_factory=dict)

    def once(self, choose: Rule) -> Rule:
        """`choose`, which is asked the first time only."""

        def remembered(moment: Tensor, weight: Tensor) -> Tensor:
            if choose not in self._orders:
                self._orders[choose] = choose(moment, weight)
            return self._orders[choose]

        return remembered

    def queries_and_keys(self) -> tuple[Moments, Moments]:
        """The keys centred per image."""
        queries, keys = (self.moments(probe.key) for probe in probes(self.unet, self.group))
        return queries, keys

    def inner(self) -> Moments:
        """Of the tokens that leave the group through its outgoing matrix, as one head."""
        return self._one_head(probes(self.unet, self.group, guided=False)[-1].key)

    def guided(self) -> Moments:
        """Of the hidden units with the halves of guidance put together."""
        return self._one_head(guided_key(self.group))

    def convolved(self) -> tuple[PatchMoments, Tensor]:
        """Of the patches under the second convolution of a ResNet block, and its weight."""
        assert self.patch_moments is not None
        (probe,) = probes(self.unet, self.group)
        return self.patch_moments(probe.key), self.out()[0]

    def _one_head(self, key: str) -> Moments:
        found = self.moments(key)
        return Moments(found.covariance[0], found.mean[0], found.count)

    def _parameter(self, name: str) -> Tensor:
        return self.unet.get_parameter(name).detach().double()

    def weight(self, i: int = 0) -> Tensor:
        """The i-th matrix into the group."""
        return self._parameter(names(self.unet, self.group).into[i][0])

    def by_head(self, i: int = 0) -> Tensor:
        """The i-th matrix into the group, (h, d_h, C)."""
        return self.weight(i).unflatten(0, (self.group.heads, -1))

    def out(self) -> tuple[Tensor, bool]:
        """The outgoing matrix, and whether it has a bias."""
        where = names(self.unet, self.group).out
        assert where is not None
        return self._parameter(where[0]), where[1] is not None

    def projected(self, i: int = 0) -> Tensor:
        """Second moments of what the i-th matrix into the group makes of its inputs, (h, d_h, d_h), not centred."""
        bias = names(self.unet, self.group).into[i][1]
        read = self.moments(inputs(self.unet, self.group)[i])
        return read.through(self.weight(i), None if bias is None else self._parameter(bias), self.group.heads).second


Solve = Callable[[Evidence], Solution]


@dataclass(frozen=True)
class Method:
    """`kinds` is what is cut unless the user says otherwise, `more` what can be cut too. `refits_output` says whether
    the UNet's last convolution is fitted anew in the end, `adapters` whether the slim UNet has maps for adapters of the
    dense one, `baselines` whether the method needs the sums of `slimdiff calibrate --baselines`, `sequential` whether
    its groups are solved one package after the other, each on what the packages cut before really feed it."""

    kinds: tuple[Kind, ...]
    influence: Influence
    solve: Solve
    refits_output: bool = False
    adapters: bool = False
    baselines: bool = False
    sequential: bool = False
    more: tuple[Kind, ...] = ()

    def curve(self, evidence: Evidence) -> Solution:
        """The solution, but for its factors, which are solved for when they are asked for: those of all groups together
        would need several times the memory of the model. One of a ResNet group is as small as it is."""
        solution = self.solve(evidence)
        if isinstance(solution, ResnetSolution):
            return solution
        return Curve(solution.error, lambda: self.solve(evidence))

    def check(self, name: str, kinds: Collection[str], recipe: Recipe) -> None:
        """Raises StatisticsError if statistics of this recipe lack what the method needs to cut these kinds."""
        for what, option, is_lacking in (
            (f"--method {name}", "--baselines", self.baselines and not recipe.baselines),
            ("--groups resnet", "--resnets", "resnet" in kinds and not recipe.resnets),
        ):
            if is_lacking:
                raise StatisticsError(
                    f"{what} needs sums that these statistics do not hold. Run 'slimdiff calibrate {option}'."
                )


def _slimdiff(evidence: Evidence) -> Solution:
    if evidence.group.kind == "qk":
        queries, keys = evidence.queries_and_keys()
        return solve_qk(queries.second, keys.second)
    if evidence.group.kind == "resnet":
        return solve_resnet(evidence.convolved, evidence.group.heads)
    weight, has_bias = evidence.out()
    if evidence.group.kind == "vo":
        return solve_vo(evidence.inner(), weight, evidence.group.heads, has_bias)
    return solve_ffn(evidence.guided(), weight, has_bias, evidence.once(elimination))


def _paper(evidence: Evidence) -> Solution:
    """Whitening SVD from the covariances of the inputs, Nyström by ridge leverage scores; no bias is corrected."""
    if evidence.group.kind == "qk":
        return solve_qk(evidence.projected(0), evidence.projected(1))
    if evidence.group.kind == "vo":
        return whiten_vo(evidence.projected(), evidence.out()[0])
    return solve_ffn(evidence.inner(), evidence.out()[0], has_bias=False, choose=leverage)


def _obs(evidence: Evidence) -> Solution:
    """Whole heads and hidden units by optimal brain surgery, with compensation."""
    weight, _ = evidence.out()
    if evidence.group.kind == "heads":
        return solve_heads(evidence.inner().second, weight, evidence.group.heads)
    return solve_ffn(evidence.inner(), weight, has_bias=False, choose=evidence.once(elimination))


def _svd_llm(evidence: Evidence) -> Solution:
    """Every matrix alone, whitened by its inputs."""
    return solve_linear(evidence.inner().second, evidence.out()[0])


def _svd(evidence: Evidence) -> Solution:
    """The products of the query-key and the value-output matrices, and each feed-forward matrix, without statistics."""
    if evidence.group.kind == "qk":
        queries, keys = evidence.by_head(0), evidence.by_head(1)
        return solve_qk(queries @ queries.mT, keys @ keys.mT)
    weight, _ = evidence.out()
    if evidence.group.kind == "vo":
        values = evidence.by_head()
        return whiten_vo(values @ values.mT, weight)
    return solve_linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight)


def _selecting(score: Callable[[Evidence], Tensor]) -> Solve:
    """Keep the dimensions of highest score as they are."""

    def solve(evidence: Evidence) -> Solution:
        scores = score(evidence)
        if evidence.group.kind == "qk":
            queries, keys = evidence.queries_and_keys()
            return selection.select_qk(scores, queries.second, keys.second)
        second, weight = evidence.inner().second, evidence.out()[0]
        if evidence.group.kind == "vo":
            return selection.select_vo(scores, second, weight)
        return selection.select_ffn(scores.flatten(), second, weight)

    return solve


def _shaped(evidence: Evidence, scores: Tensor) -> Tensor:
    """(h, d_h)"""
    return scores.view(evidence.group.heads, evidence.group.width)


def _wanda(evidence: Evidence) -> Tensor:
    if evidence.group.kind == "qk":
        queries, keys = evidence.queries_and_keys()
        return selection.wanda_qk(queries.second, keys.second)
    return _shaped(evidence, selection.wanda(evidence.inner().second, evidence.out()[0]))


def _magnitude(evidence: Evidence) -> Tensor:
    if evidence.group.kind == "qk":
        return _shaped(evidence, selection.magnitude(evidence.weight(0), evidence.weight(1)))
    into, out = evidence.weight(), evidence.out()[0]
    if evidence.group.kind == "ffn":
        into = torch.cat(into.chunk(2), 1)  # both halves of the GEGLU
    return _shaped(evidence, selection.magnitude(into, out.mT))


def _random(evidence: Evidence) -> Tensor:
    seed = int(hashlib.sha256(evidence.group.name.encode()).hexdigest()[:8], 16)
    return selection.random(evidence.group.heads, evidence.group.width, seed=seed)


METHODS: dict[MethodName, Method] = {
    "slimdiff": Method(KINDS, "sampler", _slimdiff, refits_output=True, adapters=True, more=("resnet",)),
    "paper": Method(KINDS, "energy", _paper, baselines=True),
    "obs": Method(("heads", "ffn"), "uniform", _obs, baselines=True, sequential=True),
    "svd-llm": Method(("linear",), "uniform", _svd_llm, baselines=True),
    "svd": Method(("qk", "vo", "linear"), "uniform", _svd),
    "wanda": Method(KINDS, "uniform", _selecting(_wanda), baselines=True),
    "magnitude": Method(KINDS, "uniform", _selecting(_magnitude), baselines=True),
    "random": Method(KINDS, "uniform", _selecting(_random), baselines=True),
}
