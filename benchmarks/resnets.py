"""What cutting ResNet blocks too gives: the same share of the UNet's MACs removed with and without the `resnet` group.

Calibrates the miniature with few prompts, removes each share in both ways, and compares final latents, on captions that
neither training nor calibration saw. In the end all UNets are timed in turns, and the errors of both ways are read off
at equal speed-ups, between those measured. Timing wants an idle machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yardstick
from torch import nn

from slimdiff import pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut
from slimdiff.demo import scenes
from slimdiff.errors import BudgetError
from slimdiff.groups import KINDS, find_groups
from slimdiff.macs import count, token_counts
from slimdiff.statistics import StatisticsFile
from slimdiff.timing import in_turns
from slimdiff.widths import denominator

ROWS = 32
"""Rows of a timed UNet call: 16 prompts with guidance. With few, most of the miniature's time is overhead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/resnets"))
    parser.add_argument("--prompts", type=int, default=64, help="of calibration")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.25],
                        help="of the UNet's MACs")  # fmt: skip
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
    ways = {",".join(kinds): kinds for kinds in (KINDS, (*KINDS, "resnet"))}
    found: list[tuple[str, list[str], float, nn.Module]] = []
    for share in args.shares:
        for way, kinds in ways.items():
            held = denominator(0, find_groups(pipe.unet, pixels, kinds), "macs")
            try:
                slim, plan = cut(pipe, file, Options(share * whole / held, of="macs", kinds=kinds))
            except BudgetError as error:
                print(f"{share:.0%} of the MACs, {way}: {error}", file=sys.stderr, flush=True)
                continue
            row = ruler.measure(slim)
            (before, after), (parameters, left) = plan.unet_macs, plan.unet_params
            cells = [f"{1 - after / before:.1%}", way, f"-{1 - left / parameters:.1%}", yardstick.errors([row])]
            found.append((way, [*cells, f"{plan.predicted_error:.1e}"], yardstick.spread([row])[0], slim))
            print(" ".join(found[-1][1]), file=sys.stderr, flush=True)
    with torch.no_grad():
        calls = [partial(unet, *inputs) for unet in (pipe.unet, *(unet for *_, unet in found))]
        dense_time, *times = in_turns(calls, device=pipe.unet.device, what="all UNets")
    speeds = [dense_time / time for time in times]
    rows = [[*cells, f"{speed:.2f}x"] for (_, cells, *_), speed in zip(found, speeds, strict=True)]
    head = ("UNet MACs removed", "groups", "parameters", "median / 90th percentile / worst", "predicted", "speed-up")
    print(yardstick.table(head, rows))
    curves = {
        way: sorted((speed, error) for (w, _, error, _), speed in zip(found, speeds, strict=True) if w == way)
        for way in ways
    }
    print(yardstick.table(("speed-up", *ways), at_equal_time(list(curves.values()))))


def at_equal_time(curves: list[list[tuple[float, float]]]) -> list[list[str]]:
    """Rows of a table: speed-ups within all curves of (speed-up, error), and each one's error, log-interpolated."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    speeds = [step / 20 for step in range(21, 40) if first <= step / 20 <= last]
    errors = [np.exp(np.interp(speeds, [s for s, _ in curve], [math.log(e) for _, e in curve])) for curve in curves]
    return [[f"{speed:.2f}x", *(f"{e:.1e}" for e in row)] for speed, *row in zip(speeds, *errors, strict=True)]


if __name__ == "__main__":
    main()
