"""How faithfully a LoRA of the dense miniature works on the slim one.

    slimdiff calibrate && python benchmarks/lora.py

Trains LoRAs on the dense miniature, a minute or two each: with one, a caption paints what an edited caption would (blue
things for red ones, a black ground for a white one). Then slim + LoRA against dense + LoRA, on captions that the edit
concerns and from the same noise, beside slim against dense without one, for several ranks of the maps. Figures are
relative squared errors of the final latents: median and ninth decile over the captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from slimdiff import outputs, pipeline, recipe, source
from slimdiff.compress import Options, make_plan
from slimdiff.measured import Settings
from slimdiff.refine import refit_output
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build

EDITS = ((" red ", " blue "), ("white background", "black background"))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
STEPS, BATCH, RANK, RATE = 150, 8, 8, 3e-3
CAPTIONS = 16


def train(pipe: DiffusionPipeline, file: StatisticsFile, edit: tuple[str, str]) -> dict[str, Tensor]:
    """A LoRA with which a caption predicts the noise that the edited caption does, on stored calibration states."""
    states, unet = file.states(), pipe.unet
    captions = [file.recipe.prompts[i] for i in states.prompts]
    plain, edited = (
        pipeline.encode(pipe, texts, [""] * len(texts))["prompt_embeds"]
        for texts in (captions, [caption.replace(*edit) for caption in captions])
    )
    tensors = states.tensors()
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), "trained")
    optimiser = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], RATE)
    for _ in range(STEPS):
        chosen = torch.randint(len(captions), (BATCH,))
        x, t = tensors["samples"][chosen].float(), tensors["timesteps"][chosen]
        with torch.no_grad():
            unet.disable_adapters()
            target = unet(x, t, edited[chosen]).sample
            unet.enable_adapters()
        loss = (unet(x, t, plain[chosen]).sample - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    lora = {f"unet.{name}": x.detach() for name, x in get_peft_model_state_dict(unet, adapter_name="trained").items()}
    unet.delete_adapters("trained")
    return lora


def paint(pipe: DiffusionPipeline, settings: Settings, lora: dict[str, Tensor] | None = None) -> Tensor:
    """Final latents of all captions."""
    if lora:
        pipe.load_lora_weights(lora)
    latents = pipeline.paint(pipe, settings, range(len(settings.prompts)))
    if lora:
        pipe.unload_lora_weights()
    return latents


def error(found: Tensor, wanted: Tensor) -> str:
    each = (found - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1)
    return f"{each.median():.2%}, {each.quantile(0.9):.2%}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statistics", nargs="?", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.6])
    parser.add_argument("--maps", type=int, nargs="+", default=[1, 16, 512])
    chosen = parser.parse_args(arguments)
    file = StatisticsFile(chosen.statistics or outputs.newest_statistics())
    job, pipe = file.recipe, pipeline.load(source.find(file.model))
    pipeline.use_scheduler(pipe, job.scheduler)
    dense = pipe.unet.requires_grad_(False)
    cases = []
    for edit in EDITS:
        texts = tuple(text for text in recipe.bench_prompts("demo") if edit[0] in text)[:CAPTIONS]
        settings = Settings(
            prompts=texts, negatives=("",) * len(texts), seed=10_000, steps=job.steps,
            guidance_scale=job.guidance_scale, height=job.height, width=job.width, batch_sizes=(1,), repeats=3,
        )  # fmt: skip
        lora = train(pipe, file, edit)
        alone, wanted = paint(pipe, settings), paint(pipe, settings, lora)
        print(f"'{edit[0].strip()}' to '{edit[1].strip()}': the LoRA moves dense by {error(wanted, alone)}", flush=True)
        cases.append((edit, settings, lora, alone, wanted))
    for budget in chosen.budgets:
        plan, solutions = make_plan(pipe, file, Options(budget=budget))
        for maps in chosen.maps:
            slim = build(dense, plan.ranks(), solutions, maps)
            refit_output(dense, slim, file.states(), job.guidance_scale)
            size = sum(x.numel() for x in slim.buffers()) / sum(x.numel() for x in slim.parameters())
            pipe.unet = slim
            for edit, settings, lora, alone, wanted in cases:
                without, with_lora = error(paint(pipe, settings), alone), error(paint(pipe, settings, lora), wanted)
                print(
                    f"budget {budget:g}, maps of rank {maps} ({size:.1%}), '{edit[0].strip()}': without {without}; "
                    f"with {with_lora}",
                    flush=True,
                )
            pipe.unet = dense


if __name__ == "__main__":
    main()
