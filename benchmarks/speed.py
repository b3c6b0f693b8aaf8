"""Dense against slim UNets at the true shapes of published models, next to what their multiply-accumulates promise.

    python benchmarks/speed.py                                              # SD 1.5 at 512 and 768 px, SDXL at 1024 px
    python benchmarks/speed.py --runs sd15:512 --batches 1 8 --modes eager compile --budgets 0.35 --device cuda

One call of the UNet with both halves of guidance, in turns within each pair, medians. Weights are random and each group
keeps the same share of its width, because speed depends on neither values nor quality. `independent` gives query-key
heads less width than value heads, so that one side is padded at run time. The last rows show what projecting the text
once for a picture gives: the same slim UNet against itself, given a new copy of the text at every call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from architectures import CONFIGS, TEXT_TOKENS, build, randomised
from diffusers import UNet2DConditionModel
from torch import nn

from slimdiff.allocate import level_out
from slimdiff.groups import find_groups
from slimdiff.macs import count, meta_inputs, token_counts
from slimdiff.measured import Timing
from slimdiff.options import Options
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.timing import paired
from slimdiff.widths import counted, item, required, units

NARROWER = 1.2
"""How much earlier than value heads query-key heads are narrowed when widths are independent."""


def ranks(dense: UNet2DConditionModel, latents: tuple[int, int], budget: float, independent: bool) -> dict[str, int]:
    """The same share of every group, `budget` of the groups' parameters gone in all."""
    groups = find_groups(dense, token_counts(dense, latents))
    options = Options(budget, influence="uniform", independent_ranks=independent)
    together = units(groups, options)
    spent_in = counted(sum(p.numel() for p in dense.parameters()), groups, options.of)
    errors = {g.name: torch.zeros(g.width + 1) for g in groups}
    items = [item(members, errors, options, spent_in) for members in together]
    early = [NARROWER if independent and members[0].kind == "qk" else 1.0 for members in together]
    levels = [[k * cost / one.costs[0] for cost in one.costs] for k, one in zip(early, items, strict=True)]
    widths = level_out(items, required(groups, options, spent_in), levels).widths
    return {g.name: widths[unit[0].name] for unit in together for g in unit if widths[unit[0].name] < g.width}


def call(unet: nn.Module, inputs: dict[str, Any], new_text: bool = False) -> Callable[[], Any]:
    def run() -> Any:
        text = inputs["encoder_hidden_states"]
        with torch.no_grad():
            return unet(**inputs | {"encoder_hidden_states": text.clone() if new_text else text})[0]

    return run


def moved(inputs: Any, rows: int, device: str, dtype: torch.dtype) -> Any:
    """What the meta inputs stand for, as random tensors of so many rows."""
    if isinstance(inputs, dict):
        return {name: moved(value, rows, device, dtype) for name, value in inputs.items()}
    return torch.randn(rows, *inputs.shape[1:], device=device, dtype=dtype)


def row(name: str, timing: Timing, ideal: float) -> str:
    found = timing.speedup
    share = f"{(found.median - 1) / (ideal - 1):.0%}" if ideal > 1 else "-"
    return (
        f"| {name} | {1e3 * timing.dense.median:.1f} ms | {1e3 * timing.slim.median:.1f} ms | {found.median:.2f}x "
        f"({found.q1:.2f} to {found.q3:.2f}) | {ideal:.2f}x | {share} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["sd15:512", "sd15:768", "sdxl:1024"], metavar="MODEL:PIXELS")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile", "graphs"])
    parser.add_argument("--widths", nargs="+", default=["tied", "independent"], choices=["tied", "independent"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    device, dtype = args.device, getattr(torch, args.dtype)
    compiled: dict[str, Callable[[Any], Any]] = {
        "eager": lambda unet: unet,
        "compile": lambda unet: torch.compile(unet, fullgraph=True),
        "graphs": lambda unet: torch.compile(unet, fullgraph=True, mode="reduce-overhead"),
    }
    print("| UNet call | dense | slim | speed-up (quartiles) | ideal | share of ideal |\n|---|---|---|---|---|---|")
    for name, pixels in (run.split(":") for run in args.runs):
        latents = (int(pixels) // 8, int(pixels) // 8)
        dense = build(name)
        macs, inputs = count(dense, latents).total, meta_inputs(dense, latents, TEXT_TOKENS)
        cut = {
            (widths, budget): ranks(dense, latents, budget, widths == "independent")
            for widths in args.widths
            for budget in args.budgets
        }
        dense = randomised(dense, dtype, device).to(memory_format=torch.channels_last)
        for (widths, budget), chosen in cut.items():
            with torch.device("meta"):
                slim = SlimUNet2DConditionModel(**CONFIGS[name], slim_ranks=chosen)
            ideal = macs / count(slim, latents).total
            slim = randomised(slim, dtype, device).to(memory_format=torch.channels_last)
            for batch in args.batches:
                given = moved(inputs, 2 * batch, device, dtype)
                label = f"{name} {pixels} px, batch {batch}, {budget:g} {widths}"
                for mode in args.modes:
                    torch._dynamo.reset()
                    sides = [call(compiled[mode](unet), given) for unet in (dense, slim)]
                    timing = paired(label, *sides, pairs=args.repeats, device=torch.device(device))
                    print(row(f"{label}, {mode}", timing, ideal), flush=True)
                if (widths, budget) == next(iter(cut)):
                    sides = [call(slim, given, new_text=True), call(slim, given)]
                    timing = paired(label, *sides, pairs=args.repeats, device=torch.device(device))
                    print(row(f"{label}, text projected once", timing, 1.0), flush=True)


if __name__ == "__main__":
    main()
