"""What cutting ResNet blocks too gives: the same share of the UNet's MACs removed with and without the `resnet` group.

Calibrates the miniature with few prompts, removes each share in both ways, and compares final latents, on captions that
neither training nor calibration saw, and time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yardstick

from slimdiff import pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut
from slimdiff.demo import scenes
from slimdiff.errors import BudgetError
from slimdiff.groups import KINDS, find_groups
from slimdiff.macs import count, token_counts
from slimdiff.statistics import StatisticsFile
from slimdiff.timing import paired
from slimdiff.widths import denominator

ROWS = 8
"""Rows of a timed UNet call: four prompts with guidance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/resnets"))
    parser.add_argument("--prompts", type=int, default=64, help="of calibration")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.15, 0.2], help="of the UNet's MACs")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    dense = source.find(None)
    pipe = pipeline.load(dense)
    job = recipe.family_recipe("demo", pipeline.native_size(pipe), num_prompts=args.prompts, resnets=True)
    path = args.output / f"statistics-{args.prompts}.safetensors"
    collect(pipe, dense, job, path)
    file, tokens = StatisticsFile(path), pipe.tokenizer.model_max_length
    size = (pipe.unet.config.sample_size,) * 2
    whole, pixels = count(pipe.unet, size, tokens).total, token_counts(pipe.unet, size, tokens)
    ruler = yardstick.Yardstick(pipe, scenes.captions(args.captions, seed=900, held_out=True), args.steps)
    inputs = torch.randn(ROWS, 4, *size), 500, torch.randn(ROWS, tokens, pipe.unet.config.cross_attention_dim)
    head = ("UNet MACs removed", "groups", "parameters", "median / 90th percentile / worst", "predicted", "speed-up")
    print(yardstick.table(head, []))
    for share in args.shares:
        for kinds in (KINDS, (*KINDS, "resnet")):
            held = denominator(0, find_groups(pipe.unet, pixels, kinds), "macs")
            try:
                slim, plan = cut(pipe, file, Options(share * whole / held, of="macs", kinds=kinds))
            except BudgetError as error:
                print(f"| {share:.0%} | {','.join(kinds)} | {error} | | | |", flush=True)
                continue
            found = ruler.measure(slim)
            with torch.no_grad():
                calls = [lambda unet=unet: unet(*inputs) for unet in (pipe.unet, slim)]
                speed = paired("unet", *calls, pairs=15, device=pipe.unet.device).speedup
            before, after = plan.unet_macs
            params = 1 - plan.unet_params[1] / plan.unet_params[0]
            cells = (f"{1 - after / before:.1%}", ",".join(kinds), f"-{params:.1%}", yardstick.errors([found]))
            print(f"| {' | '.join(cells)} | {plan.predicted_error:.1e} | {speed.median:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
