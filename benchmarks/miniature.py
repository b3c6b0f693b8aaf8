"""Quality on the miniature by budget and by way of compressing, in one run, as a Markdown table.

    slimdiff calibrate && python benchmarks/miniature.py slimdiff-out/demo/statistics.safetensors

Errors are relative squared errors of the final latents against the dense model at equal seeds, on 64 captions that
neither training nor calibration saw; accuracy is the mean attribute accuracy of the pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimdiff import compress, pipeline, recipe, source
from slimdiff.compress import Options
from slimdiff.demo import scenes
from slimdiff.influence import relative_error
from slimdiff.statistics import StatisticsFile

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "local errors": {"influence": "local"},
    "refined": {"refine": True},
    "independent ranks": {"independent_ranks": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.6])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    pipe = pipeline.load(source.find(None))
    file = StatisticsFile(args.statistics)
    job, captions = file.recipe, recipe.bench_prompts("demo")
    conditioning = pipeline.encode(pipe, captions, [""] * len(captions))
    dense_unet = pipe.unet

    def paint() -> tuple[torch.Tensor, float]:
        latents = pipeline.sample(
            pipe, conditioning, range(20_000, 20_000 + len(captions)), steps=args.steps,
            guidance_scale=job.guidance_scale, height=job.height, width=job.width,
        )  # fmt: skip
        with torch.no_grad():
            images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        arrays = pipe.image_processor.postprocess(images, output_type="np")
        return latents, scenes.mean_scores([(255 * one).round().astype(np.uint8) for one in arrays], list(captions))[
            "mean"
        ]

    dense, accuracy = paint()
    print(f"dense: attribute accuracy {accuracy:.3f}\n")
    print("| budget | way | predicted | median | 90th percentile | worst | accuracy |\n|---|---|---|---|---|---|---|")
    for budget in args.budgets:
        for way in args.ways:
            slim, plan = compress(pipe, file, Options(budget, **WAYS[way]))
            pipe.unet = slim
            latents, accuracy = paint()
            pipe.unet = dense_unet
            errors = relative_error(latents, dense).numpy()
            middle, high, worst = np.quantile(errors, [0.5, 0.9, 1.0])
            predicted = f"{plan.predicted_error:.1e}" if WAYS[way].get("influence") != "local" else ""
            print(
                f"| {budget} | {way} | {predicted} | {middle:.1e} | {high:.1e} | {worst:.1e} | {accuracy:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
