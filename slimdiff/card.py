"""What a slim checkpoint says of itself: its README, and the model card of a published one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from slimdiff.report.wording import count, factor, percent, seconds, similarity
from slimdiff.slim_unet import MODULE

_LOADING = """Without slimdiff (diffusers runs `unet/{module}.py` from this folder):

    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)

With slimdiff, which runs no code from here:

    {slimdiff}

{loras} A1111 and ComfyUI cannot load it: its layers differ in width."""

_LORAS = {
    True: "LoRAs trained on the original work here: `pipe.load_lora_weights(...)` maps them to the cut layers.",
    False: "LoRAs trained on the original do not fit cut layers: merge them into the original before compressing it.",
}


def readme(config: Mapping[str, Any]) -> str:
    """Of a slim checkpoint in a folder, from its UNet's config."""
    place = "path/to/this/folder"
    loading = _loading(config, place, ("import slimdiff", f'pipe = slimdiff.load("{place}")'))
    return _page(ModelCardData(library_name="diffusers", tags=["slimdiff"]), _what(config), loading)


def card(
    config: Mapping[str, Any],
    repo: str,
    summary: Sequence[str],
    base_model: str | None = None,
    licence: str | None = None,
    report: Mapping[str, Any] | None = None,
    pictures: str | None = None,
) -> str:
    """Of a slim checkpoint at `repo` on the hub: `summary` are the lines of its plan, `report` the JSON of a benchmark,
    `pictures` the path there of a sheet of its pictures.

    `base_model` is the dense model on the hub, `licence` its identifier there; both are left out where unknown.
    """
    data = ModelCardData(
        base_model=base_model, library_name="diffusers", license=licence, pipeline_tag="text-to-image",
        tags=["slimdiff", "stable-diffusion", "compressed"],
    )  # fmt: skip
    original = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "the original"
    parts = [f"# {repo.rpartition('/')[2]}", _what(config, original), "\n".join(f"    {line}" for line in summary)]
    if report is not None:
        parts += ["## Measured", measured(report)]
    if pictures is not None:
        parts += [f"![Dense and slim from the same noise: the worst pairs, then typical ones]({pictures})"]
    lines = "import huggingface_hub, slimdiff", f'pipe = slimdiff.load(huggingface_hub.snapshot_download("{repo}"))'
    return _page(data, *parts, "## How to load it", _loading(config, repo, lines))


def _page(data: ModelCardData, *parts: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"


def _what(config: Mapping[str, Any], original: str = "the original") -> str:
    return (
        f"A text-to-image model compressed with slimdiff: {len(config['slim_ranks'])} groups of its UNet's layers are "
        f"narrower than in {original}, cut in closed form, without training. `slimdiff/plan.json` holds every "
        "decision. The licence of the original model applies."
    )


def _loading(config: Mapping[str, Any], place: str, lines: Sequence[str]) -> str:
    """How to load it from `place`, a folder or a name on the hub; `lines` do so with slimdiff."""
    loras = _LORAS[bool(config.get("slim_maps") or not config["slim_ranks"])]
    return _LOADING.format(module=MODULE, place=place, slimdiff="\n    ".join(lines), loras=loras)


def measured(report: Mapping[str, Any]) -> str:
    """The figures of a benchmark as Markdown; no speed-up stands without its drift."""
    before, after = report["size"]["parameters"]
    macs = [side["total"] for side in report["size"]["macs"]]
    drift, ssim = report["picture"]["drift"], report["fidelity"]["ssim"]["typical"]
    of_drift = " / ".join("not finite" if drift[level] is None else percent(drift[level]) for level in drift)
    rows = [
        ("UNet parameters", count(before), count(after), factor(before / after)),
        ("UNet MACs per row", *map(count, macs), factor(macs[0] / macs[1])),
        *((t["what"], seconds(t["dense"]["median"]), seconds(t["slim"]["median"]), factor(t["speedup"]["median"]))
          for t in report["speed"]),
    ]  # fmt: skip
    table = ["| | dense | slim | ratio |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    made, s = report["provenance"], report["settings"]
    return (
        "\n".join(table) + f"\n\nDrift of the final latents against the original's at equal seeds (typical / 9 in 10 / "
        f"worst of {len(s['prompts'])} prompts): {of_drift}; 0% is the same picture, unrelated ones reach about 200%. "
        f"SSIM of typical pictures: {'not finite' if ssim is None else similarity(ssim)}. Measured with {s['steps']} "
        f"steps and guidance {s['guidance_scale']:g} at {s['width']} x {s['height']} px, in {made['precision']} on "
        f"{made['device']}."
    )
