"""The benchmark on a tiny pipeline: no drift against itself, more drift the more is changed, honest figures."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from slimdiff import fidelity, timing
from slimdiff.bench import Report, Settings, measure
from slimdiff.demo import scenes
from slimdiff.errors import SlimdiffError
from slimdiff.groups import find_groups
from slimdiff.measured import quantile
from slimdiff.plan import Entry, Plan
from slimdiff.profile import conditions_of
from slimdiff.slim_unet import SlimUNet2DConditionModel

CAPTIONS = scenes.captions(5, seed=3, held_out=True)
PROMPTS = ("red cat", "an owl", "two bees", "a fox", "the sea")  # the tiny tokenizer spells them
SETTINGS = Settings(
    PROMPTS, ("", "a dog", "", "", "blurry"), steps=3, guidance_scale=4.0, height=16, width=16,
    batch_sizes=(1, 2), repeats=2, pictures=4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Timings just long enough to have run, on one thread: these tensors are too small to share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SHORTEST", 0.01)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


def with_unet(pipe: StableDiffusionPipeline, unet: torch.nn.Module) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)


def perturbed(pipe: StableDiffusionPipeline, amount: float) -> StableDiffusionPipeline:
    unet = copy.deepcopy(pipe.unet)
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        parameter.data += amount * parameter.data.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return with_unet(pipe, unet)


def plan_of(unet: UNet2DConditionModel, share: float = 1.0) -> Plan:
    entries = tuple(
        Entry(g.name, g.kind, g.width, max(1, int(g.width * share)), (g.params, g.params), (0, 0), 1e-3, 1e-3)
        for g in find_groups(unet)
    )
    return Plan(1 - share, "groups", 1 - share, entries, (1, 1), (1, 1), 0.02, 0.01, {"model": "owner/tiny"})


@pytest.fixture(scope="module")
def same(dense: StableDiffusionPipeline) -> Report:
    return measure(dense, dense, plan_of(dense.unet), replace(SETTINGS, repeats=5), sizes=(1000, 1000))


@pytest.fixture(scope="module")
def cut(dense: StableDiffusionPipeline) -> Report:
    plan = plan_of(dense.unet, 0.5)
    torch.manual_seed(2)
    unet = SlimUNet2DConditionModel.from_config(dense.unet.config, slim_ranks=plan.ranks()).requires_grad_(False).eval()
    return measure(dense, with_unet(dense, unet), plan, SETTINGS, sizes=(1000, 700))


def test_a_model_does_not_drift_from_itself(same: Report) -> None:
    assert same.fidelity.drift == (0.0,) * 5
    assert len(same.fidelity.noise) == len(same.fidelity.timesteps) == 3
    assert all(error == 0 for step in same.fidelity.noise for error in step)
    assert same.fidelity.ssim == pytest.approx((1.0,) * 5)
    assert math.isinf(same.fidelity.psnr(1))
    assert "do not drift at all" in same.table() and "identical" in same.table()
    assert same.size.parameters[0] == same.size.parameters[1] and same.size.ideal_speedup == 1
    for timed in same.speed:  # near 1, with room for a loaded machine
        assert timed.speedup.q1 < 1.5 and timed.speedup.q3 > 0.67


def test_rows_are_those_the_unet_sees(tmp_path) -> None:
    """A UNet that is told the guidance scale, as LCM's, runs on no second half."""
    for told, doubled in ((None, 2), (6, 1)):
        pipe = tiny_pipeline(tmp_path, tiny_unet(time_cond_proj_dim=told))
        seen: list[int] = []
        pipe.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        settings = replace(SETTINGS, steps=1, pictures=0, batch_sizes=(3,))
        report = measure(pipe, pipe, plan_of(pipe.unet), settings)
        assert 3 * doubled in seen
        assert report.speed[0].what == f"UNet, 3 prompts ({3 * doubled} rows)"
        assert ("doubled by guidance" in report.table()) == (doubled == 2)
        assert conditions_of(pipe, settings, 3, torch.float32).rows == 3 * doubled


def test_json_is_valid_and_null_where_a_figure_is_infinite(same: Report) -> None:
    data = json.loads(json.dumps(same.to_json(), allow_nan=False))
    assert data["fidelity"]["psnr_db"] == {"typical": None, "p90": None, "worst": None}
    assert data["fidelity"]["drift"] == {"typical": 0, "p90": 0, "worst": 0}
    assert data["settings"]["prompts"] == list(PROMPTS)


def test_drift_grows_with_the_change(dense: StableDiffusionPipeline) -> None:
    found = [fidelity.compare(dense, perturbed(dense, amount), SETTINGS)[0] for amount in (0.003, 0.03, 0.3)]
    for of in (lambda f: quantile(f.drift, 0.5), lambda f: quantile(f.noise[0], 0.9), lambda f: -f.psnr(0.5)):
        small, medium, large = map(of, found)
        assert small < medium < large
    assert 0 < quantile(found[0].drift, 1) < 1


def test_the_batch_changes_nothing(dense: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slim = perturbed(dense, 0.1)
    together, _ = fidelity.compare(dense, slim, SETTINGS)
    monkeypatch.setattr(fidelity, "LARGEST_BATCH", 2)
    apart, _ = fidelity.compare(dense, slim, SETTINGS)
    assert apart.drift == pytest.approx(together.drift, rel=1e-3)
    assert apart.timesteps == together.timesteps
    for a, b in zip(apart.noise, together.noise, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_noise_error_is_that_of_the_guided_prediction(dense: StableDiffusionPipeline) -> None:
    """A slim model that is off by a constant factor in both halves is off by that factor after guidance."""
    doubled = copy.deepcopy(dense.unet)
    doubled.conv_out.weight.data *= 1.5
    doubled.conv_out.bias.data *= 1.5
    found, _ = fidelity.compare(dense, with_unet(dense, doubled), SETTINGS)
    assert found.noise[0] == pytest.approx([0.25] * 5, rel=1e-4)


def test_guidance_amplifies_an_error_in_one_half_only() -> None:
    prediction = torch.tensor([1.0, 2.0, 5.0, 7.0]).view(4, 1, 1, 1)
    assert fidelity.guided(prediction, 2, 4.0).flatten().tolist() == [1 + 4 * 4, 2 + 4 * 5]
    assert fidelity.guided(prediction, 4, 1.0).flatten().tolist() == [1, 2, 5, 7]


def test_comparing_leaves_no_hook_even_after_an_error(dense: StableDiffusionPipeline) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fidelity.compared(dense.unet, fails, 1, 4.0, []):  # type: ignore[arg-type]
        dense.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 8, 12))
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in dense.unet.modules()]
    assert not any(hooks)


def test_a_cut_model_is_measured(cut: Report) -> None:
    size = cut.size
    assert size.parameters[1] < size.parameters[0] and size.macs[1].total < size.macs[0].total
    assert size.macs[1].core < size.macs[0].core and size.weights[1] == 4 * size.parameters[1]
    assert size.ideal_speedup == size.macs[0].total / size.macs[1].total > 1
    assert size.memory is not None and size.memory[1] < size.memory[0]
    assert [t.what for t in cut.speed] == ["UNet, 1 prompt (2 rows)", "UNet, 2 prompts (4 rows)", "1 picture, 3 steps"]
    assert quantile(cut.fidelity.drift, 0.5) > 0.01
    json.dumps(cut.to_json(), allow_nan=False)


def test_no_speed_up_without_its_drift(cut: Report) -> None:
    drift = f"{quantile(cut.fidelity.drift, 0.5):.0%}"
    lines = cut.table().splitlines()
    for timed in cut.speed:
        mine = [line for line in lines if f"{timed.speedup.median:.2f}x (" in line]
        assert mine and all(drift in line for line in mine)
    assert "drift by" in lines[0]
    data = cut.to_json()
    assert list(data)[:3] == ["format", "headline", "picture"]
    for row in (data["picture"], *data["speed"]):
        assert row["drift"]["typical"] == pytest.approx(quantile(cut.fidelity.drift, 0.5))
        assert row["ideal_speedup"] == cut.size.ideal_speedup


def test_pictures_are_the_worst_first_then_the_typical(cut: Report) -> None:
    drift = sorted(cut.fidelity.drift, reverse=True)
    assert [p.label for p in cut.pictures] == ["worst", "2nd worst", "typical", "typical"]
    assert [p.drift for p in cut.pictures[:2]] == drift[:2]
    assert drift[2] in [p.drift for p in cut.pictures[2:]]
    for picture in cut.pictures:
        i = picture.seed - SETTINGS.seed
        assert (picture.prompt, picture.negative) == (SETTINGS.prompts[i], SETTINGS.negatives[i])
        assert picture.dense.shape == (16, 16, 3) and picture.dense.dtype == np.uint8


def test_picking_never_shows_one_twice_and_copes_with_few() -> None:
    for prompts in range(1, 7):
        for count in range(9):
            chosen = [i for i, _ in fidelity.pick([0.1 * i for i in range(prompts)], count)]
            assert len(set(chosen)) == len(chosen) == min(prompts, count)
    assert [i for i, _ in fidelity.pick([5, 1, 2, 3, 4, 9, 0], 2)] == [5, 3]


def test_a_broken_model_is_infinitely_wrong(dense: StableDiffusionPipeline) -> None:
    broken = copy.deepcopy(dense.unet)
    broken.conv_out.bias.data[0] = torch.nan
    report = measure(dense, with_unet(dense, broken), plan_of(dense.unet), replace(SETTINGS, repeats=1), sizes=(1, 1))
    assert all(math.isinf(drift) for drift in report.fidelity.drift)
    assert "not finite" in report.table()
    json.dumps(report.to_json(), allow_nan=False)


def test_ssim_and_psnr_of_flat_pictures_by_hand() -> None:
    a, b = (np.full((16, 16, 3), value, np.uint8) for value in (100, 110))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    assert fidelity.structural_similarity(a, b) == pytest.approx(expected, rel=1e-9)
    assert fidelity.mean_squared_error(a, b) == 100
    assert fidelity.psnr_of(100.0) == pytest.approx(28.1308, abs=1e-4)
    assert fidelity.structural_similarity(a, a) == pytest.approx(1)


def test_ssim_by_its_definition() -> None:
    """At one pixel of random pictures, against sums over the 11 x 11 window written out."""
    a, b = np.random.default_rng(0).integers(0, 256, (2, 11, 11, 1)).astype(np.uint8)
    one = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(one, one) / one.sum() ** 2
    x, y = a[..., 0].astype(float), b[..., 0].astype(float)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, cov = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, (window * x * y).sum() - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert fidelity.structural_similarity(a, b) == pytest.approx(expected, rel=1e-6)


def test_decoding_is_the_pipelines_own(dense: StableDiffusionPipeline) -> None:
    from slimdiff.pipeline import encode, sample

    conditioning = encode(dense, PROMPTS[:2], ["", ""])
    options = {"steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    latents = sample(dense, conditioning, [1, 2], **options)
    expected = sample(dense, conditioning, [1, 2], output="np", **options)
    assert np.abs(fidelity.decode(dense, latents) - 255 * expected).max() < 0.51


def test_attributes_are_scored_where_every_prompt_is_a_caption() -> None:
    import random

    pictures = [scenes.draw(scenes.parse(c), random.Random(0)) for c in CAPTIONS]  # type: ignore[arg-type]
    blank = [np.full_like(p, 246) for p in pictures]
    dense, slim = fidelity._attributes((pictures, blank), CAPTIONS) or ({}, {})
    assert dense["mean"] > 0.95 > 0.5 > slim["mean"]
    assert fidelity._attributes((pictures, blank), [*CAPTIONS[:-1], "a dog"]) is None


def test_pairs_are_timed_in_turns() -> None:
    order: list[str] = []
    paired = timing.paired(
        "x", lambda: order.append("dense"), lambda: order.append("slim"), pairs=3, device=torch.device("cpu")
    )
    warm, timed = order[: 2 * timing.WARM_UP], order[2 * timing.WARM_UP :: paired.calls]
    assert warm == ["dense"] * timing.WARM_UP + ["slim"] * timing.WARM_UP
    assert timed == ["dense", "slim", "slim", "dense", "dense", "slim"]
    assert order.count("dense") == order.count("slim") == timing.WARM_UP + 3 * paired.calls


def test_speed_up_is_taken_within_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down tenfold half-way through does not change the ratio."""
    times = iter([2.0] * 6 + [2, 1, 1, 2, 20, 10, 10, 20])
    monkeypatch.setattr(timing, "_time", lambda call, calls, device: next(times))
    found = timing.paired("x", lambda: None, lambda: None, pairs=4, device=torch.device("cpu"))
    assert (found.speedup.q1, found.speedup.median, found.speedup.q3) == (2, 2, 2)
    assert found.is_clear


def test_peak_memory_of_known_tensors() -> None:
    def call() -> None:
        a = torch.ones(1000)
        b = a + 1  # two alive
        del a
        c = b * 2  # two again
        c.add_(1)
        c.view(10, 100)

    assert timing.peak_growth(call, torch.device("cpu")) == 8000


def test_models_that_cannot_be_compared_are_refused(dense: StableDiffusionPipeline) -> None:
    other = with_unet(dense, copy.deepcopy(dense.unet).half())
    with pytest.raises(SlimdiffError, match="differ in precision"):
        measure(dense, other, plan_of(dense.unet), SETTINGS, sizes=(1, 1))
    other = with_unet(dense, dense.unet)
    other.scheduler = DDIMScheduler.from_config(dense.scheduler.config, beta_end=0.02)
    with pytest.raises(SlimdiffError, match="differ in scheduler"):
        measure(dense, other, plan_of(dense.unet), SETTINGS, sizes=(1, 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": ()},
        {"negatives": ("",)},
        {"steps": 0},
        {"repeats": 0},
        {"batch_sizes": ()},
        {"pictures": -1},
        {"height": 50},
    ],
)
def test_settings_that_make_no_benchmark_are_refused(wrong: dict) -> None:
    with pytest.raises(SlimdiffError):
        replace(SETTINGS, **wrong)
