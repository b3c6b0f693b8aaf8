"""Budgets in time: what is timed, what a plan makes of it, and how near the prediction comes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, tiny_pipeline, tiny_unet
from test_cli import run
from torch.utils.flop_counter import FlopCounterMode

import slimdiff.profile
from slimdiff import timing
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut, make_plan, solve
from slimdiff.errors import BudgetError, SlimdiffError
from slimdiff.groups import find_groups
from slimdiff.latency import Curve, Table
from slimdiff.measured import Spread, Timing
from slimdiff.options import share_of
from slimdiff.plan import Plan
from slimdiff.profile import cached, conditions_of, currency, profile, shapes
from slimdiff.recipe import Recipe
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.source import Source
from slimdiff.statistics import StatisticsFile
from slimdiff.widths import allowed_widths, prices, required, units

RECIPE = Recipe("sd1", ("a cat", "a boat", "a hill"), ("",) * 3, 2, 3.0, 16, 16)
CPU = torch.device("cpu")


def by_flops(calls: Sequence[Callable[[], object]], **_: object) -> list[float]:
    """A clock without noise: a floating-point operation takes a nanosecond."""
    times = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        times.append(1e-9 * counter.get_total_flops())
    return times


def pair_by_flops(what, dense, slim, **_: object) -> Timing:
    a, b = by_flops([dense, slim])
    return paired_times(a, b)


def paired_times(dense: float, slim: float) -> Timing:
    return Timing("x", *(Spread(x, x, x) for x in (dense, slim, dense / slim)), 1, 1)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), tiny_unet())


@pytest.fixture(scope="module")
def statistics(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    collect(pipe, Source("tiny", "tiny", None), RECIPE, path, batch_size=3)
    return StatisticsFile(path)


@pytest.fixture
def flops(monkeypatch):
    monkeypatch.setattr(slimdiff.profile, "in_turns", by_flops)
    monkeypatch.setattr(slimdiff.profile, "paired", pair_by_flops)


def together(pipe, **options):
    return units(find_groups(pipe.unet), Options(0, **options))


def conditions(pipe, prompts=1):
    return conditions_of(pipe, RECIPE, prompts, torch.float32)


def made_up(pipe, of, step=1, call=0.01) -> Table:
    """Times that fall with every `step` widths of a head, and with the hidden units, faster in larger layers."""
    there = conditions(pipe)
    curves = {}
    for shape in shapes(pipe, of, there).values():
        widths = tuple(range(1, shape.full + 1))
        each = 1e-9 * math.isqrt(shape.parameters)
        curves[shape] = Curve(
            widths, tuple(each * (step * math.ceil(w / step) if shape.is_padded else w) for w in widths)
        )
    return Table(there, call, 1.0, curves)


@pytest.mark.parametrize("independent", [False, True])
def test_the_prediction_adds_up_to_the_slim_unet(pipe, flops, independent):
    """With operations for a clock, the predicted time of any slim UNet is its own."""
    of = together(pipe, independent_ranks=independent)
    table = profile(pipe, of, conditions(pipe))
    assert table.scale == pytest.approx(1)  # no less: the UNet saves all that its layers do
    spent_in = currency(pipe, of, table)
    chosen = [prices(unit, Options(0), spent_in) for unit in of]
    widths = [list(costs)[i % len(costs)] for i, costs in enumerate(chosen)]
    saved = sum(costs[unit[0].width] - costs[w] for costs, unit, w in zip(chosen, of, widths, strict=True))
    ranks = {group.name: w for unit, w in zip(of, widths, strict=True) for group in unit}
    slim = SlimUNet2DConditionModel.from_config(pipe.unet.config, slim_ranks=ranks)
    inputs = torch.randn(2, 4, 8, 8), torch.ones(2), torch.randn(2, TOKENS, 12)
    assert saved > 0
    assert spent_in.whole - saved == pytest.approx(1e9 * by_flops([lambda: slim(*inputs)])[0], abs=len(of))


def test_layers_of_one_shape_are_timed_once_at_the_widths_compress_may_take(pipe, flops):
    of = together(pipe)
    table = profile(pipe, of, conditions(pipe))
    known = shapes(pipe, of, table.conditions)
    assert len(of) == 21 and len(table.curves) == len(set(known.values())) == 6
    assert {len(shape.inputs) for shape in table.curves if shape.layer == "Attention"} == {1, 2}  # self and cross
    for unit in of:
        curve = table.curves[known[unit[0].name]]
        assert curve.widths[-1] == unit[0].width
        if unit[0].kind == "qk":
            assert set(allowed_widths(unit[0], Options(0))) <= set(curve.widths)
        else:
            assert len(curve.widths) == slimdiff.profile.POINTS


def test_what_layers_save_is_scaled_to_what_the_unet_saves(pipe, flops, monkeypatch):
    """Here, the UNet saves half as much as its layers do alone, or more, which is not counted on, or nothing at all."""
    of = together(pipe)
    table = profile(pipe, of, conditions(pipe))
    least = {unit[0].name: allowed_widths(unit[0], Options(0))[-1] for unit in of}
    known = shapes(pipe, of, table.conditions)
    saved = sum(table.seconds(shape, shape.full) - table.seconds(shape, least[name]) for name, shape in known.items())

    def measured(slim: float) -> Table:
        monkeypatch.setattr(slimdiff.profile, "paired", lambda *_, **__: paired_times(table.call, slim))
        return profile(pipe, of, conditions(pipe))

    assert measured(table.call - saved / 2).scale == pytest.approx(0.5)
    assert measured(table.call - 1.1 * saved).scale == 1
    spent_in = currency(pipe, of, measured(1.1 * table.call))
    with pytest.raises(BudgetError, match="of which at most"):
        required(find_groups(pipe.unet), Options(0.01, of="latency"), spent_in)


def test_batch_and_size_are_those_of_the_conditions(pipe, flops):
    of = together(pipe, kinds=("ffn",))
    one, four = (profile(pipe, of, conditions(pipe, prompts)) for prompts in (1, 4))
    assert four.call == pytest.approx(4 * one.call, rel=0.01)
    large = replace(one.conditions, height=32, width=32)
    assert {shape.inputs[0][1] for shape in shapes(pipe, of, large).values()} == {64, 256}


def test_real_times_make_a_whole_table(pipe, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(timing, "BRIEF", 1e-4)
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    table = profile(pipe, together(pipe), conditions(pipe))
    assert table.call > max(curve.seconds[-1] for curve in table.curves.values()) > 0
    assert all(list(curve.seconds) == sorted(curve.seconds) for curve in table.curves.values())
    assert not pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1._forward_pre_hooks


def test_calls_are_timed_in_turns_forwards_and_backwards(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "BRIEF", 1e-9)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    order: list[int] = []
    monkeypatch.setattr(timing, "_time", lambda call, calls, device: call() or 1.0 + order[-1])
    times = timing.in_turns([lambda i=i: order.append(i) for i in range(3)], device=CPU, what="x")
    assert order == [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert times == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("budget", [0.005, 0.02, 0.05])
def test_time_is_spent_as_well_as_can_be(pipe, statistics, budget):
    """Against all choices of widths there are."""
    options = Options(budget, of="latency", kinds=("ffn",), round_to=4, influence="local")
    of = units(find_groups(pipe.unet, kinds=("ffn",)), options)
    table = made_up(pipe, of, call=2e-4)
    plan, solutions = make_plan(pipe, statistics, options, solve(pipe, statistics, [options], lambda _: table))
    spent_in = currency(pipe, of, table)
    costs = [prices(unit, options, spent_in) for unit in of]
    least = min(
        sum(float(solutions[unit[0].name].error[w]) for unit, w in zip(of, widths, strict=True))
        for widths in itertools.product(*costs)
        if sum(c[u[0].width] - c[w] for c, u, w in zip(costs, of, widths, strict=True)) >= budget * spent_in.whole
    )
    assert sum(entry.local_error for entry in plan.entries) == pytest.approx(least, rel=1e-5)
    assert plan.achieved >= budget


def test_widths_that_save_no_time_are_never_chosen(pipe, statistics):
    of = together(pipe)
    table = made_up(pipe, of, step=8, call=5e-5)
    chosen = set()
    for budget in (0.02, 0.1, 0.2):
        options = Options(budget, of="latency", influence="local")
        plan, _ = make_plan(pipe, statistics, options, solve(pipe, statistics, [options], lambda _: table))
        chosen |= {entry.rank for entry in plan.entries if entry.kind != "ffn"}
    assert chosen == {8, 16}


def test_the_forecast_is_the_call_less_what_the_cut_layers_save(pipe, statistics):
    of = together(pipe)
    table = made_up(pipe, of, call=1e-4)
    share = share_of(1.15)
    _, plan = cut(pipe, statistics, Options(share, of="latency", influence="local"), lambda _: table)
    known = shapes(pipe, of, table.conditions)
    ranks = {entry.group: entry.rank for entry in plan.entries}
    saved = sum(table.seconds(shape, shape.full) - table.seconds(shape, ranks[name]) for name, shape in known.items())
    assert plan.latency.seconds == pytest.approx((1e-4, 1e-4 - saved))
    assert plan.latency.speedup >= 1.15 and plan.achieved == pytest.approx(saved / 1e-4)
    assert Plan.from_json(plan.to_json()).latency == plan.latency
    assert "0.1 ms -> " in "\n".join(plan.summary()) and "x as fast" in "\n".join(plan.summary())


def test_a_speed_up_out_of_reach_is_refused_with_the_most_there_is(pipe, statistics):
    table = made_up(pipe, together(pipe), call=1e-4)

    def planned(speedup):
        options = Options(share_of(speedup), of="latency", influence="local")
        return make_plan(pipe, statistics, options, solve(pipe, statistics, [options], lambda _: table))[0]

    with pytest.raises(BudgetError, match=r"75.0% of the UNet call's 100 us is 75.0 us. .* hold \d.* us") as refusal:
        planned(4)
    most = float(str(refusal.value).partition("--speedup ")[2].partition(",")[0])
    assert planned(most).latency.speedup >= most > 1
    with pytest.raises(BudgetError):
        planned(most + 0.011)


def test_time_cannot_be_spent_without_a_table(pipe, statistics):
    with pytest.raises(BudgetError, match="latency table"):
        make_plan(pipe, statistics, Options(0.1, of="latency"))


@pytest.mark.parametrize("speedup", [1, 0.5, -2, math.nan, math.inf])
def test_speed_ups_that_are_none(speedup):
    with pytest.raises(BudgetError, match="above 1"):
        share_of(speedup)


def test_a_table_that_does_not_fit_is_measured_anew_and_kept(pipe, flops, tmp_path):
    path, of, here = tmp_path / "latency.json", together(pipe)[:3], conditions(pipe)
    said: list[str] = []

    def table():
        said.clear()
        return cached(path, pipe, of, here, said.append)

    first = table()
    assert "There is no" in said[0] and Table.read(path) == first
    assert table() == first and not said
    for change in ({"device": "another"}, {"dtype": "float16"}, {"torch": "1.0"}, {"height": 8}, {"parameters": 1}):
        replace(first, conditions=replace(here, **change), call=9.0).write(path)
        assert table() == first == Table.read(path)
        assert f"it has {next(iter(change))}" in said[0] and "anew" in said[0]
    replace(first, curves=dict(list(first.curves.items())[1:])).write(path)
    assert table() == first and "no times of Attention" in said[0]
    path.write_text("{")
    assert table() == first and "no latency table" in said[0]


def test_the_batch_of_a_table_that_is_there_counts(pipe, flops, tmp_path):
    path, of = tmp_path / "latency.json", together(pipe)
    profile(pipe, of, conditions(pipe, 4)).write(path)
    assert cached(path, pipe, of, conditions(pipe), pytest.fail).conditions.rows == 8


def test_tables_of_other_models_and_groups_are_refused(pipe, tmp_path):
    table = made_up(pipe, together(pipe))
    with pytest.raises(SlimdiffError, match=r"parameters.*slimdiff profile"):
        currency(pipe, together(pipe), replace(table, conditions=replace(table.conditions, parameters=7)))
    with pytest.raises(SlimdiffError, match=r"no times of Attention, qk of 2 x 8.*--independent-ranks"):
        currency(pipe, together(pipe, independent_ranks=True), table)


QUICK = ["--device", "cpu", "--influence", "local"]


def test_profile_compress_and_bench_go_together(flops, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "SHORTEST", 1e-3)
    file = tmp_path / "s.safetensors"
    run("calibrate", model_folder, "--num-prompts", 2, "--steps", 2, "--device", "cpu", "-o", file)
    out = run("profile", model_folder, "--device", "cpu", "-o", tmp_path / "given.json")
    assert "6 distinct layers" in out
    assert f"next: slimdiff compress --speedup 1.2 --latency {tmp_path / 'given.json'}\n" in out
    assert "--speedup 1.2\n" in run("profile", model_folder, "--device", "cpu")
    out = run("compress", file, "--speedup", 1.1, *QUICK, "--latency", tmp_path / "given.json")
    assert "1.1" in out and "x as fast, in float32 at 2 rows" in out and "latency.json" not in out
    assert "There is no" in run("compress", file, "--speedup", 1.1, "--budget-of", "latency", *QUICK, "--force")
    assert "There is no" not in run("compress", file, "--budget-of", "latency", "--budget", 0.05, *QUICK)
    assert {p.name for p in tmp_path.glob("slim-*")} == {"slim-1.1x", "slim-0.05-latency"}
    assert "The most for this model is --speedup" in run("compress", file, "--speedup", 9, *QUICK, code=1)
    out = run(
        "bench", tmp_path / "slim-1.1x", "--num-prompts", 2, "--repeats", 3, "--batch-sizes", "1,2", "--device", "cpu"
    )
    assert "predicted a speed-up of 1.1" in out
    report = json.loads((tmp_path / "bench-1.1x/report.json").read_text())
    speedups = [row["predicted_speedup"] for row in report["speed"]]
    assert speedups[0] >= 1.1 and speedups[1:] == [None, None]
    page = (tmp_path / "bench-1.1x/report.html").read_text()
    assert 'data-of="predicted"' in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--speedup", 1.2, "--budget", 0.1), "leave --budget"),
        (("--speedup", 1.2, "--budget-of", "macs"), "leave --budget"),
        (("--latency", "t.json"), "--latency is for budgets in time"),
        (("--latency", "t.json", "--budget-of", "macs"), "--latency is for budgets in time"),
    ],
)
def test_options_that_exclude_each_other(statistics, options, says):
    assert says in run("compress", statistics.path, *options, code=2)


def test_a_speed_up_that_is_none_and_a_table_that_is_not_there(model_folder, statistics, tmp_path):
    assert "above 1" in run("compress", statistics.path, "--speedup", 0.9, *QUICK, code=1)
    options = "--speedup", 1.2, "--latency", tmp_path / "none.json", "--model", model_folder
    assert "none.json: No such file" in run("compress", statistics.path, *options, *QUICK, code=1)


def check_prediction(folder: Path, device: torch.device, dtype: torch.dtype, channels: tuple[int, int], size: int):
    """Every layer cut to about a quarter: the slim call takes about as long as predicted, and no longer than dense."""
    unet = tiny_unet(block_out_channels=channels, sample_size=size, norm_num_groups=16, attention_head_dim=4)
    pipe = tiny_pipeline(folder, unet).to(device, dtype)
    of = together(pipe)
    job = replace(RECIPE, height=2 * size, width=2 * size)
    table = profile(pipe, of, conditions_of(pipe, job, 1, dtype))
    spent_in = currency(pipe, of, table)
    widths = {unit[0].name: allowed_widths(unit[0], Options(0, min_width=0.25))[-1] for unit in of}
    saved = sum(spent_in.cost(unit, unit[0].width) - spent_in.cost(unit, widths[unit[0].name]) for unit in of)
    ranks = {group.name: widths[unit[0].name] for unit in of for group in unit}
    slim = SlimUNet2DConditionModel.from_config(unet.config, slim_ranks=ranks).to(device, dtype).eval()
    slim.reuse_text_projections(False)
    inputs = torch.randn(2, 4, size, size), torch.full((2,), 500), torch.randn(2, TOKENS, 12)
    inputs = inputs[0].to(device, dtype), inputs[1].to(device), inputs[2].to(device, dtype)
    with torch.no_grad():
        timed = timing.paired("x", lambda: unet(*inputs), lambda: slim(*inputs), pairs=15, device=device)
    predicted = spent_in.whole / (spent_in.whole - saved)
    assert predicted > 1.02
    assert timed.speedup.median == pytest.approx(predicted, rel=0.35)


@pytest.mark.slow
def test_the_predicted_call_is_near_the_measured_one(tmp_path):
    """Of a UNet wide enough that its layers take their time."""
    check_prediction(tmp_path, CPU, torch.float32, channels=(64, 128), size=32)


@pytest.mark.cuda
def test_the_prediction_holds_on_cuda(tmp_path):
    check_prediction(tmp_path, torch.device("cuda"), torch.float16, channels=(320, 640), size=64)
