"""Every family of models the whole way on shrunken UNets, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNETS, tiny_pipeline, tiny_unet
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor, nn

from slimdiff import checkpoint, families, fidelity, pipeline, recipe, source
from slimdiff.calibrate import collect
from slimdiff.compress import Options, cut
from slimdiff.errors import ModelError
from slimdiff.groups import KINDS, find_groups
from slimdiff.inpainting import canvases, rectangle
from slimdiff.macs import count
from slimdiff.measured import Settings
from slimdiff.statistics import StatisticsFile

ROOT = Path(__file__).parent.parent
WORDS = ("a cat", "hill", "red", "dogs")

BLOCKS = {
    "sd1": ("sd1", 7), "sd1-inpainting": ("sd1-inpainting", 7), "bk-sdm": ("sd1", 6), "sd2": ("sd2", 7),
    "sdxl": ("sdxl", 11), "sdxl-inpainting": ("sdxl-inpainting", 7), "ssd-1b": ("sdxl", 11),
}  # fmt: skip
"""Recipe and number of transformer blocks: two attentions and a feed-forward layer each."""


def module_at(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Made:
    """A tiny dense model and its statistics."""

    name: str
    folder: Path
    pipe: DiffusionPipeline
    statistics: StatisticsFile

    def compress(self, budget: float, **options: Any) -> Any:
        return cut(self.pipe, self.statistics, Options(budget, probe_prompts=4, probe_steps=1, **options))

    def sample(self, unet: nn.Module) -> Tensor:
        job, own = self.statistics.recipe, self.pipe.unet
        canvas = canvases(self.pipe, job, range(4))
        self.pipe.unet = unet
        try:
            return pipeline.paint(self.pipe, job, range(4), canvas=canvas)
        finally:
            self.pipe.unet = own


def make(folder: Path, output: Path) -> Made:
    found = source.find(str(folder))
    pipe = pipeline.load(found)
    size = pipeline.native_size(pipe)
    job = recipe.family_recipe(pipeline.family(pipe, found), size, prompts=WORDS, steps=2)
    collect(pipe, found, job, output, batch_size=4)
    return Made(folder.name, folder, pipe, StatisticsFile(output))


@pytest.fixture(scope="module", params=UNETS)
def made(request, tmp_path_factory) -> Made:
    work = tmp_path_factory.mktemp("family")
    tiny_pipeline(work / "tokenizer", tiny_unet(**UNETS[request.param])).save_pretrained(work / request.param)
    return make(work / request.param, work / "s.safetensors")


def test_groups_and_recipe_are_those_of_the_family(made):
    name, blocks = BLOCKS[made.name]
    assert made.statistics.recipe.family == name
    groups = find_groups(made.pipe.unet)
    assert {kind: sum(g.kind == kind for g in groups) for kind in KINDS} == dict(
        qk=2 * blocks, vo=2 * blocks, ffn=blocks
    )
    assert len(made.statistics.metadata["tokens"]) == 7 * blocks


def test_a_budget_of_nothing_changes_no_bit(made):
    slim, plan = made.compress(0.0)
    assert plan.ranks() == {}
    assert torch.equal(made.sample(slim), made.sample(made.pipe.unet))


def test_states_are_the_calls_of_the_unet(made):
    check_states(made)


def test_states_keep_what_tells_a_distilled_unet_the_guidance(tmp_path):
    tiny_pipeline(tmp_path, tiny_unet(time_cond_proj_dim=6)).save_pretrained(tmp_path / "lcm")
    check_states(make(tmp_path / "lcm", tmp_path / "s.safetensors"))


def check_states(made: Made) -> None:
    """Sampling again, each state gives the prediction of its prompt at its timestep, in all halves of guidance."""
    unet, states, seen = made.pipe.unet, made.statistics.states(), {}
    handle = unet.register_forward_hook(lambda _, args, output: seen.update({float(args[1]): output[0]}))
    canvas = canvases(made.pipe, made.statistics.recipe, range(4))
    seen.clear()
    pipeline.paint(made.pipe, made.statistics.recipe, range(4), canvas=canvas)
    handle.remove()
    assert sorted(set(zip(states.prompts, states.timesteps, strict=True))) == [
        (p, t) for p in range(4) for t in sorted(seen)
    ]
    for i, (prompt, timestep) in enumerate(zip(states.prompts, states.timesteps, strict=True)):
        with torch.no_grad():
            again = unet(**states.batch([i], unet.device, unet.dtype))[0]
        assert torch.allclose(again, seen[timestep][prompt::4], atol=1e-5)


@pytest.mark.parametrize("independent", [False, True], ids=["tied", "independent"])
def test_a_slim_checkpoint_is_counted_rightly_and_loads_without_slimdiff(made, tmp_path, independent):
    slim, plan = made.compress(0.3, independent_ranks=independent, influence="energy")
    assert plan.achieved >= 0.3
    if not independent:  # unequal widths run padded
        assert plan.unet_macs[1] == count(slim, (8, 8), 8).total
    checkpoint.write(tmp_path / "slim", slim, made.pipe, plan.to_json(), made.folder)
    travelled = module_at(tmp_path / "slim/unet/slimdiff_unet.py", "travelled")
    loaded = travelled.SlimUNet2DConditionModel.from_pretrained(tmp_path / "slim/unet")
    here = made.sample(slim)
    assert torch.equal(made.sample(loaded), here)
    dense = made.sample(made.pipe.unet)
    assert 0 < (here - dense).norm() / dense.norm() < 0.5
    assert type(checkpoint.load(tmp_path / "slim")) is type(made.pipe)


@pytest.mark.slow
def test_a_slim_unet_compiles_in_one_graph(made):
    slim, _ = made.compress(0.3, influence="energy")
    inputs = []
    handle = slim.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    made.sample(slim)
    handle.remove()
    torch._dynamo.reset()
    args, kwargs = inputs[-1]
    with torch.no_grad():
        compiled = torch.compile(slim, fullgraph=True, backend="eager")(*args, **kwargs)[0]
        assert torch.allclose(compiled, slim(*args, **kwargs)[0], atol=1e-6)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory) -> Made:
    work = tmp_path_factory.mktemp("inpainting")
    tiny_pipeline(work / "tokenizer", tiny_unet(in_channels=9)).save_pretrained(work / "tiny")
    return make(work / "tiny", work / "s.safetensors")


def test_half_of_an_inpainting_models_pictures_are_empty_the_others_its_own(inpainting):
    pipe, job = inpainting.pipe, inpainting.statistics.recipe
    canvas = canvases(pipe, job, range(4))
    assert (canvas["image"][:2] == 0.5).all() and (canvas["mask_image"][:2] == 1).all()
    for i in (2, 3):
        share = canvas["mask_image"][i].mean()
        assert 0.25**2 * 0.8 <= share <= 0.75**2 * 1.2 and canvas["image"][i].std() > 0
        alone = canvases(pipe, job, [i])
        assert torch.allclose(alone["image"][0], canvas["image"][i], atol=1e-5)
        assert torch.equal(alone["mask_image"][0], canvas["mask_image"][i])
    states = inpainting.statistics.states()
    masks = {prompt: sample[4] for prompt, sample in zip(states.prompts, states.samples, strict=True)}
    assert [bool((masks[i] == 1).all()) for i in range(4)] == [True, True, False, False]


def test_a_rectangle_lies_inside_and_differs_by_seed():
    found = [rectangle(40, 64, seed) for seed in range(50)]
    for mask in found:
        rows, columns = mask[0].amax(1).bool(), mask[0].amax(0).bool()
        assert 10 <= rows.sum() <= 30 and 16 <= columns.sum() <= 48
        assert mask.sum() == rows.sum() * columns.sum()
    assert len({tuple(mask.flatten().tolist()) for mask in found}) > 45


def test_an_inpainting_model_is_probed_refined_and_compared_on_the_same_pictures(inpainting):
    slim, plan = inpainting.compress(0.3, refine=True)
    assert all(entry.final_error is not None for entry in plan.entries)
    assert plan.refits["conv_out"] <= 1
    job = inpainting.statistics.recipe
    settings = Settings(job.prompts, job.negatives, job.steps, job.guidance_scale, job.height, job.width)
    other = families.PAINTERS[False, True].from_pipe(inpainting.pipe, unet=slim)
    same, _ = fidelity.compare(inpainting.pipe, inpainting.pipe, settings)
    found, _ = fidelity.compare(inpainting.pipe, other, settings)
    assert same.drift == (0.0,) * 4 and all(0 < drift < 1 for drift in found.drift)


def control(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {"controlnet": ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))}


@pytest.mark.parametrize(
    ("kind", "unet", "more"),
    [
        (StableDiffusionImg2ImgPipeline, "sd1", None),
        (StableDiffusionInpaintPipeline, "sd1", None),
        (StableDiffusionPAGPipeline, "sd1", None),
        (StableDiffusionControlNetPipeline, "sd1", control),
        (StableDiffusionXLImg2ImgPipeline, "sdxl", None),
    ],
)
def test_pipelines_of_other_use_are_calibrated_by_text_and_keep_their_class(tmp_path, kind, unet, more):
    text = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(**UNETS[unet]))
    parts = text.components | (more(text) if more else {})
    kind(**parts, **({} if unet == "sdxl" else {"requires_safety_checker": False})).save_pretrained(tmp_path / "tiny")
    found = source.find(str(tmp_path / "tiny"))
    pipe = pipeline.load(found)
    assert type(pipe) is type(text)
    ranks = {"mid_block.attentions.0.transformer_blocks.0.ff.ffn": 8}
    slim = checkpoint.SlimUNet2DConditionModel.from_config(pipe.unet.config, slim_ranks=ranks)
    checkpoint.write(tmp_path / "slim", slim, pipe, "{}", found.folder)
    again = checkpoint.load(tmp_path / "slim")
    assert type(again) is kind
    again.unet.half()  # as users keep SDXL's VAE in float32 beside it
    own = pipeline.painter(again)
    assert type(own) is type(text) and own.unet is again.unet and own.vae is again.vae
    assert (own.unet.dtype, own.vae.dtype) == (torch.float16, torch.float32)
    for option in ("requires_safety_checker", "force_zeros_for_empty_prompt"):
        assert own.config.get(option) == again.config.get(option)
    assert {name for name, part in again.components.items() if part is not None} == {
        name for name, part in parts.items() if part is not None
    }


def test_a_pipeline_without_a_part_that_painting_needs_is_refused(tmp_path):
    parts = tiny_pipeline(tmp_path).components | {"vae": None}
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ModelError, match="StableDiffusionImg2ImgPipeline without vae cannot paint"):
        pipeline.painter(pipe)


@pytest.mark.parametrize("unet", ["sd1", "sdxl"])
def test_an_empty_negative_prompt_is_none_at_all(tmp_path, unet):
    """As SDXL's pipeline is called by users, who give none: it takes zeros then, not the embedding of an empty text."""
    pipe = tiny_pipeline(tmp_path, tiny_unet(**UNETS[unet]))
    job = {"guidance_scale": 3.0, "height": 16, "width": 16}
    ours = pipeline.sample(pipe, pipeline.encode(pipe, WORDS[:2], ["", "dogs"]), [5, 6], steps=2, **job)
    for row, negative in enumerate(({}, {"negative_prompt": "dogs"})):
        seeded = torch.Generator().manual_seed(5 + row)
        stock = pipe(WORDS[row], **negative, generator=seeded, num_inference_steps=2, **job, output_type="latent")
        torch.testing.assert_close(ours[row : row + 1], stock.images, rtol=1e-4, atol=1e-4)


def test_another_scheduler_keeps_the_prediction_type(tmp_path):
    pipe = tiny_pipeline(tmp_path, prediction_type="v_prediction")
    for name in recipe.SCHEDULERS:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipeline.use_scheduler(pipe, name)
        assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_published_architectures_have_their_published_sizes_and_recipes():
    found = module_at(ROOT / "benchmarks/architectures.py", "architectures")
    for name, millions in (("bk-sdm-small", 482.3), ("ssd-1b", 1331.3)):
        assert sum(p.numel() for p in found.build(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    chosen = {
        name: families.family({"in_channels": 4, "out_channels": 4} | config) for name, config in found.CONFIGS.items()
    }
    assert chosen == {
        "sd15": "sd1", "sd15-inpainting": "sd1-inpainting", "bk-sdm-base": "sd1", "bk-sdm-small": "sd1",
        "bk-sdm-tiny": "sd1", "sd21-base": "sd2", "sd21": "sd2", "sd2-inpainting": "sd2-inpainting", "sdxl": "sdxl",
        "sdxl-inpainting": "sdxl-inpainting", "sdxl-refiner": "sdxl", "ssd-1b": "sdxl",
    }  # fmt: skip


UNET = ["diffusers", "UNet2DConditionModel"]
REFUSED = [
    ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}, {},
     "is a FluxPipeline around a FluxTransformer2DModel"),
    ({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}, {},
     "PixArtTransformer2DModel"),
    ({"_class_name": "StableCascadeDecoderPipeline", "decoder": ["diffusers", "StableCascadeUNet"]}, {},
     "StableCascadeUNet"),
    ({"_class_name": "StableVideoDiffusionPipeline", "unet": ["diffusers", "UNetSpatioTemporalConditionModel"]}, {},
     "UNetSpatioTemporalConditionModel"),
    ({"_class_name": "AudioPipeline", "vae": ["diffusers", "AutoencoderKL"]}, {}, "which has no UNet"),
    ({"_class_name": "StableDiffusionPipeline", "unet": ["slimdiff_unet", "SlimUNet2DConditionModel"]}, {},
     "a slim checkpoint already"),
    ({"_class_name": "StableDiffusionXLImg2ImgPipeline", "unet": UNET, "requires_aesthetics_score": True}, {},
     "an SDXL refiner"),
    ({"_class_name": "KandinskyV22Pipeline", "unet": UNET},
     {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}, "image_proj, addition_embed_type image"),
    ({"_class_name": "IFPipeline", "unet": UNET},
     {"in_channels": 3, "out_channels": 6, "down_block_types": ["SimpleCrossAttnDownBlock2D"]}, "in_channels 3"),
    ({"_class_name": "StableDiffusionUpscalePipeline", "unet": UNET}, {"in_channels": 7, "num_class_embeds": 1000},
     "num_class_embeds 1000, in_channels 7"),
    ({"_class_name": "StableUnCLIPPipeline", "unet": UNET}, {"class_embed_type": "projection"},
     "class_embed_type projection"),
]  # fmt: skip


@pytest.mark.parametrize(("index", "config", "said"), REFUSED, ids=[case[0]["_class_name"] for case in REFUSED])
def test_other_families_are_refused_by_name_before_their_weights_are_fetched(
    tmp_path, monkeypatch, index, config, said
):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet/config.json").write_text(json.dumps({"in_channels": 4, "out_channels": 4} | config))
    monkeypatch.setattr(source, "hf_hub_download", lambda model, name, revision: str(tmp_path / name))
    for reference in (str(tmp_path), "owner/name"):
        with pytest.raises(ModelError, match=said) as refused:
            source.find(reference)
        assert reference in str(refused.value) and "slim" in str(refused.value)


def test_a_lone_part_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(ModelError, match="a lone ControlNetModel, not a diffusers pipeline folder"):
        source.find(str(tmp_path))


def test_a_hub_id_is_found_in_the_cache_without_network(model_folder, tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("f" * 40)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / ("f" * 40)).symlink_to(model_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = source.find("owner/name")
    assert (found.reference, found.name) == ("owner/name", "name")
    assert type(pipeline.load(found)).__name__ == "StableDiffusionPipeline"
    with pytest.raises(ModelError, match="Cannot get owner/other from the hub"):
        source.find("owner/other")
