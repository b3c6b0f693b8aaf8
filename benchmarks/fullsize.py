"""The whole chain at the true shapes of a published model, with seeded random weights: wall time and peak memory.

    python benchmarks/fullsize.py --family sd15                        # calibrate 2 prompts x 3 steps, compress, reload
    python benchmarks/fullsize.py --family sdxl --synthetic --stages statistics compress

Sizes, memory, time and speed do not depend on what the weights are; quality does, and is not looked at here. Each stage
is a process of its own, and its memory is the most that process had resident. `--synthetic` makes the statistics up,
because calibrating SDXL on a CPU takes hours. Compression goes by local errors and refits nothing: solves, allocation,
surgery and writing. What probing and refitting add is UNet forward passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from architectures import build as build_unet
from architectures import randomised
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import slimdiff
from slimdiff import checkpoint, pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import make_plan
from slimdiff.gram import Gram
from slimdiff.groups import find_groups, probes
from slimdiff.options import Options
from slimdiff.source import DEMO, Source
from slimdiff.statistics import Statistics, StatisticsFile
from slimdiff.surgery import build

STAGES = ("model", "statistics", "compress", "reload")
FAMILIES = ("sd15", "sd21", "sdxl")
TEXT: dict[int, dict[str, Any]] = {
    768: {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "projection_dim": 768},
    1024: {"num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096, "projection_dim": 512},
    1280: {"num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120, "projection_dim": 1280},
}  # fmt: skip
"""Published CLIP text encoders by hidden size."""


def text_encoder(size: int, tokenizer: CLIPTokenizer, kind: type = CLIPTextModel) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=size, vocab_size=49408, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **TEXT[size],
    )  # fmt: skip
    with torch.device("meta"):
        encoder = kind(config)
    return randomised(encoder)


def make_model(family: str) -> DiffusionPipeline:
    """A complete pipeline of the true sizes; its tokenizer is the miniature's, with room for 77 tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer", model_max_length=77)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        )  # fmt: skip
    schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    shared = {"unet": randomised(build_unet(family)), "vae": randomised(vae), "tokenizer": tokenizer}
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **shared, tokenizer_2=tokenizer, text_encoder=text_encoder(768, tokenizer),
            text_encoder_2=text_encoder(1280, tokenizer, CLIPTextModelWithProjection),
            scheduler=EulerDiscreteScheduler(**schedule),
        )  # fmt: skip
    return StableDiffusionPipeline(
        **shared, text_encoder=text_encoder(768 if family == "sd15" else 1024, tokenizer),
        scheduler=DDIMScheduler(
            **schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            prediction_type="v_prediction" if family == "sd21" else "epsilon",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class Chain:
    """The stages, each of which finds what the one before it left in the folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, out = args, args.output / args.family
        self.folder, self.statistics_path, self.slim = out / "model", out / "statistics.safetensors", out / "slim"

    def source(self) -> Source:
        return source.find(str(self.folder))

    def model(self) -> dict[str, Any]:
        shutil.rmtree(self.folder, ignore_errors=True)
        pipe = make_model(self.args.family)
        pipe.save_pretrained(self.folder)
        return {"unet_params": sum(p.numel() for p in pipe.unet.parameters())}

    def statistics(self) -> dict[str, Any]:
        args, dense = self.args, self.source()
        pipe = pipeline.load(dense, getattr(torch, args.dtype)).to(args.device)
        job = recipe.family_recipe(
            pipeline.family(pipe, dense), pipeline.native_size(pipe), num_prompts=args.prompts, steps=args.steps
        )
        if args.synthetic:
            made = Statistics(dense.reference, {}, pipeline.fingerprint(pipe.unet), job, done=len(job.prompts))
            generator = torch.Generator().manual_seed(0)
            for group in find_groups(pipe.unet):
                for probe in probes(pipe.unet, group):
                    made.grams[probe.key] = Gram(probe.width, probe.heads)
                    tokens = torch.randn(1024, probe.heads * probe.width, generator=generator)
                    made.grams[probe.key].add(tokens + tokens.roll(1, -1))  # neighbours are alike
            made.write(self.statistics_path)
        else:
            collect(pipe, dense, job, self.statistics_path, batch_size=args.batch_size, force=True)
        rows = 0 if args.synthetic else 2 * len(job.prompts) * job.steps
        return {"unet_rows": rows, "statistics_bytes": self.statistics_path.stat().st_size}

    def compress(self) -> dict[str, Any]:
        args, dense = self.args, self.source()
        pipe = pipeline.load(dense, getattr(torch, args.dtype)).to(args.device)
        times = [time.perf_counter()]
        options = Options(args.budget, influence="local")
        plan, solutions = make_plan(pipe, StatisticsFile(self.statistics_path), options)
        times.append(time.perf_counter())
        slim = build(pipe.unet, plan.ranks(), solutions, maps=options.lora_maps)
        times.append(time.perf_counter())
        shutil.rmtree(self.slim, ignore_errors=True)
        checkpoint.write(self.slim, slim.half(), pipe, plan.to_json(), dense.folder)
        times.append(time.perf_counter())
        parts = dict(zip(("plan", "surgery", "write"), (b - a for a, b in pairwise(times)), strict=True))
        return {"achieved": plan.achieved, "seconds_of": parts, "slim_bytes": checkpoint.size_in_bytes(self.slim)}

    @torch.no_grad()
    def reload(self) -> dict[str, Any]:
        dtype = getattr(torch, self.args.dtype)
        pipe = slimdiff.load(self.slim, torch_dtype=dtype).to(self.args.device)
        pipe.set_progress_bar_config(disable=True)
        started = time.perf_counter()
        latents = pipe("a red circle", num_inference_steps=1, output_type="latent").images
        if not torch.isfinite(latents).all():
            raise SystemExit("The slim UNet's prediction is not finite.")
        return {"step_seconds": time.perf_counter() - started}

    def run(self, stage: str) -> None:
        """Print one stage's figures as JSON."""
        started = time.perf_counter()
        found = getattr(self, stage)()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures = {"stage": stage, "seconds": time.perf_counter() - started, "peak_gib": peak, **found}
        if self.args.device != "cpu":
            figures["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/fullsize"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="prompts at once while calibrating")
    parser.add_argument("--budget", type=float, default=0.35)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--synthetic", action="store_true", help="make the statistics up instead of calibrating")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # what a process of its own is to do
    args = parser.parse_args()
    if args.stage:
        Chain(args).run(args.stage)
        return
    for stage in args.stages:
        done = subprocess.run([sys.executable, *sys.argv, "--stage", stage], stdout=subprocess.PIPE, text=True)
        print(f"{args.family} {done.stdout.strip()}", flush=True)
        if done.returncode:
            raise SystemExit(f"{stage} failed")


if __name__ == "__main__":
    main()
