"""The same on a GPU as on the CPU: precisions, memory formats, compilation, attention kernels, the whole chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

import slimdiff.checkpoint
from slimdiff.calibrate import collect
from slimdiff.capture import captured
from slimdiff.compress import cut
from slimdiff.gram import Gram
from slimdiff.groups import find_groups
from slimdiff.linalg import RIDGE
from slimdiff.options import Options
from slimdiff.recipe import Recipe
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.source import Source
from slimdiff.statistics import StatisticsFile

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SOURCE = Source("tiny", "tiny", None)
RECIPE = Recipe("sd1", ("a red cat", "two dogs", "sky"), ("", "blurry", ""), 3, 4.0, 16, 16, seed=5, resnets=True)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
RANKS = {
    "tied": {f"{BLOCK}.attn1.qk": 4, f"{BLOCK}.attn1.vo": 4, f"{BLOCK}.ff.ffn": 24},
    "untied": {f"{BLOCK}.attn1.qk": 3, f"{BLOCK}.attn2.vo": 5, f"{BLOCK}.ff.ffn": 24},
    "resnet": {"down_blocks.0.resnets.0.resnet": 2, f"{BLOCK}.attn2.qk": 4, f"{BLOCK}.attn2.vo": 4},
}
SMALL = {
    "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip


def slim_unet(ranks: str) -> SlimUNet2DConditionModel:
    torch.manual_seed(0)
    unet = SlimUNet2DConditionModel.from_config(tiny_unet(**SMALL).config, slim_ranks=RANKS[ranks])
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def run(unet: torch.nn.Module, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 12, generator=generator)
    return unet(sample.to(device, dtype), torch.tensor(7), text.to(device, dtype)).sample.float().cpu()


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_memory_formats(device, ranks, dtype, tolerance, memory):
    unet = slim_unet(ranks)
    wanted = run(unet, "cpu")
    assert far(run(unet.to(device, dtype, memory_format=memory), device, dtype), wanted) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "repeated blocks"])
def test_compiled(device, ranks, whole):
    torch._dynamo.reset()
    unet = slim_unet(ranks)
    wanted = run(unet, "cpu")
    unet.to(device)
    backend = {"backend": "inductor" if device == "cuda" else "aot_eager", "fullgraph": True}
    compiled = torch.compile(unet, **backend) if whole else unet
    if not whole:
        unet.compile_repeated_blocks(**backend)
    for _ in range(2):
        assert far(run(compiled, device), wanted) < 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("ranks", RANKS)
def test_cuda_graphs(ranks):
    torch._dynamo.reset()
    unet = slim_unet(ranks)
    wanted = run(unet, "cpu")
    compiled = torch.compile(unet.to("cuda"), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        assert far(run(compiled, "cuda"), wanted) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kernels", [[SDPBackend.MATH], [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]])
def test_attention_kernels(device, ranks, kernels):
    unet = slim_unet(ranks)
    wanted = run(unet, "cpu")
    with sdpa_kernel(kernels):
        assert far(run(unet.to(device, torch.float16), device, torch.float16), wanted) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_calibrate_compress_write_and_load(device, tmp_path: Path):
    """In float32 on both, so that nothing but rounding tells them apart."""
    plans, sums = [], []
    for where in ("cpu", device):
        pipe = tiny_pipeline(tmp_path / "tokenizer").to(where)
        file = collect(pipe, SOURCE, RECIPE, tmp_path / f"{len(plans)}.safetensors").path
        statistics = StatisticsFile(file)
        slim, plan = cut(pipe, statistics, Options(0.3, kinds=("qk", "vo", "ffn", "resnet"), influence="local"))
        assert slim.device.type == where
        folder = tmp_path / f"slim-{len(plans)}"
        slimdiff.checkpoint.write(folder, slim, pipe, plan.to_json(), None)
        loaded = slimdiff.checkpoint.load(folder).to(where)
        assert far(run(loaded.unet, where), run(slim, where)) < 1e-6
        plans.append(replace(plan, provenance={}))
        sums.append(
            {key: statistics.moments(key).covariance for key in statistics.metadata["tokens"] if ":p" not in key}
        )
    for key, covariance in sums[0].items():
        scale = covariance.diagonal(dim1=-2, dim2=-1).mean()
        assert (sums[1][key] - covariance).abs().max() < 1e-3 * scale, key
    assert plans[0].achieved == pytest.approx(plans[1].achieved, abs=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_tokens_give_the_moments_of_float64_below_the_ridge(device):
    tokens = (torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)) * 30 + 200).half()
    gram = Gram(256, device=device)
    for part in tokens.split(1024):
        gram.add(part.to(device))
    wanted = torch.cov(tokens.double().mT, correction=0)
    error = gram.moments().covariance[0].cpu() - wanted
    assert error.diagonal().abs().max() < 1e-3 * wanted.diagonal().mean()
    assert error.norm() / wanted.norm() < 3e-4 if device == "cuda" else error.norm() / wanted.norm() < RIDGE


@pytest.mark.cuda
def test_capture_never_makes_the_host_wait():
    """A layer that waited for the GPU would stall it: 48 times a step in Stable Diffusion 1.5."""
    unet = tiny_unet().to("cuda", torch.float16)
    groups = [*find_groups(unet), *find_groups(unet, kinds=("resnet",))]
    grams: dict[str, object] = {}
    half = {"device": "cuda", "dtype": torch.float16}
    arguments = {
        "sample": torch.randn(2, 4, 8, 8, **half), "encoder_hidden_states": torch.randn(2, 8, 12, **half),
        "timestep": torch.tensor(7, device="cuda"),
    }  # fmt: skip
    with torch.no_grad(), captured(unet, groups, grams):
        unet(**arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            unet(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
