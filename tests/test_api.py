"""The functions of `import slimdiff`, on pipelines as users have them: loaded by diffusers, or made in memory."""

from __future__ import annotations

import subprocess
import sys
from copy import copy, deepcopy
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

import slimdiff
from slimdiff import pairs, timing
from slimdiff.errors import BudgetError, ModelError, OutputError, StatisticsError
from slimdiff.statistics import StatisticsFile

WORDS = ["cat", "red boat", "hill", "big owl"]
ONE_LEVEL = {
    "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
SIZE = {"steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def dense(model_folder) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def statistics(dense, tmp_path_factory) -> StatisticsFile:
    return slimdiff.calibrate(dense, WORDS, tmp_path_factory.mktemp("api") / "s.safetensors", **SIZE)


@pytest.fixture(scope="module")
def slim(dense, statistics) -> DiffusionPipeline:
    return slimdiff.compress(dense, statistics, 0.35, influence="local")


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "cat", num_inference_steps=2, height=16, width=16, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


def test_calibrate_says_what_it_ran_and_on_which_model(statistics, model_folder, dense):
    made = statistics.recipe
    assert made.prompts == tuple(WORDS) and made.negatives[::2] == ("", "") and all(made.negatives[1::2])
    assert (made.steps, made.guidance_scale, made.height, made.width, made.seed) == (2, 3.0, 16, 16, 0)
    assert statistics.done == 4 and statistics.model == str(model_folder)
    assert slimdiff.calibrate(dense, WORDS, statistics.path, **SIZE).digest() == statistics.digest()
    with pytest.raises(OutputError, match="another calibration"):
        slimdiff.calibrate(dense, WORDS[:2], statistics.path, **SIZE)


def test_the_pipeline_stays_as_it_was(model_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    unet, scheduler, before = pipe.unet, pipe.scheduler, draw(pipe)
    made = slimdiff.calibrate(pipe, WORDS[:2], tmp_path / "s.safetensors", scheduler="euler", **SIZE)
    slim = slimdiff.compress(pipe, made, influence="local")
    assert slim is not pipe and slim.vae is pipe.vae and slim.scheduler is scheduler
    assert pipe.unet is unet and pipe.scheduler is scheduler and torch.equal(draw(pipe), before)
    assert not torch.equal(draw(slim), before)


def test_a_pipeline_compiled_in_place_works_and_stays_compiled(tmp_path, monkeypatch):
    """Compiled code looks no more for hooks, which calibration and bench are made of."""
    monkeypatch.setattr(timing, "SHORTEST", 0.001)
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    pipe = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(**ONE_LEVEL))
    pipe.unet.compile(backend=backend, fullgraph=True)
    before, graphs = draw(pipe), len(compiled)
    found = slimdiff.calibrate(pipe, WORDS[:2], tmp_path / "s.safetensors", **SIZE)
    assert all(found.metadata["tokens"].values()) and found.states().prompts
    slim = slimdiff.compress(pipe, found, 0.35, influence="local")
    report = slimdiff.bench(pipe, slim, WORDS, num_prompts=1, batch_sizes=[1], repeats=1)
    assert len(report.fidelity.drift) == 1
    assert torch.equal(draw(pipe), before) and len(compiled) == graphs > 0, "what was compiled runs"


def test_compress_meets_the_budget_and_says_how(slim, dense):
    plan = slim.unet.plan
    sizes = [sum(p.numel() for p in pipe.unet.parameters()) for pipe in (dense, slim)]
    assert plan.achieved >= 0.35 and plan.unet_params == tuple(sizes) and sizes[1] < sizes[0]
    assert slim.unet.config["slim_ranks"] == plan.ranks()


def test_compress_refuses_what_it_cannot_do(dense, statistics, tmp_path):
    with pytest.raises(BudgetError, match="above 1"):
        slimdiff.compress(dense, statistics, speedup=0.9)
    with pytest.raises(StatisticsError, match="no statistics file"):
        slimdiff.compress(dense, tmp_path / "none")
    other = tiny_pipeline(tmp_path / "tokenizer", tiny_unet(seed=5))
    with pytest.raises(StatisticsError, match=r"another model.*a pipeline in memory"):
        slimdiff.compress(other, str(statistics.path))


def in_two_dtypes(folder: Path) -> list[DiffusionPipeline]:
    return [DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]


def test_what_is_stored_in_float16_is_one_model_in_bfloat16_and_float32(model_folder, tmp_path):
    DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float16).save_pretrained(tmp_path / "tiny")
    half, full = in_two_dtypes(tmp_path / "tiny")
    made = slimdiff.calibrate(half, WORDS[:2], tmp_path / "s.safetensors", **SIZE)
    assert slimdiff.compress(full, made, influence="local").unet.dtype == torch.float32


def test_what_is_stored_in_float32_is_another_model_in_bfloat16(model_folder, tmp_path):
    """diffusers rounds it to bfloat16 at once. That works, and who mixes the two up is told."""
    half, full = in_two_dtypes(model_folder)
    made = slimdiff.calibrate(half, WORDS[:2], tmp_path / "s.safetensors", **SIZE)
    slim = slimdiff.compress(half, made, probe_prompts=1, probe_steps=1)
    assert {p.dtype for p in slim.unet.parameters()} == {torch.bfloat16}
    with pytest.raises(StatisticsError, match=r"another model.*bfloat16"):
        slimdiff.compress(full, made)
    with pytest.raises(ModelError, match=r"made from.*bfloat16"):
        slimdiff.bench(full, slim)


def test_what_is_saved_loads_as_it_was_with_its_plan(slim, tmp_path):
    slimdiff.save(slim, tmp_path / "slim")
    again = slimdiff.load(tmp_path / "slim")
    assert torch.equal(draw(again), draw(slim)) and again.unet.plan.to_json() == slim.unet.plan.to_json()
    with pytest.raises(OutputError, match="exists"):
        slimdiff.save(again, tmp_path / "slim")
    slimdiff.save(again, tmp_path / "slim", force=True)


def test_saving_casts_nothing(slim, tmp_path):
    """A VAE may be kept in float32 beside a UNet in half precision, and it is the dense pipeline's too."""
    half = copy(slim)
    half.unet = deepcopy(slim.unet).to(torch.bfloat16)
    slimdiff.save(half, tmp_path / "slim")
    found = {}
    for part in ("unet", "vae"):
        [file] = (tmp_path / "slim" / part).glob("*.safetensors")
        found[part] = {tensor.dtype for name, tensor in load_file(file).items() if not name.endswith("slim_kept")}
    assert found == {"unet": {torch.bfloat16}, "vae": {torch.float32}}
    assert slim.vae.dtype == torch.float32


def test_load_gives_one_dtype_whatever_is_stored(slim, tmp_path):
    """transformers 5 would keep text encoders as they are stored, beside a UNet in float32."""
    slimdiff.save(slim, tmp_path / "slim")
    [file] = (tmp_path / "slim/text_encoder").glob("*.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    again = slimdiff.load(tmp_path / "slim")
    assert again.text_encoder.dtype == again.unet.dtype == again.vae.dtype == torch.float32
    draw(again)


def test_a_pipeline_without_a_plan_is_refused(dense, slim, tmp_path):
    slim.save_pretrained(tmp_path / "again")
    for pipe in (dense, slimdiff.load(tmp_path / "again")):
        with pytest.raises(ModelError, match="has no plan"):
            slimdiff.save(pipe, tmp_path / "slim")


def test_bench_measures_a_loaded_pair(dense, slim, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.001)
    report = slimdiff.bench(dense, slim, WORDS, num_prompts=2, batch_sizes=[1], repeats=2)
    assert report.plan == slim.unet.plan and len(report.fidelity.drift) == 2
    assert report.settings.steps == 2 and report.settings.guidance_scale == 3.0
    assert report.size.parameters == slim.unet.plan.unet_params and report.size.checkpoint is None
    assert "on disk" not in report.table() and "weights in memory" in report.table()


def test_neither_of_a_pair_checks_pictures(dense, statistics, model_folder, tmp_path):
    """A checker that stayed in one of them would be timed, and blacken its pictures."""
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        projection_dim=4, text_config={"num_hidden_layers": 0},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    ))  # fmt: skip
    parts = dense.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessor()}
    slim = slimdiff.compress(StableDiffusionPipeline(**parts), statistics, influence="local")
    slimdiff.save(slim, tmp_path / "slim")
    assert slim.safety_checker is checker and slimdiff.load(tmp_path / "slim").safety_checker is not None
    *pipes, _ = pairs.load(tmp_path / "slim", slim.unet.plan, str(model_folder), device="cpu")
    assert all(pipe.safety_checker is None for pipe in pipes)


def test_bench_refuses_another_dense_model(slim, tmp_path):
    with pytest.raises(ModelError, match="a pipeline in memory"):
        slimdiff.bench(tiny_pipeline(tmp_path, tiny_unet(seed=5)), slim)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    script = Path(__file__).parent.parent / "examples/quickstart.py"
    done = subprocess.run([sys.executable, script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "achieved 35" in done.stdout and "as fast" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"slim", "statistics.safetensors", "picture.png"}
    assert len(script.read_text().splitlines()) < 40
