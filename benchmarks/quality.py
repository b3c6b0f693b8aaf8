"""Quality of every way of compressing a miniature, by budget: tables, plots and pictures, in a run that can be resumed.

    python benchmarks/quality.py -o build/quality                                # methods x budgets x seeds
    python benchmarks/quality.py -o build/quality --ablation                     # one idea of slimdiff less at a time
    python benchmarks/quality.py -o build/quality --prompt-counts 8 32 128 500   # fewer calibration prompts
    python benchmarks/quality.py -o build/quality --prompt-counts 8 32 --chosen  # as few, by `slimdiff prompts`
    python benchmarks/quality.py -o build/quality --report                       # write the report, measure nothing

Each measurement is a line of OUT/rows.jsonl and is not made twice; runs of different seeds may share OUT at the same
time. The report, OUT/quality.md with its pictures, covers all rows of this --model, --prompts, --steps and --captions;
pictures of the contact sheet are those of seed 0. Plots need matplotlib (in the extra `dev`), nothing else does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yardstick
from diffusers import DiffusionPipeline
from yardstick import DEFAULT, GOALS, OF, PLAIN, Curve, Row, Yardstick, errors, mean, pick, spread

from slimdiff import methods, pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import cut
from slimdiff.demo import scenes
from slimdiff.errors import BudgetError, SlimdiffError
from slimdiff.groups import KINDS, Kind, find_groups
from slimdiff.macs import token_counts
from slimdiff.methods import Evidence, Method
from slimdiff.options import INFLUENCES, METHODS, MethodName, Of, Options
from slimdiff.prompts import choose
from slimdiff.solve.ffn import leverage, solve_ffn
from slimdiff.solve.qk import solve_qk
from slimdiff.solve.solution import Solution
from slimdiff.solve.vo import solve_vo
from slimdiff.solve.whitening import whiten_vo
from slimdiff.statistics import StatisticsFile
from slimdiff.widths import denominator

WAYS = [
    DEFAULT, "slimdiff:local", "slimdiff:uniform", "slimdiff:noise", "slimdiff+refine", "slimdiff+independent",
    "paper", PLAIN, "paper:sampler", "obs", "obs:sampler", "svd-llm", "svd-llm:sampler", "svd", "svd:sampler",
    "wanda", "wanda:sampler", "magnitude", "magnitude:sampler", "random",
]  # fmt: skip
SHEET_BUDGETS = (0.35, 0.5, 0.65)
BY_TIMESTEP = (DEFAULT, "slimdiff:noise", "slimdiff:local", "paper", PLAIN, "svd-llm", "wanda")
FEWER = {"prompts": "", "chosen": " chosen"}
"""Modes with fewer prompts than the others, and what tells them apart."""
KEY = ("fingerprint", "mode", "way", "budget", "of", "seed", "prompts", "steps", "captions")


@dataclass(frozen=True)
class Way:
    """A method, what decides its widths (None: its own default), options, and how calibration weighs timesteps."""

    name: str
    method: str = DEFAULT
    influence: str | None = None
    refine: bool = False
    independent: bool = False
    weights: str = "uniform"

    def options(self, budget: float, of: str) -> Options:
        choices: dict[str, Any] = {"method": self.method, "influence": self.influence, "of": of}
        return Options(budget, refine=self.refine, independent_ranks=self.independent, **choices)


def parse(name: str) -> Way:
    """`method[:influence][+refine][+independent]`. Raises ArgumentTypeError."""
    start, *extras = name.split("+")
    method, colon, influence = start.partition(":")
    known = method in METHODS and (influence in INFLUENCES or not colon) and set(extras) <= {"refine", "independent"}
    if not known:
        raise argparse.ArgumentTypeError(
            f"'{name}' is no way: method[:influence][+refine][+independent], with a method of {', '.join(METHODS)} and "
            f"an influence of {', '.join(INFLUENCES)}"
        )
    return Way(name, method, influence or None, "refine" in extras, "independent" in extras)


def variants() -> dict[str, Method]:
    """slimdiff, each time with one idea of its solves replaced by what is usual."""
    own = replace(methods.METHODS["slimdiff"], adapters=False)  # not every solve has maps for them

    def variant(kind: str, solve: Callable[[Evidence], Solution], baselines: bool = False) -> Method:
        kinds = kind.split()
        return replace(own, solve=lambda e: solve(e) if e.group.kind in kinds else own.solve(e), baselines=baselines)

    def uncentred(e: Evidence) -> Solution:
        return solve_qk(e.queries_and_keys()[0].second, e.projected(1))

    def uncorrected(e: Evidence) -> Solution:
        if e.group.kind == "vo":
            return solve_vo(e.inner(), e.out()[0], e.group.heads, has_bias=False)
        return solve_ffn(e.guided(), e.out()[0], has_bias=False)

    def alone(e: Evidence) -> Solution:
        weight, has_bias = e.out()
        return solve_vo(e.inner(), weight, e.group.heads, has_bias, sweeps=0)

    return {
        "no key centring": variant("qk", uncentred, baselines=True),
        "value covariances": variant("vo", lambda e: whiten_vo(e.projected(), e.out()[0]), baselines=True),
        "each head alone": variant("vo", alone),
        "ridge leverage": variant("ffn", lambda e: solve_ffn(e.guided(), *e.out(), choose=leverage)),
        "no guidance in the sums": variant("ffn", lambda e: solve_ffn(e.inner(), *e.out()), baselines=True),
        "no bias correction": variant("vo ffn", uncorrected),
        "no refitted output": replace(own, refits_output=False),
    }


def ablations() -> list[Way]:
    plain = [DEFAULT, "slimdiff:local", "slimdiff:noise", "slimdiff+independent", "slimdiff+refine"]
    weighted = [Way(f"timesteps {weights}", weights=weights) for weights in ("decreasing", "sigma")]
    return [*map(parse, plain), *(Way(name, name) for name in variants()), *weighted]


@dataclass(frozen=True)
class Job:
    """One row to measure, `prompts` those of its calibration."""

    mode: str
    way: Way
    budget: float
    of: str
    seed: int
    prompts: int

    def fields(self) -> Row:
        return {**{k: v for k, v in vars(self).items() if k != "way"}, "way": self.way.name}


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What was asked for. A plain way at --prompts is always of mode "main", so that no mode measures it again."""
    for seed in args.seeds:
        if args.ablation:
            for way in ablations():
                mode = "main" if way.name in WAYS else "ablation"
                yield from (Job(mode, way, budget, "macs", seed, args.prompts) for budget in GOALS)
        for prompts in args.prompt_counts:
            mode = "main" if prompts == args.prompts else "chosen" if args.chosen else "prompts"
            yield from (Job(mode, parse(DEFAULT), budget, "macs", seed, prompts) for budget in GOALS)
        if not args.ablation and not args.prompt_counts:
            for way in args.ways:
                yield from (Job("main", way, b, of, seed, args.prompts) for of in args.of for b in args.budgets)


def work_off(wanted: Sequence[Job], path: Path, common: Row, compute: Callable[[Job], Row]) -> None:
    """Append a row for every job that has none; `common` is the part of the key that all jobs share."""
    there = {tuple(row[k] for k in KEY) for row in yardstick.read(path)}
    for job in wanted:
        row = {**common, **job.fields()}
        if tuple(row[k] for k in KEY) not in there:
            yardstick.append(path, {**row, **compute(job)})


class Bench:
    """Computes rows on one pipeline; what jobs share is made when the first of them needs it."""

    def __init__(self, pipe: DiffusionPipeline, dense: source.Source, captions: int, steps: int, out: Path) -> None:
        self.pipe, self.dense, self.out = pipe, dense, out
        self.captions, self.steps = scenes.captions(captions, seed=900, held_out=True), steps
        self.yardstick, self.statistics, self.held = cache(self._yardstick), cache(self._statistics), cache(self._held)

    def _yardstick(self) -> Yardstick:
        found = Yardstick(self.pipe, self.captions, self.steps)
        yardstick.save_strip(found.pictures, self.out / "pictures/dense.png")
        return found

    def _statistics(self, seed: int, prompts: int, weights: str, are_chosen: bool) -> StatisticsFile:
        """Calibrate with the default recipe; seeds other than 0 draw other captions and noise.

        Of 500 captions (or more, where more are asked for), the first ones are taken, or those that cover all best.
        """
        changes = {"seed": 100_000 * seed, "timestep_weights": weights, "baselines": True}
        captions = tuple(scenes.captions(max(500, prompts), seed=500 + 10 * seed, held_out=False))
        if are_chosen:
            captions = choose(self.pipe, captions, prompts).prompts
        size = pipeline.native_size(self.pipe)
        job = recipe.family_recipe("demo", size, prompts=captions, num_prompts=prompts, **changes)
        parts = [f"seed-{seed}", f"-prompts-{prompts}" * (prompts != 500), "-chosen" * are_chosen]
        parts += [f"-{weights}" * (weights != "uniform")]
        path = self.out / "".join(parts) / "statistics.safetensors"
        collect(self.pipe, self.dense, job, path)
        return StatisticsFile(path)

    def _held(self, kinds: tuple[Kind, ...], of: str) -> int:
        """What the groups of these kinds hold, or the whole UNet: what a budget is a share of."""
        side, unet = self.pipe.unet.config.sample_size, self.pipe.unet
        groups = find_groups(unet, token_counts(unet, (side, side), self.pipe.tokenizer.model_max_length), kinds)
        return denominator(sum(p.numel() for p in unet.parameters()), groups, cast(Of, of))

    def compute(self, job: Job) -> Row:
        """All methods remove a share of what slimdiff's groups hold; svd-llm's, for one, leave out attention cores."""
        way, file = job.way, self.statistics(job.seed, job.prompts, job.way.weights, job.mode == "chosen")
        method, measure = methods.METHODS[cast(MethodName, way.method)], self.yardstick().measure
        factor = self.held(KINDS, job.of) / self.held(method.kinds, job.of)
        began = time.perf_counter()
        try:
            slim, plan = cut(self.pipe, file, way.options(factor * job.budget, job.of))
        except BudgetError as error:
            say(f"{way.name} {job.budget:g} of {job.of}: {error}")
            return {"method": way.method, "impossible": str(error)}
        seconds = time.perf_counter() - began
        is_shown = way.name in (DEFAULT, PLAIN) and job.of == "macs" and job.seed == 0 and job.mode == "main"
        found = measure(slim, strip(self.out, way.name, job.budget) if is_shown else None)
        what = f"seed {job.seed}, {job.prompts} prompts, {job.budget:g} of {job.of}, {way.name}"
        say(f"{what}: {errors([found])}, {seconds:.0f} s")
        sums = {
            f"groups_{what}": [sum(getattr(e, what)[side] for e in plan.entries) for side in (0, 1)]
            for what in ("params", "macs")
        }
        return {
            **asdict(way), "way": way.name,
            "influence": way.influence or method.influence, "achieved": plan.achieved / factor,
            "predicted_error": plan.predicted_error, "lower_bound": plan.lower_bound, **sums,
            "unet_params": plan.unet_params, "unet_macs": plan.unet_macs, "seconds": seconds, **found,
        }  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def strip(out: Path, way: str, budget: float) -> Path:
    return out / f"pictures/{way.replace(':', '-')}-{budget:g}.png"


def draw(rows: Sequence[Row], main: Sequence[Row], out: Path, captions: Sequence[str]) -> list[tuple[str, str]]:
    """The pictures of the report that there are rows for: file names and titles."""
    drawn = []

    def add(file: str, title: str, curves: dict[str, Curve], *axis: Any) -> None:
        if any(len(curve) > 1 for curve in curves.values()):
            yardstick.chart(curves, out / file, title, *axis)
            drawn.append((file, title))

    def along(chosen: Sequence[Row], key: str) -> Curve:
        return [(x, *spread(pick(chosen, **{key: x}))[:2]) for x in sorted({row[key] for row in chosen})]

    for of in sorted({row["of"] for row in main}):
        here = pick(main, of=of)
        best: dict[str, Curve] = {}
        for method in METHODS:
            ways = [pick(here, way=way) for way in dict.fromkeys(row["way"] for row in pick(here, method=method))]
            lines = {chosen[0]["way"]: along(chosen, "budget") for chosen in ways}
            if lines:  # the most budgets, then the least error over them, on the plot's own scale
                least = min(lines, key=lambda w: (-len(lines[w]), sum(math.log(max(y, 1e-30)) for _, y, _ in lines[w])))
                way = DEFAULT if DEFAULT in lines else least
                best[way] = lines[way]
        title = f"{DEFAULT}, and each baseline's best way (thick: median, thin: 90th percentile)"
        add(f"budgets-{of}.png", title, best, f"share removed of {OF[of]}")
    curves: dict[str, Curve] = {}
    for way in BY_TIMESTEP:
        if chosen := pick(main, way=way, of="macs", budget=0.35):
            noise = np.mean([row["noise"] for row in chosen], axis=0)
            curves[way] = [(t, y, None) for t, y in zip(chosen[0]["timesteps"], noise.tolist(), strict=True)]
    title = "Guided noise prediction along the dense trajectory, 0.35 of MACs removed"
    add("timesteps.png", title, curves, "timestep")
    counted = [row for row in pick(rows, way=DEFAULT, of="macs") if row["mode"] != "chosen"]
    curves = {f"{b:g} of MACs": along(c, "prompts") for b in GOALS if (c := pick(counted, budget=b))}
    title = f"Final latents of {DEFAULT} (thick: median, thin: 90th percentile)"
    add("prompts.png", title, curves, "calibration prompts", True)
    pairs = {f"{way} {b:g} of MACs": strip(out, way, b) for b in SHEET_BUDGETS for way in (PLAIN, DEFAULT)}
    if strips := {label: file for label, file in pairs.items() if file.is_file()}:
        strips = {"dense": out / "pictures/dense.png", **strips}
        yardstick.contact_sheet(strips, captions, out / "pictures.png")
        drawn.append(("pictures.png", "The same noise and captions, dense and slim"))
    return drawn


def report(rows: Sequence[Row], main: Sequence[Row], model: str, drawn: Sequence[tuple[str, str]]) -> str:
    """The Markdown of everything measured on one model with one number of captions and steps."""
    one = rows[0]
    parts = [
        "# Quality",
        f"Model {model}; {one['captions']} captions that neither training nor calibration saw, {one['steps']} steps; "
        f"seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}. Errors are relative squared errors of "
        "the final latents against the dense model's from the same noise: median / 90th percentile / worst of all "
        "captions and seeds. A † marks what lacks a seed that others have.",
        "## Goals", yardstick.table(("goal", "found", ""), yardstick.goals(main)),
    ]  # fmt: skip
    for of in sorted({row["of"] for row in main}):
        here = [row for row in main if row["of"] == of]
        dense = f"{mean(found, 'dense_accuracy'):.3f}" if (found := pick(here)) else "not measured"
        parts += [f"## Budgets of {OF[of]}: error of the final latents", yardstick.grid(here, "way", errors)]
        parts += [f"## Budgets of {OF[of]}: PSNR in dB / SSIM (medians) / attribute accuracy (dense: {dense})"]
        parts += [yardstick.grid(here, "way", yardstick.look)]
    parts += [f"## Predicted and measured error of {DEFAULT}", yardstick.predictions(main)]

    def against_default(found: list[Row]) -> str:
        own, seeds = pick(main, way=DEFAULT, of="macs", budget=found[0]["budget"]), {row["seed"] for row in found}
        own = [row for row in own if row["seed"] in seeds]
        return errors(found) + (f" ({spread(found)[0] / spread(own)[0]:.2f} times)" if own else "")

    at_goals = [row for row in rows if row["of"] == "macs" and row["budget"] in GOALS]
    if any(row["mode"] == "ablation" for row in rows):
        ways = {way.name: i for i, way in enumerate(ablations())}
        chosen = [row for row in at_goals if row["way"] in ways and row["mode"] not in FEWER]
        chosen.sort(key=lambda row: ways[row["way"]])
        parts += [f"## One idea changed, budgets of {OF['macs']} (and times the default's median)"]
        parts += [yardstick.grid(chosen, "way", against_default)]
    if any(row["mode"] in FEWER for row in rows):
        chosen = sorted((row for row in at_goals if row["way"] == DEFAULT), key=lambda row: row["prompts"])
        chosen = [{**row, "prompts": f"{row['prompts']}{FEWER.get(row['mode'], '')}"} for row in chosen]
        parts += [
            f"## Number of calibration prompts, budgets of {OF['macs']}",
            yardstick.grid(chosen, "prompts", errors),
        ]
    parts += [f"## {title}\n\n![{title}]({file})" for file, title in drawn]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/quality"))
    parser.add_argument("--model", help="folder made by tools/train_demo.py; the bundled miniature without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration: captions, noise")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65])
    parser.add_argument("--of", nargs="+", default=["groups", "macs"], choices=list(OF))
    parser.add_argument("--ways", type=parse, nargs="+", default=[parse(name) for name in WAYS], metavar="WAY",
                        help="method[:influence][+refine][+independent]")  # fmt: skip
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=500, help="of calibration")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--prompt-counts", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--chosen", action="store_true", help="those prompts that cover 500 best")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # its rounding would drown small errors
    dense = source.find(args.model)
    pipe = pipeline.load(dense).to(args.device)
    bench = Bench(pipe, dense, args.captions, args.steps, args.output)
    common = {"fingerprint": pipeline.fingerprint(pipe.unet), "steps": args.steps, "captions": args.captions}
    path = args.output / "rows.jsonl"
    if not args.report:
        methods.METHODS.update(cast(Any, variants()))  # compress looks methods up by name
        work_off(list(jobs(args)), path, common, bench.compute)
    rows = [row for row in yardstick.read(path) if all(row[key] == value for key, value in common.items())]
    rows = [row for row in rows if row["mode"] in FEWER or row["prompts"] == args.prompts]
    if not rows:
        sys.exit(f"{path} holds no row of this model, captions, steps and prompts.")
    order = {name: i for i, name in enumerate(WAYS)}
    rows.sort(key=lambda row: (order.get(row["method"], -1), order.get(row["way"], len(order)), row["way"]))
    shown = [row for row in rows if row["mode"] == "main"]
    try:
        drawn = draw(rows, shown, args.output, bench.captions)
    except ModuleNotFoundError as error:
        drawn = []
        say(f"The report goes without pictures: {error}.")
    text = report(rows, shown, dense.reference, drawn)
    (args.output / "quality.md").write_text(text, encoding="utf-8")
    print(text.partition("## Predicted")[0])


if __name__ == "__main__":
    try:
        main()
    except SlimdiffError as error:
        sys.exit(f"error: {error}")
