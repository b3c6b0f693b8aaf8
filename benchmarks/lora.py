"""How faithfully a LoRA of the dense miniature works on the slim one.

    slimdiff calibrate && python benchmarks/lora.py

Trains LoRAs on the dense miniature for a few minutes: each makes a caption paint what another caption would (red things
blue, a white ground black). Then dense + LoRA against slim + LoRA on the same prompts and noise, beside dense against
slim without one, for several ranks of the maps in the slim checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from slimdiff import outputs, pipeline, recipe, source
from slimdiff.compress import Options, make_plan
from slimdiff.measured import Settings
from slimdiff.refine import refit_output
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build

EDITS = {"red to blue": (" red ", " blue "), "white to black": ("white background", "black background")}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {"attention": ATTENTION, "attention and feed-forward": [*ATTENTION, "net.0.proj", "net.2"]}
STEPS, BATCH, RANK, RATE = 150, 8, 8, 3e-3


def train(pipe: DiffusionPipeline, file: StatisticsFile, edit: tuple[str, str], targets: list[str]) -> dict:
    """A LoRA with which a caption gives the noise prediction of the edited caption, on stored calibration states."""
    states, job, unet = file.states(), file.recipe, pipe.unet
    wanted = [job.prompts[i].replace(*edit) for i in sorted(set(states.prompts))]
    plain = pipeline.encode(pipe, [job.prompts[i] for i in sorted(set(states.prompts))], [""] * len(wanted))
    edited = pipeline.encode(pipe, wanted, [""] * len(wanted))
    order = {prompt: row for row, prompt in enumerate(sorted(set(states.prompts)))}
    rows = torch.tensor([order[prompt] for prompt in states.prompts])
    samples, timesteps = states.tensors()["samples"].float(), states.tensors()["timesteps"]
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), "trained")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, weight_decay=0)
    for _ in range(STEPS):
        chosen = torch.randint(len(samples), (BATCH,))
        x, t, row = samples[chosen], timesteps[chosen], rows[chosen]
        with torch.no_grad():
            unet.disable_adapters()
            target = unet(x, t, edited["prompt_embeds"][row]).sample
            unet.enable_adapters()
        loss = (unet(x, t, plain["prompt_embeds"][row]).sample - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    lora = {f"unet.{name}": x.detach() for name, x in get_peft_model_state_dict(unet, adapter_name="trained").items()}
    unet.delete_adapters("trained")
    unet.requires_grad_(False)
    return lora


def paint(pipe: DiffusionPipeline, settings: Settings, lora: dict | None = None) -> torch.Tensor:
    if lora:
        pipe.load_lora_weights(lora)
    latents = torch.cat([
        pipeline.paint(pipe, settings, range(i, i + 16)) for i in range(0, len(settings.prompts), 16)
    ])  # fmt: skip
    if lora:
        pipe.unload_lora_weights()
    return latents


def error(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Relative squared error of the final latents: median and ninth decile over prompts."""
    each = (found - expected).square().flatten(1).sum(1) / expected.square().flatten(1).sum(1)
    return f"{each.median():.2e} {each.quantile(0.9):.2e}"


def kept_only(unet: SlimUNet2DConditionModel) -> None:
    for name, buffer in unet.named_buffers():
        if name.endswith("slim_left"):
            buffer.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statistics", nargs="?", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.6])
    parser.add_argument("--maps", type=int, nargs="+", default=[1, 8, 16, 32, 512])
    arguments = parser.parse_args()
    file = StatisticsFile(arguments.statistics or outputs.newest_statistics())
    pipe = pipeline.load(source.find(file.model))
    job = file.recipe
    pipeline.use_scheduler(pipe, job.scheduler)
    dense = pipe.unet
    texts = tuple(text for text in recipe.bench_prompts("demo") if " red " in text and "white" in text)
    texts += tuple(text for text in recipe.bench_prompts("demo") if text not in texts)
    texts = texts[:32]
    settings = Settings(
        prompts=texts, negatives=("",) * len(texts), seed=10_000, steps=job.steps, guidance_scale=job.guidance_scale,
        height=job.height, width=job.width, batch_sizes=(1,), repeats=3,
    )  # fmt: skip
    loras = {
        f"{edit}, {where}": train(pipe, file, EDITS[edit], targets)
        for edit in EDITS for where, targets in TARGETS.items()
    }  # fmt: skip
    plain = paint(pipe, settings)
    wanted = {name: paint(pipe, settings, lora) for name, lora in loras.items()}
    for name, latents in wanted.items():
        print(f"{name}: the LoRA moves the dense pictures by {error(latents, plain)}")
    for budget in arguments.budgets:
        plan, solutions = make_plan(pipe, file, Options(budget=budget))
        for maps in [0, *arguments.maps]:
            slim = build(dense, plan.ranks(), solutions, maps or 1)
            refit_output(dense, slim, file.states(), job.guidance_scale)
            if not maps:
                kept_only(slim)
            pipe.unet = slim
            size = sum(b.numel() for b in slim.buffers()) / sum(p.numel() for p in slim.parameters())
            print(
                f"budget {budget:g}, maps {maps} ({size:.1%} of the parameters): alone {error(paint(pipe, settings), plain)}"
            )
            for name, lora in loras.items():
                print(f"    {name}: {error(paint(pipe, settings, lora), wanted[name])}")
            pipe.unet = dense


if __name__ == "__main__":
    main()
