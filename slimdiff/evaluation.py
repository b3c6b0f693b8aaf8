"""`slimdiff eval`: both models paint the same prompts at equal seeds, and the field's metrics look at the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from slimdiff import painting
from slimdiff.fidelity import pictures_at_once
from slimdiff.files import write_json
from slimdiff.measured import Settings
from slimdiff.metrics.pictures import Pictures
from slimdiff.metrics.score import Metric
from slimdiff.pairs import check_alike, provenance, quiet
from slimdiff.plan import Plan
from slimdiff.report.evaluation import Evaluation

STEPS, SIDE = 25, 256
"""Of the field's protocol on MS-COCO (docs/evaluation.md): denoising steps, and the pictures' side in pixels."""

AT_ONCE = 32
"""Pictures that a metric's network sees in one batch."""


def evaluate(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    plan: Plan,
    settings: Settings,
    metrics: Sequence[Metric],
    folder: Path,
    *,
    side: int = SIDE,
    batch_size: int | None = None,
    keep: bool = True,
) -> Evaluation:
    """Paint what is not in `folder` yet, measure all of it, and write `folder`/eval.json.

    Pictures whose shorter side has more than `side` pixels are shrunk to that. `batch_size` counts pictures, for the
    models and for the metrics. Without `keep` the pictures are removed once they are measured.

    Raises SlimdiffError, before painting, if the pipelines differ in device, precision or scheduler, or a metric cannot
    measure such pictures; OutputError if `folder` holds pictures of something else.
    """
    check_alike(dense, slim)
    size = painting.shrunk(settings, side)
    for metric in metrics:
        metric.check(len(settings.prompts), size)
    with quiet(dense), quiet(slim):
        batch = batch_size or pictures_at_once(dense, settings)
        painted = painting.paint_both(dense, slim, settings, folder, size, batch)
    before, after = (Pictures(paths, size, batch_size or AT_ONCE) for paths in painted)
    scores = tuple(metric.measure(before, after, settings.prompts, dense.unet.device) for metric in metrics)
    found = Evaluation(settings, plan, size, scores, provenance(dense))
    write_json(folder / "eval.json", found.to_json())
    if not keep:
        painting.remove(folder)
    return found
