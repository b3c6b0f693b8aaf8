"""Calibration: its sums do not depend on how the work was cut up, and nothing is lost on Ctrl-C."""

from __future__ import annotations

import importlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from torch.utils.hooks import RemovableHandle

from slimdiff.batches import fitting_batch_size
from slimdiff.calibrate import Interrupted, collect
from slimdiff.capture import footprint
from slimdiff.errors import OutputError, SlimdiffError, StatisticsError
from slimdiff.groups import find_groups
from slimdiff.recipe import Recipe
from slimdiff.source import Source
from slimdiff.statistics import Statistics, StatisticsFile

WORDS = ("a red cat", "two dogs", "sky", "old map", "the sea at night")
RECIPE = Recipe("sd1", WORDS, ("", "blurry", "", "ugly", ""), 3, 4.0, 16, 16, seed=5)
SOURCE = Source("tiny", "tiny", None)
MODULE = importlib.import_module("slimdiff.calibrate")  # slimdiff.calibrate itself is the function


@pytest.fixture
def pipe(tmp_path: Path):
    return tiny_pipeline(tmp_path / "tokenizer")


def sums(path: Path) -> dict[str, torch.Tensor]:
    file = StatisticsFile(path)
    return {name: file.tensor(name) for name in file.metadata["checksums"]}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, one in a.items():
        scale = one.abs().max().clamp_min(1.0)  # sums of centred keys are zero but for rounding
        assert ((one - b[name]).abs().max() / scale) <= tolerance, name


def limited(pipe, rows: int) -> list[int]:
    """Memory for `rows` rows of a UNet call only; returns what will have been tried."""
    tried = []

    def hook(module, args, kwargs):
        tried.append(len(args[0]))
        if len(args[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    return tried


def test_a_batch_that_does_not_fit_is_made_smaller_before_anything_is_summed(pipe):
    tried = limited(pipe, 4)  # both halves of two prompts
    assert fitting_batch_size(pipe, find_groups(pipe.unet), RECIPE, 5) == 2
    assert tried == [10, 8, 6, 4]


def test_when_nothing_fits_what_the_sums_take_is_said(pipe):
    tried, groups = limited(pipe, 1), find_groups(pipe.unet)
    with pytest.raises(SlimdiffError, match=r"one prompt at 16x16 px .* sums, which take 0\.0 GB.*--dtype float16"):
        fitting_batch_size(pipe, groups, RECIPE, 2)
    assert tried == [4, 2]


def test_footprint_is_what_the_sums_take(pipe, tmp_path):
    """In float64, as an unfinished file holds them, each head's mean and ten energies included."""
    collect(pipe, SOURCE, replace(RECIPE, resnets=True), tmp_path / "s", batch_size=5)
    grams = StatisticsFile(tmp_path / "s").read().grams
    groups = find_groups(pipe.unet) + find_groups(pipe.unet, kinds=("resnet",))
    held = [tensor for gram in grams.values() for tensor in vars(gram).values() if isinstance(tensor, torch.Tensor)]
    assert footprint(pipe.unet, groups) == sum(8 * tensor.numel() for tensor in held)


def test_batch_size_changes_nothing_but_rounding(pipe, tmp_path):
    collect(pipe, SOURCE, RECIPE, tmp_path / "one", batch_size=1)
    collect(pipe, SOURCE, RECIPE, tmp_path / "all", batch_size=5)
    one, all_ = StatisticsFile(tmp_path / "one"), StatisticsFile(tmp_path / "all")
    assert one.metadata["tokens"] == all_.metadata["tokens"]
    keys = [name for name in sums(tmp_path / "one") if not name.startswith("states.")]
    assert_close(*({k: sums(tmp_path / n)[k] for k in keys} for n in ("one", "all")), tolerance=1e-4)


def test_all_timesteps_and_both_halves_of_guidance_are_counted(pipe, tmp_path):
    collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=2)
    tokens = StatisticsFile(tmp_path / "s").metadata["tokens"]
    first = find_groups(pipe.unet)[0]
    # 5 prompts x 2 halves x 3 steps x 64 positions of the first, 8 x 8, level
    assert tokens[f"{first.name}:q"] == 5 * 2 * 3 * 64


def test_other_seeds_and_prompts_give_other_sums(pipe, tmp_path):
    collect(pipe, SOURCE, RECIPE, tmp_path / "a", batch_size=5)
    collect(pipe, SOURCE, replace(RECIPE, seed=6), tmp_path / "b", batch_size=5)
    a, b = sums(tmp_path / "a"), sums(tmp_path / "b")
    assert any(not torch.allclose(a[k], b[k], rtol=1e-3) for k in a if k.endswith("products"))


def interrupt_after(pipe, calls: int, number: int = signal.SIGINT) -> RemovableHandle:
    """Send the process a real signal during the given UNet call."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), number)

    return pipe.unet.register_forward_hook(hook)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_ends_with_the_same_sums(pipe, tmp_path, number):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    collect(pipe, SOURCE, RECIPE, whole, batch_size=2)
    interrupt_after(pipe, 2, number)
    with pytest.raises(Interrupted, match=r"2 of 5 prompts"):
        collect(pipe, SOURCE, RECIPE, stopped, batch_size=2)
    assert not stopped.exists()
    result = collect(pipe, SOURCE, RECIPE, stopped, batch_size=2)
    assert result.resumed_at == 2
    assert_close(sums(whole), sums(stopped), tolerance=0.0)
    assert not stopped.with_name("stopped.partial").exists()


def test_saving_takes_a_twentieth_of_the_time_at_most(pipe, tmp_path, monkeypatch):
    """A prompt takes a minute here, and a save half of one."""
    now, saves = 0.0, []
    write = Statistics.write

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow(statistics, path):
        pass_time(30)
        saves.append(statistics.done)
        write(statistics, path)

    monkeypatch.setattr(MODULE, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Statistics, "write", slow)
    pipe.unet.register_forward_hook(lambda *_: pass_time(60))
    words = ("cat",) * 30
    collect(pipe, SOURCE, replace(RECIPE, prompts=words, negatives=words, steps=1), tmp_path / "s", batch_size=1)
    assert saves == [3, 14, 25, 30], "after more than two minutes, then after more than ten from save to save"


def test_the_batch_size_is_tried_before_saved_sums_take_memory(pipe, tmp_path, monkeypatch):
    interrupt_after(pipe, 2)
    with pytest.raises(Interrupted):
        collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=2)
    happened = []
    read = StatisticsFile.read
    monkeypatch.setattr(StatisticsFile, "read", lambda *args: happened.append("read") or read(*args))
    monkeypatch.setattr(MODULE, "automatic_batch_size", lambda *args: happened.append("tried") or 2)
    assert collect(pipe, SOURCE, RECIPE, tmp_path / "s").resumed_at == 2
    assert happened == ["tried", "read"]


def test_partial_of_another_job_is_not_resumed(pipe, tmp_path):
    interrupt_after(pipe, 1)
    with pytest.raises(Interrupted):
        collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=2)
    with pytest.raises(StatisticsError, match="another recipe"):
        collect(pipe, SOURCE, replace(RECIPE, seed=9), tmp_path / "s", batch_size=2)
    other = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(seed=3))
    with pytest.raises(StatisticsError, match="another model"):
        collect(other, SOURCE, RECIPE, tmp_path / "s", batch_size=2)
    assert collect(pipe, SOURCE, replace(RECIPE, seed=9), tmp_path / "s", batch_size=5, resume=False).prompts == 5


def test_finished_file_is_kept(pipe, tmp_path):
    collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=5)
    before = (tmp_path / "s").stat().st_mtime_ns
    assert collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=5).was_there
    with pytest.raises(OutputError, match="--force"):
        collect(pipe, SOURCE, replace(RECIPE, seed=9), tmp_path / "s", batch_size=5)
    assert (tmp_path / "s").stat().st_mtime_ns == before


def other_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def other_spacing(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")


def other_text(pipe):
    """As a merged LoRA does."""
    pipe.text_encoder.get_submodule(layers(pipe)[-1]).weight.data.mul_(1.01)


def layers(pipe) -> list[str]:
    return [path for path, layer in pipe.text_encoder.named_modules() if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_scheduler, r"another scheduler \(DDIMScheduler, not EulerDiscreteScheduler\)"),
        (other_spacing, r"another scheduler's timestep_spacing \(leading, not trailing\)"),
        (other_text, "other text encoders"),
    ],
)
def test_neither_finished_nor_partial_files_of_another_sampler_or_text_are_taken(pipe, tmp_path, change, text):
    job = replace(RECIPE, steps=1)
    collect(pipe, SOURCE, job, tmp_path / "done", batch_size=5)
    handle = interrupt_after(pipe, 1)
    with pytest.raises(Interrupted):
        collect(pipe, SOURCE, job, tmp_path / "part", batch_size=2)
    handle.remove()
    change(pipe)
    with pytest.raises(OutputError, match=f"another calibration, of {text}"):
        collect(pipe, SOURCE, job, tmp_path / "done", batch_size=5)
    with pytest.raises(StatisticsError, match=f"unfinished calibration of {text}"):
        collect(pipe, SOURCE, job, tmp_path / "part", batch_size=2)
    collect(pipe, SOURCE, job, tmp_path / "part", batch_size=5, resume=False)
    assert collect(pipe, SOURCE, job, tmp_path / "part", batch_size=5).was_there


def test_a_scheduler_of_the_recipe_is_the_same_whatever_the_pipelines_own_is(pipe, tmp_path):
    job = replace(RECIPE, steps=1, scheduler="euler")
    collect(pipe, SOURCE, job, tmp_path / "s", batch_size=5)
    other = tiny_pipeline(tmp_path / "tokenizer")
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config, skip_prk_steps=True)
    assert collect(other, SOURCE, job, tmp_path / "s").was_there


def test_not_finite_activations_are_refused_and_leave_no_file(pipe, tmp_path):
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    with pytest.raises(StatisticsError, match="NaN"):
        collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=5)
    assert not (tmp_path / "s").exists()


class PastHooks:
    """An attention processor that reads the weight of the queries instead of calling their layer."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = torch.nn.functional.linear(hidden_states, attn.to_q.weight)
        q, k, v = (attn.head_to_batch_dim(x) for x in (q, attn.to_k(text), attn.to_v(text)))
        return attn.to_out[0](attn.batch_to_head_dim(attn.get_attention_scores(q, k) @ v))


def test_a_layer_that_is_never_seen_is_an_error_after_the_first_batch(pipe, tmp_path):
    path = find_groups(pipe.unet)[0].module
    pipe.unet.get_submodule(path).set_processor(PastHooks())
    with pytest.raises(StatisticsError, match=rf"nothing was seen of {path}.qk:q.*set_default_attn_processor"):
        collect(pipe, SOURCE, RECIPE, tmp_path / "s", batch_size=1)
    assert not [*tmp_path.glob("s*")]
