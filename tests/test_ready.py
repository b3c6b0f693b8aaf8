"""Pipelines in states in which people have them, and which no figure may be taken from: refused, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import slimdiff
from slimdiff import ready
from slimdiff.errors import ModelError


@pytest.fixture
def pipe(tmp_path: Path) -> DiffusionPipeline:
    return tiny_pipeline(tmp_path / "tokenizer")


def wrap(pipe: DiffusionPipeline) -> None:
    pipe.unet = torch.compile(pipe.unet)


def unwrap(pipe: DiffusionPipeline) -> None:
    pipe.unet = pipe.unet._orig_mod


def adapt(*targets: str) -> Callable[[DiffusionPipeline], None]:
    return lambda pipe: pipe.unet.add_adapter(LoraConfig(r=2, target_modules=list(targets)))


def adapt_text(pipe: DiffusionPipeline) -> None:
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def unload(pipe: DiffusionPipeline) -> None:
    pipe.unload_lora_weights()


def unhook(pipe: DiffusionPipeline) -> None:
    pipe.remove_all_hooks()


STATES = {
    "torch.compile": (wrap, "_orig_mod", unwrap),
    "LoRA of attention": (adapt("to_q"), r"to_q\).*unload_lora_weights", unload),
    "LoRA of feed-forwards": (adapt("ff.net.0.proj"), "adapter loaded", unload),
    "LoRA of the text": (adapt_text, "text_encoder has an adapter", unload),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "remove_all_hooks", unhook),
    "sequential offload": (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "is offloaded", unhook),
    "group offload": (
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), "group_offloading", None
    ),
    "float8": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "layerwise_casting", None
    ),
    "int8": (lambda pipe: quantize_(pipe.unet, Int8WeightOnlyConfig()), "quantised.*float16", None),
    "meta": (lambda pipe: pipe.unet.to("meta"), "only their shapes", None),
}  # fmt: skip
"""What is done to a pipeline, what the error says, and what undoes it."""


@pytest.mark.parametrize("state", STATES)
def test_states_are_refused_until_they_are_undone(pipe, state, tmp_path):
    enter, text, leave = STATES[state]
    ready.check(pipe)
    enter(pipe)
    with pytest.raises(ModelError, match=text):
        slimdiff.calibrate(pipe, ["cat"], tmp_path / "s")
    with pytest.raises(ModelError, match=text):
        slimdiff.compress(pipe, tmp_path / "s")
    for pair in ((pipe, tiny_pipeline(tmp_path / "tokenizer")), (tiny_pipeline(tmp_path / "tokenizer"), pipe)):
        with pytest.raises(ModelError, match=text):
            slimdiff.bench(*pair)
    if leave:
        leave(pipe)
        ready.check(pipe)
