"""What capturing statistics costs: the same pipeline with and without capture, in turns, on one batch of prompts.

python benchmarks/capture_overhead.py [MODEL] [--batch-size 32] [--steps 5] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch

from slimdiff import pipeline, recipe, source
from slimdiff.batches import automatic_batch_size
from slimdiff.capture import captured
from slimdiff.gram import Gram
from slimdiff.groups import find_groups
from slimdiff.guidance import guided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pipeline.device_of(args.device)
    dense = source.find(args.model)
    pipe = pipeline.load(dense, pipeline.dtype_of("auto", device)).to(device)
    job = recipe.family_recipe(pipeline.family(pipe, dense), pipeline.native_size(pipe), steps=args.steps)
    groups = find_groups(pipe.unet)
    size = args.batch_size or automatic_batch_size(pipe, groups, job)
    conditioning = pipeline.encode(pipe, job.prompts[:size], job.negatives[:size])
    grams: dict[str, Gram] = {}
    guide = partial(guided, prompts=size, guidance_scale=job.guidance_scale)

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        pipeline.sample(
            pipe, conditioning, range(size), steps=job.steps, guidance_scale=job.guidance_scale, height=job.height,
            width=job.width,
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def run_captured() -> float:
        with captured(pipe.unet, groups, grams, guide=guide):
            return run()

    run(), run_captured()
    pairs = [(run(), run_captured()) for _ in range(args.repeats)]
    ratios = sorted(with_capture / without for without, with_capture in pairs)
    print(
        f"{dense.name}, {device}, batch {size}, {job.steps} steps: "
        f"{statistics.median(p[0] for p in pairs):.2f} s without, "
        f"{statistics.median(p[1] for p in pairs):.2f} s with capture; ratio {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
