"""The functions of `import slimdiff`: the commands' work on pipelines that are loaded already, as in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from slimdiff import checkpoint, evaluation, families, outputs, pipeline, ready, recipe, source
from slimdiff.bench import measure
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut
from slimdiff.errors import ModelError
from slimdiff.evaluation import SIDE, STEPS
from slimdiff.measured import Settings
from slimdiff.metrics import choice
from slimdiff.options import share_of
from slimdiff.plan import Plan
from slimdiff.profile import tables
from slimdiff.report.evaluation import Evaluation
from slimdiff.report.results import Report
from slimdiff.source import DEMO, Source
from slimdiff.statistics import StatisticsFile


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    output: str | Path = "statistics.safetensors",
    *,
    num_prompts: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    baselines: bool = False,
    resnets: bool = False,
    resume: bool = True,
    force: bool = False,
) -> StatisticsFile:
    """Run a dense pipeline over prompts and all their timesteps, and write what compression needs to know to `output`.

    It runs where the pipeline is and in its dtype, and leaves it as it was. What is None is the model family's own:
    about 500 prompts, every second with a negative prompt, 50 `steps`, the native `height` and `width` in pixels, and
    the pipeline's own scheduler (else one of `recipe.SCHEDULERS`). Prompt i starts from the noise of `seed + i`.
    `batch_size` counts prompts and changes speed only. `baselines` also sums what `compress(method=...)` may need,
    `resnets` what `compress(kinds=("qk", "vo", "ffn", "resnet"))` needs.

    Ctrl-C saves, and the same call goes on from there (`resume`); if `output` holds this very calibration, nothing is
    run. Raises OutputError if it holds another (`force` replaces it), StatisticsError if an unfinished one is of
    another model or other settings, ModelError for a model that is not supported, is offloaded or quantised or has a
    LoRA beside its weights, SlimdiffError if there are too few prompts.
    """
    ready.check(pipe)
    found = _source(pipe)
    families.check_unet(pipe.unet.config, found.reference)
    dense = _painter(pipe)
    job = recipe.family_recipe(
        pipeline.family(dense, found), pipeline.native_size(dense), prompts=None if prompts is None else tuple(prompts),
        num_prompts=num_prompts, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        scheduler=scheduler, seed=seed, baselines=baselines, resnets=resnets,
    )  # fmt: skip
    collect(dense, found, job, output, batch_size=batch_size, resume=resume, force=force)
    return StatisticsFile(Path(output))


@ready.eager()
def compress(
    pipe: DiffusionPipeline,
    statistics: StatisticsFile | str | Path,
    budget: float = 0.35,
    *,
    speedup: float | None = None,
    latency: str | Path | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """The pipeline with a slim UNet, whose `unet.plan` says what was cut; `pipe` stays as it is and shares the rest.

    `budget` is the share to remove, at least 0 and below 1, of the attention and feed-forward parameters, or of what
    `of="unet"`, "macs" or "latency" says. `speedup`, above 1, takes its place: how many times as fast a UNet call shall
    be, by the times in `latency`, a file of `slimdiff profile` (measured here where there is none). `options` are the
    other fields of `compress.Options`.

    Raises BudgetError if the budget cannot be met, StatisticsError if the statistics are of another model, unfinished
    or damaged, ModelError for a pipeline that `calibrate` refuses.
    """
    ready.check(pipe)
    file = statistics if isinstance(statistics, StatisticsFile) else StatisticsFile(Path(statistics))
    file.check_model(pipeline.fingerprint(pipe.unet), _source(pipe).reference)
    wanted = Options(budget, **options) if speedup is None else Options(share_of(speedup), "latency", **options)
    dense, kept = _painter(pipe), outputs.latency_path(file.path.parent)
    times = tables(dense, file.recipe, kept, pipe.unet.dtype, print, None if latency is None else Path(latency))
    unet, plan = cut(dense, file, wanted, times)
    unet.plan = plan
    return _with_unet(pipe, unet)


def save(slim: DiffusionPipeline, folder: str | Path, *, force: bool = False) -> None:
    """Write a pipeline of `compress` or `load` as a slim checkpoint: a diffusers folder, in the pipeline's dtype.

    It loads in plain diffusers, also where slimdiff is not installed. Raises OutputError if `folder` is there (with
    `force`, if it is no slim checkpoint) or cannot be written, ModelError if the pipeline is not slim.
    """
    plan = plan_of(slim)
    checkpoint.write(Path(folder), slim.unet, slim, plan.to_json(), None, force=force)


def load(path: str | Path, torch_dtype: Any = torch.float32, **kwargs: Any) -> DiffusionPipeline:
    """Load a slim checkpoint with slimdiff's own UNet class, and its plan as `unet.plan`; no code from it is run.

    `torch_dtype` and `kwargs` are those of `DiffusionPipeline.from_pretrained`. Raises ModelError if `path` is not a
    slim checkpoint, is of a newer format, or its UNet is damaged.
    """
    slim = checkpoint.load(path, torch_dtype, **kwargs)
    if (Path(path) / outputs.PLAN).exists():  # a pipeline that diffusers saved again has none
        slim.unet.plan = checkpoint.plan_of(path)
    return slim


def bench(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    *,
    num_prompts: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 10_000,
    batch_sizes: Sequence[int] = (1, 4),
    repeats: int = 20,
    stacks: Sequence[str] = (),
) -> Report:
    """Measure a dense pipeline against its slim one, on the same device and in the same dtype: speed, memory, drift.

    `prompts` are by default ones that calibration never saw; what else is None is as in calibration, sizes in pixels.
    Prompt i starts from the noise of `seed + i` in both. A UNet call is timed for each of `batch_sizes` prompts,
    `repeats` times each. Each of `stacks`, such as "int8", "deepcache", "tome" or "int8+tome", is put on top of both
    models and measured as well. `print(report.table())` shows everything; `report.page.write(report, folder)` writes
    the HTML.

    Raises ModelError if `slim` was not made from `dense`, SlimdiffError if they differ in device or dtype, or what
    `stacks` needs is not installed.
    """
    plan, settings, pipes = _compared(
        dense, slim, prompts, num_prompts, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        seed=seed, batch_sizes=tuple(batch_sizes), repeats=repeats,
        stacks=tuple(stacks),
    )  # fmt: skip
    return measure(*pipes, plan, settings)


def evaluate(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    output: str | Path = "evaluation",
    *,
    metrics: Sequence[str] = ("clip", "fid", "lpips"),
    reference: str | Path | None = None,
    num_prompts: int | None = None,
    steps: int = STEPS,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 10_000,
    size: int = SIDE,
    batch_size: int | None = None,
    keep_images: bool = True,
    **options: Any,
) -> Evaluation:
    """Measure the pictures of a dense pipeline and its slim one with CLIP score, FID and LPIPS, as papers do.

    Both paint every prompt from the noise of `seed + i` into the folder `output`, where the same call goes on if it was
    stopped, and pictures are measured shrunk to `size` pixels. `reference` is a folder of real pictures for FID, which
    without it is of the slim pictures to the dense ones. What is None is as in `bench`. `options` are `clip_model`,
    `weights` and `fid_features` of `metrics.choice.load`. `print(found.table())` shows the scores.

    Raises SlimdiffError, before painting, if a metric's weights cannot be had or the pipelines differ in device or
    dtype, ModelError if `slim` was not made from `dense`, OutputError if `output` holds pictures of something else.
    """
    plan, settings, pipes = _compared(
        dense, slim, prompts, num_prompts, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        seed=seed,
    )  # fmt: skip
    loaded = choice.load(metrics, reference=None if reference is None else Path(reference), **options)
    return evaluation.evaluate(
        *pipes, plan, settings, loaded, Path(output), side=size, batch_size=batch_size, keep=keep_images
    )


def plan_of(slim: DiffusionPipeline) -> Plan:
    """The plan that a pipeline's UNet was made by. Raises ModelError if it has none."""
    plan = getattr(slim.unet, "plan", None)
    if plan is None:
        raise ModelError(
            f"The pipeline's {type(slim.unet).__name__} has no plan. Pass a pipeline that slimdiff.compress or "
            f"slimdiff.load returned, from a folder with {outputs.PLAN.as_posix()}."
        )
    return plan


def _source(pipe: DiffusionPipeline) -> Source:
    """Where a pipeline says that it was loaded from."""
    name = str(pipe.config.get("_name_or_path") or "")
    if not name or not Path(name).is_dir():
        return Source(name or "a pipeline in memory", name.rpartition("/")[2], None)
    folder = Path(name).resolve()
    return source.find(None) if folder == DEMO.resolve() else Source(str(folder), folder.name, folder)


def _painter(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """One that paints from prompts with the same parts, quietly and unchecked; the given one keeps its settings."""
    own = pipeline.unchecked(pipeline.painter(copy(pipe)))
    own.set_progress_bar_config(disable=True)
    return own


def _compared(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    prompts: Sequence[str] | None,
    num_prompts: int | None,
    **changes: Any,
) -> tuple[Plan, Settings, tuple[DiffusionPipeline, DiffusionPipeline]]:
    """Both pipelines as calibration ran, but for `changes`.

    Raises ModelError if they do not belong together, or for one that `calibrate` refuses.
    """
    for pipe in (dense, slim):
        ready.check(pipe)
    plan = plan_of(slim)
    made = plan.provenance["recipe"]
    plan.check_model(pipeline.fingerprint(dense.unet), _source(dense).reference)
    texts = tuple(recipe.bench_prompts(made["family"]) if prompts is None else prompts)[:num_prompts]
    pipes = _painter(dense), _painter(slim)
    for pipe in pipes:
        pipeline.use_scheduler(pipe, made["scheduler"])
    return plan, Settings.like(made, texts, **changes), pipes


def _with_unet(pipe: DiffusionPipeline, unet: Any) -> DiffusionPipeline:
    """Not `from_pipe`, which would cast the parts that both share to one dtype."""
    other = copy(pipe)
    other.unet = unet
    return other
