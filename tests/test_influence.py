"""Probing on a tiny pipeline: curves through what was measured, costs, and a cache that loses and invents nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import HeunDiscreteScheduler

import slimdiff.influence
import slimdiff.probing
from slimdiff.calibrate import collect
from slimdiff.errors import StatisticsError
from slimdiff.groups import Group, find_groups
from slimdiff.guidance import guided
from slimdiff.influence import FLOOR, SURE, Influence, Point
from slimdiff.methods import METHODS, Evidence
from slimdiff.probing import BROKEN, NARROW, evaluations, probe, probed, probing_widths
from slimdiff.recipe import Recipe
from slimdiff.source import Source
from slimdiff.states import States
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import truncated

WORDS = ("big cat", "tiny hill", "red boat", "old cat")
RECIPE = Recipe("sd1", WORDS, ("",) * len(WORDS), 3, 3.0, 16, 16)
ASKED = {"statistics": "digest", "prompts": 3, "steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Everything `probe` asks for: a pipeline, three of its groups, their solutions, states and recipe."""
    folder = tmp_path_factory.mktemp("influence")
    pipe = tiny_pipeline(folder / "tokenizer", tiny_unet())
    collect(pipe, Source("tiny", "tiny", None), RECIPE, folder / "s.safetensors", batch_size=4)
    statistics = StatisticsFile(folder / "s.safetensors")
    groups = [group for group in find_groups(pipe.unet) if group.module.startswith("mid_block")]
    groups = [next(group for group in groups if group.kind == kind) for kind in ("qk", "vo", "ffn")]
    solutions = {g.name: METHODS["slimdiff"].solve(Evidence(pipe.unet, g, statistics.moments)) for g in groups}
    return pipe, groups, solutions, statistics.states(), RECIPE


@contextmanager
def rows_counted(unet, stop_after: int | None = None):
    """The rows of each UNet call inside; the call after `stop_after` is Ctrl-C."""
    rows: list[int] = []

    def hook(module, args, kwargs) -> None:
        if len(rows) == stop_after:
            raise KeyboardInterrupt
        rows.append(len(args[0] if args else kwargs["sample"]))

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@dataclass(frozen=True)
class Curve:
    """A solution that is nothing but its error."""

    error: torch.Tensor


def group_of(width: int) -> Group:
    return replace(find_groups(tiny_unet())[0], name="g", width=width)


def known(**points: tuple[float, list[float]]) -> Influence:
    """An influence of the group g, measured in float32; points by width, w16=(local error, final errors)."""
    found = {int(w[1:]): Point(local, tuple(final)) for w, (local, final) in points.items()}
    return Influence("", "sampler", {"g": found}, rounding=1e-12)


FALLING = Curve(torch.linspace(1, 0, 17, dtype=torch.float64) ** 2)
"""Local errors of a group of width 16: at widths 8, 4 and 12 they are 1/4, 9/16 and 1/16."""


def test_one_point_is_a_weight_of_the_local_error():
    found = known(w8=(0.25, [0.5, 0.1, 0.2])).final_errors(group_of(16), FALLING)
    assert found.shape == (17,) and found.dtype == torch.float64
    torch.testing.assert_close(found, FALLING.error * 0.2 / 0.25)


def test_several_points_are_met_joined_by_power_laws_and_left_proportionally():
    influence = known(w12=(1 / 16, [1e-4]), w8=(1 / 4, [1e-2]), w4=(9 / 16, [2e-2]))
    found = influence.final_errors(group_of(16), FALLING)
    for width, final in {12: 1e-4, 8: 1e-2, 4: 2e-2, 16: 0}.items():
        assert float(found[width]) == pytest.approx(final)
    assert (found.diff() <= 0).all()
    local = FALLING.error
    slope = torch.log(found[10] / found[12]) / torch.log(local[10] / local[12])
    assert float(slope) == pytest.approx(torch.log(torch.tensor(100.0)) / torch.log(torch.tensor(4.0)))
    torch.testing.assert_close(found[12:] / local[12:].clamp(min=1e-300), torch.tensor([1.6e-3] * 4 + [0]).double())
    torch.testing.assert_close(found[:5] / local[:5], torch.full((5,), 2e-2 * 16 / 9).double())


def test_a_second_point_matters_where_the_response_bends():
    one, two = known(w8=(0.25, [0.01])), known(w8=(0.25, [0.01]), w4=(9 / 16, [0.5]))
    a, b = (influence.final_errors(group_of(16), FALLING) for influence in (one, two))
    torch.testing.assert_close(a[8:], b[8:])
    assert (b[:8] > 1.2 * a[:8]).all()


def test_less_width_never_promises_less_error():
    found = known(w12=(1 / 16, [0.3]), w8=(1 / 4, [0.1])).final_errors(group_of(16), FALLING)
    assert (found.diff() <= 0).all() and float(found[8]) == pytest.approx(0.3)
    bumpy = Curve(torch.tensor([1.0, 0.2, 0.5, 0.1, 1e-5]))
    found = known(w2=(0.5, [0.5])).final_errors(group_of(4), bumpy)
    torch.testing.assert_close(found, torch.tensor([1, 0.5, 0.5, 0.1, 0], dtype=torch.float64))


def test_equal_local_errors_count_as_the_worse():
    found = known(w12=(0.25, [0.1]), w8=(0.25, [0.2])).final_errors(group_of(16), FALLING)
    assert float(found[8]) == pytest.approx(0.2)


@pytest.mark.parametrize("point", [(0.0, [0.0]), (0.0, [1e-9]), (FLOOR / 2, [1e-3]), (0.25, [0.0]), (0.25, [5e-13])])
def test_points_lost_in_rounding_do_not_count(point):
    assert not known(w8=point).final_errors(group_of(16), FALLING).any()
    with_another = known(w8=point, w4=(9 / 16, [9 / 16])).final_errors(group_of(16), FALLING)
    torch.testing.assert_close(with_another, FALLING.error)


def test_a_point_that_rounding_may_have_made_counts_only_if_there_is_no_better():
    lost, clear = (0.25, [3e-6]), (9 / 16, [9e-6])
    alone = replace(known(w8=lost), rounding=1e-6).final_errors(group_of(16), FALLING)
    torch.testing.assert_close(alone, FALLING.error * 3e-6 / 0.25)
    both = replace(known(w8=lost, w4=clear), rounding=1e-6).final_errors(group_of(16), FALLING)
    torch.testing.assert_close(both, FALLING.error * 9e-6 * 16 / 9)
    nothing = replace(known(w8=lost, w4=clear), rounding=1e-5).final_errors(group_of(16), FALLING)
    assert not nothing.any()


def test_dead_groups_have_no_error_to_predict():
    assert not known(w8=(0.0, [0.0])).final_errors(group_of(16), Curve(torch.zeros(17))).any()


def test_the_quantile_is_over_prompts_and_one_flip_does_not_decide():
    influence = known(w8=(0.25, [1.0, 2.0, 3.0, BROKEN]))
    at_8 = [float(influence.final_errors(group_of(16), FALLING, q)[8]) for q in (0, 0.5, 0.75, 1)]
    assert at_8 == pytest.approx([1, 2, 3, BROKEN])


def test_probing_widths_are_distinct_and_move_to_where_something_is_lost():
    assert probing_widths(group_of(16), FALLING, (0.75, 0.5, 0.25)) == [12, 8, 4]
    assert probing_widths(group_of(16), FALLING, (0.5, 0.51, 0.001, 1.0)) == [8, 1, 15]
    low_rank = Curve(torch.tensor([1.0, 0.5, 0.2, 0.1, *[0.0] * 13]))
    assert probing_widths(group_of(16), low_rank, (0.75, 0.5, 0.25)) == [3, 2]
    assert probing_widths(group_of(16), Curve(torch.zeros(17)), (0.75, 0.5)) == [1]
    assert probing_widths(group_of(1), Curve(torch.tensor([1.0, 0.0])), (0.5,)) == [1]


def test_the_prediction_at_a_probed_width_is_the_measured_median(tiny):
    groups, solutions = tiny[1:3]
    influence = probe(*tiny, shares=(0.75, 0.25), **ASKED)
    for group in groups:
        found = influence.final_errors(group, solutions[group.name])
        assert sorted(influence.points[group.name]) == [group.width // 4, group.width * 3 // 4]
        for width, point in influence.points[group.name].items():
            assert len(point.errors) == 3 and point.local == float(solutions[group.name].error[width])
            assert float(found[width]) == pytest.approx(sorted(point.errors)[1])


def test_widths_do_not_depend_on_each_other(tiny):
    both, one = (probe(*tiny, shares=shares, **ASKED) for shares in ((0.75, 0.5), (0.5,)))
    for name, points in one.points.items():
        (width,) = points
        assert points[width].errors == pytest.approx(both.points[name][width].errors)


def test_what_rounding_hides_is_probed_narrower(tiny, monkeypatch):
    """With rounding as coarse as what half the width of the first group loses, that group is measured again."""
    groups = tiny[1]
    plain = probe(*tiny, **ASKED)
    assert 0 < plain.rounding < 1e-11
    half = plain.points[groups[0].name][groups[0].width // 2].final()
    exact = slimdiff.probing.relative_error
    monkeypatch.setattr(slimdiff.probing, "relative_error", lambda *pair: exact(*pair) + half / 2)
    coarse = probe(*tiny, **ASKED)
    assert coarse.rounding == pytest.approx(half / 2, rel=1e-6)
    assert list(coarse.points[groups[0].name]) == [groups[0].width // 2, groups[0].width // NARROW]
    for group in groups:
        (found, *again) = (point.final() for point in coarse.points[group.name].values())
        assert bool(again) == (found <= SURE * coarse.rounding)


def test_half_precision_knows_its_own_rounding(tiny):
    pipe, *rest = tiny
    half = deepcopy(pipe).to(torch.bfloat16)
    assert 1e-7 < probe(half, *rest, **ASKED).rounding < 1e-2


def test_prompts_may_run_in_parts(tiny, monkeypatch):
    together = probe(*tiny, **ASKED)
    monkeypatch.setattr(slimdiff.probing, "prompts_at_once", lambda *size: 2)
    with rows_counted(tiny[0].unet) as rows:
        apart = probe(*tiny, **ASKED)
    assert set(rows) == {2, 4}
    for name, points in together.points.items():
        for width, point in points.items():
            assert apart.points[name][width].errors == pytest.approx(point.errors, rel=1e-3)


@pytest.mark.parametrize("kind", ["sampler", "noise"])
def test_the_cost_is_what_really_runs(tiny, kind):
    pipe, groups, _, states, _ = tiny
    steps = 2 if kind == "sampler" else sum(prompt < 3 for prompt in states.prompts) // 3
    with rows_counted(pipe.unet) as rows:
        probe(*tiny, kind=kind, shares=(0.75, 0.5, 0.25), **ASKED)
    assert sum(rows) == evaluations(groups, (0.75, 0.5, 0.25), 3, steps) == 2 * 3 * steps * (1 + 2 + 9)


def test_the_noise_error_is_nothing_at_full_width_and_grows_with_what_is_cut(tiny, monkeypatch):
    groups = tiny[1]
    influence = probe(*tiny, kind="noise", shares=(0.75, 0.5, 0.25), **ASKED)
    for group in groups:
        finals = [sum(point.errors) for _, point in sorted(influence.points[group.name].items())]
        assert finals[0] > finals[1] > finals[2] > 0
    monkeypatch.setattr(slimdiff.probing, "probing_widths", lambda group, *_: [group.width])
    whole = probe(*tiny, kind="noise", **ASKED)
    assert max(max(whole.points[g.name][g.width].errors) for g in groups) < 1e-11


def test_the_noise_error_is_that_of_the_guided_prediction_over_a_prompts_states(tiny):
    pipe, groups, solutions, states, recipe = tiny
    group, width = groups[2], groups[2].width // 2
    found = probe(*tiny, kind="noise", **ASKED).points[group.name][width]
    wanted = []
    for prompt in range(3):
        chosen = [i for i, owner in enumerate(states.prompts) if owner == prompt]
        arguments = states.batch(chosen, torch.device("cpu"), torch.float32)

        def predict(arguments=arguments) -> torch.Tensor:
            with torch.no_grad():
                negative, positive = pipe.unet(**arguments).sample.double().chunk(2)
            return negative + recipe.guidance_scale * (positive - negative)

        dense = predict()
        with truncated(pipe.unet, group, solutions[group.name].at(width)):
            changed = predict()
        wanted.append(float(((changed - dense).square().sum((1, 2, 3)) / dense.square().sum((1, 2, 3))).mean()))
    assert found.errors == pytest.approx(wanted, rel=1e-3)


def test_guidance_of_one_or_two_halves():
    negative, positive = torch.randn(2, 3, 4, 2, 2)
    assert torch.equal(guided(positive, 3, 7.0), positive)
    both = guided(torch.cat([negative, positive]), 3, 7.0)
    torch.testing.assert_close(both, 7 * positive - 6 * negative)


@pytest.mark.parametrize("kind", ["sampler", "noise"])
def test_outputs_that_are_not_finite_are_very_wrong(tiny, monkeypatch, kind):
    groups = tiny[1]

    @contextmanager
    def broken(unet, group, factors):
        weight = unet.conv_out.weight
        before = weight.data
        weight.data = torch.full_like(before, torch.nan)
        yield
        weight.data = before

    monkeypatch.setattr(slimdiff.probing, "truncated", broken)
    influence = probe(*tiny, kind=kind, **ASKED)
    assert all(set(point.errors) == {BROKEN} for g in groups for point in influence.points[g.name].values())


def test_probing_needs_states(tiny):
    with pytest.raises(StatisticsError, match="no calibration states"):
        probe(*tiny[:3], States(), RECIPE, **ASKED)


def test_the_scheduler_and_the_weights_are_back_whatever_happens(tiny):
    pipe, groups, solutions, states, recipe = tiny
    own, weights = pipe.scheduler, {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    recipe = replace(recipe, scheduler="heun")
    seen = []
    with pytest.raises(ZeroDivisionError):
        probe(pipe, groups, solutions, states, recipe, **ASKED, on_point=lambda: seen.append(pipe.scheduler) or 1 / 0)
    assert isinstance(seen[0], HeunDiscreteScheduler) and pipe.scheduler is own
    for calls in (0, 1, 5):
        with pytest.raises(KeyboardInterrupt), rows_counted(pipe.unet, stop_after=calls):
            probe(pipe, groups, solutions, states, recipe, **ASKED)
        assert pipe.scheduler is own
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


def cached(tiny, path, **changes):
    return probed(path, *tiny, **{**ASKED, "method": "slimdiff", **changes})


def test_what_is_in_the_cache_is_not_run_again(tiny, tmp_path):
    path = tmp_path / "s.influence.json"
    first = cached(tiny, path, shares=(0.75, 0.5))
    written = path.stat().st_mtime_ns
    with rows_counted(tiny[0].unet) as rows:
        assert cached(tiny, path, shares=(0.75, 0.5)) == first
        one = cached(tiny, path, shares=(0.5,))
    assert rows == [] and path.stat().st_mtime_ns == written
    assert all(list(points) == [group.width // 2] for group, points in zip(tiny[1], one.points.values(), strict=True))


def test_only_what_is_missing_runs(tiny, tmp_path):
    pipe, groups, solutions, states, recipe = tiny
    path = tmp_path / "s.influence.json"
    settings = {**ASKED, "method": "slimdiff"}
    probed(path, pipe, groups[:2], solutions, states, recipe, **settings)
    with rows_counted(pipe.unet) as rows:
        found = cached(tiny, path, shares=(0.5, 0.25))
    assert sum(rows) == 2 * 3 * 2 * (1 + 4)  # the dense run, two new widths, and both widths of the third group
    fresh = probe(*tiny, **ASKED, shares=(0.5, 0.25))
    for name, points in fresh.points.items():
        assert points.keys() == found.points[name].keys()
        for width, point in points.items():
            assert found.points[name][width].errors == pytest.approx(point.errors)


def test_other_settings_are_other_runs_and_live_side_by_side(tiny, tmp_path):
    path = tmp_path / "s.influence.json"
    ways = [{}, {"kind": "noise"}, {"method": "paper"}, {"prompts": 2}, {"steps": 1}]
    first = []
    for way in ways:
        with rows_counted(tiny[0].unet) as rows:
            first.append(cached(tiny, path, **way))
        assert rows
    with rows_counted(tiny[0].unet) as rows:
        assert [cached(tiny, path, **way) for way in ways] == first
        cached(tiny, path, kind="noise", steps=7)  # nothing is sampled
        assert rows == []
    assert len(json.loads(path.read_text())["runs"]) == len(ways)


def test_more_prompts_than_there_are_find_their_cache(tiny, tmp_path):
    path = tmp_path / "s.influence.json"
    assert all(len(p.errors) == 4 for ps in cached(tiny, path, prompts=99).points.values() for p in ps.values())
    with rows_counted(tiny[0].unet) as rows:
        cached(tiny, path, prompts=99)
        cached(tiny, path, prompts=4)
    assert rows == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace('"format": 2', '"format": 1'),
        lambda text: text.replace('"statistics": "digest"', '"statistics": "another"'),
        lambda text: text.replace('"local"', '"lokal"'),
        lambda text: text.replace('"errors": [', '"errors": [null, '),
        lambda text: text.replace('"errors": [', '"errors": [0.5, '),
        lambda text: '{"statistics": "digest", "prompts": 3, "steps": 2, "widths": {}, "errors": {}}',
        lambda text: '{"format": 2, "statistics": "digest", "runs": 3}',
    ],
)
def test_damaged_and_foreign_caches_are_replaced(tiny, tmp_path, damage):
    path = tmp_path / "s.influence.json"
    first = cached(tiny, path)
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with rows_counted(tiny[0].unet) as rows:
        again = cached(tiny, path)
    assert sum(rows) == evaluations(tiny[1], (0.5,), 3, 2)
    assert again == first and path.read_text() == whole


def test_other_solutions_are_probed_again(tiny, tmp_path):
    pipe, groups, solutions, states, recipe = tiny
    path = tmp_path / "s.influence.json"
    first = cached(tiny, path)

    @dataclass(frozen=True)
    class Other:
        """As good as a tenth less, by its own account."""

        solution: object
        factor: float

        @property
        def error(self):
            return self.solution.error * self.factor

        def at(self, r):
            return self.solution.at(r)

    name = groups[1].name
    for factor, again in {1 + 1e-5: 0, 0.9: 1}.items():
        changed = {**solutions, name: Other(solutions[name], factor)}
        with rows_counted(pipe.unet) as rows:
            found = probed(path, pipe, groups, changed, states, recipe, method="slimdiff", **ASKED)
        assert sum(rows) == 2 * 3 * 2 * 2 * again
    (width,) = first.points[name]
    assert found.points[name][width].local == pytest.approx(0.9 * first.points[name][width].local)
    assert found.points[groups[0].name] == first.points[groups[0].name]
    with rows_counted(pipe.unet) as rows:
        probed(path, pipe, groups, changed, states, recipe, method="slimdiff", **ASKED)
    assert rows == []


def test_an_interrupt_keeps_what_was_done(tiny, tmp_path):
    path, calls = tmp_path / "s.influence.json", 2 * (1 + 2) + 1  # the dense run, two groups, and a step into the third
    with pytest.raises(KeyboardInterrupt), rows_counted(tiny[0].unet, stop_after=calls):
        cached(tiny, path)
    (run,) = json.loads(path.read_text())["runs"].values()
    assert list(run) == [group.name for group in tiny[1][:2]]  # at full width, which tells rounding
    with rows_counted(tiny[0].unet) as rows:
        found = cached(tiny, path)
    assert sum(rows) == 2 * 3 * 2 * (1 + 3) and len(found.points) == 3


def test_an_interrupt_before_anything_is_known_writes_nothing(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt), rows_counted(tiny[0].unet, stop_after=1):
        cached(tiny, tmp_path / "s.influence.json")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_written_now_and_then(tiny, tmp_path, monkeypatch):
    sizes = []
    write = slimdiff.influence.write_json
    monkeypatch.setattr(
        slimdiff.influence, "write_json", lambda path, data: (write(path, data), sizes.append(path.stat().st_size))
    )
    cached(tiny, tmp_path / "rarely.json")
    assert len(sizes) == 1
    monkeypatch.setattr(slimdiff.probing, "KEEP_EVERY", -1.0)
    cached(tiny, tmp_path / "always.json")
    assert len(sizes) == 1 + 2 + 3 and sorted(set(sizes)) == sizes[1:] and sizes[-1] == sizes[0]
