"""Compress a pipeline as in a notebook: here the bundled miniature, with few prompts and steps, in about half a minute.

For a real model, load it in the place of the miniature, and leave out what makes the runs short.
"""

import sys

import torch
from diffusers import DiffusionPipeline

import slimdiff
from slimdiff.source import DEMO

folder = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
pipe = DiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)

statistics = slimdiff.calibrate(pipe, output=f"{folder}/statistics.safetensors", num_prompts=16, steps=6)
slim = slimdiff.compress(pipe, statistics, budget=0.35, probe_prompts=2, probe_steps=4)
print(slim.unet.plan.table())
slimdiff.save(slim, f"{folder}/slim", force=True)

slim = slimdiff.load(f"{folder}/slim")
report = slimdiff.bench(pipe, slim, num_prompts=4, steps=6, batch_sizes=(1,), repeats=3)
print(report.table())

caption = "a large red circle on the left and a small blue square on the right on a white background"
slim(caption, guidance_scale=4.0, num_inference_steps=20).images[0].save(f"{folder}/picture.png")
