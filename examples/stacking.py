"""int8 weights, DeepCache and ToMe on top of a slim pipeline, each by its own package as on any pipeline.

    pip install 'slimdiff[int8,deepcache,tome]'

Takes the slim miniature that quickstart.py leaves, and paints a picture with each; then measures all three.
"""

import sys

import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DiffusionPipeline
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import slimdiff
from slimdiff.source import DEMO

folder = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
slim = slimdiff.load(f"{folder}/slim")
caption = "a large red circle on the left and a small blue square on the right on a white background"


def paint(name):
    noise = torch.Generator().manual_seed(0)
    picture = slim(caption, guidance_scale=4.0, num_inference_steps=10, generator=noise).images[0]
    picture.save(f"{folder}/{name}.png")


paint("slim")

helper = DeepCacheSDHelper(pipe=slim)
helper.set_params(cache_interval=3, cache_branch_id=0)
helper.enable()
paint("deepcache")
helper.disable()

tomesd.apply_patch(slim, ratio=0.5)  # of SDXL, whose finest level has no attention: max_downsample=2
paint("tome")
tomesd.remove_patch(slim)

paint("slim-again")

quantize_(slim.unet, Int8WeightOnlyConfig())  # on a GPU in bfloat16: float16 overflows in torchao's multiplication
paint("int8")

dense = DiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
slim = slimdiff.load(f"{folder}/slim")
stacks = ("int8", "deepcache", "tome")  # or several at once, as in "int8+deepcache"
report = slimdiff.bench(dense, slim, num_prompts=2, steps=4, batch_sizes=(1,), repeats=1, stacks=stacks)
print(report.table())
