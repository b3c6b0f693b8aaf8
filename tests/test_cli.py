"""The command line: every mistake gets one paragraph and an exit code, and nothing half-written stays behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from slimdiff import timing
from slimdiff.cli import main
from slimdiff.statistics import StatisticsFile

QUICK = ["--num-prompts", "2", "--steps", "2", "--device", "cpu"]


def run(*arguments: object, code: int = 0) -> str:
    """Everything a command printed; its exit code must be `code`, and no traceback may get out."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def statistics(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    run("calibrate", model_folder, *QUICK, "-o", path)
    return path


def compress(statistics: Path, *more: object, code: int = 0) -> str:
    return run("compress", statistics, "--influence", "local", "--device", "cpu", *more, code=code)


def test_the_three_commands_chain(here, model_folder):
    assert "2 prompts" in run("calibrate", model_folder, *QUICK)
    assert "already holds" in run("calibrate", model_folder, *QUICK)
    out = run("compress", "--budget", "0.35", "--probe-prompts", 1, "--probe-steps", 1, "--device", "cpu")
    assert "statistics: slimdiff-out/tiny/statistics.safetensors" in out and "achieved 35" in out
    out = run("bench", "--num-prompts", 2, "--repeats", 3, "--batch-sizes", 1, "--device", "cpu")
    assert "slim checkpoint: slimdiff-out/tiny/slim-0.35" in out
    assert "report: slimdiff-out/tiny/bench-0.35/report.html\n" in out
    assert "pictures: slimdiff-out/tiny/bench-0.35/pictures.png\n" in out
    assert {p.name for p in (here / "slimdiff-out/tiny/bench-0.35").iterdir()} == {
        "pictures.png", "report.html", "report.json",
    }  # fmt: skip


def test_budget_zero_writes_a_model_that_paints_the_same(statistics, model_folder, tmp_path):
    compress(statistics, "--budget", 0, "-o", tmp_path / "same")
    arguments = {"prompt": "cat", "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    from slimdiff import load

    pictures = []
    for pipe in (DiffusionPipeline.from_pretrained(model_folder), load(tmp_path / "same")):
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images)
    assert torch.equal(*pictures)


def test_dry_run_prints_the_plan_and_writes_nothing(statistics):
    before = sorted(statistics.parent.iterdir())
    out = compress(statistics, "--dry-run")
    assert out.count("warning: the statistics come from 2 prompts.") == 1
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.qk" in out and "achieved" in out
    assert sorted(statistics.parent.iterdir()) == before


def test_a_safetensors_file_that_is_no_model(here):
    save_file({"x": torch.zeros(1)}, here / "strange.safetensors")
    assert "strange.safetensors" in run("calibrate", here / "strange.safetensors", *QUICK, code=1)
    assert not (here / "slimdiff-out").exists()


def test_missing_and_empty_prompt_files(here, model_folder):
    out = run("calibrate", model_folder, "--prompts", "none.txt", code=1)
    assert "none.txt" in out and "--prompts" in out
    Path("empty.txt").write_text("\n\n")
    assert "holds no prompt" in run("calibrate", model_folder, "--prompts", "empty.txt", code=1)


def test_not_a_diffusers_folder(here):
    Path("pictures").mkdir()
    assert "model_index.json" in run("calibrate", "pictures", code=1)
    assert "no file or folder" in run("calibrate", "./nowhere", code=1)


def test_pickles_are_refused_unread(here, model_folder):
    Path("model.ckpt").write_bytes(b"anything")
    assert "pickle" in run("calibrate", "model.ckpt", code=1)
    shutil.copytree(model_folder, "bin")
    weights = Path("bin/unet/diffusion_pytorch_model.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    out = run("calibrate", "bin", code=1)
    assert "only pickles" in out and "safe_serialization=True" in out


def test_a_unet_without_supported_blocks(here):
    plain = tiny_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    tiny_pipeline(here / "tokenizer", plain).save_pretrained("plain")
    assert "nothing to compress" in run("calibrate", "plain", *QUICK, code=1)


def test_bfloat16_all_the_way(here, model_folder, statistics, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.001)
    in_bfloat16 = ("--device", "cpu", "--dtype", "bfloat16")
    run("calibrate", model_folder, "--num-prompts", 2, "--steps", 2, *in_bfloat16, "-o", "s.safetensors")
    assert StatisticsFile(Path("s.safetensors")).fingerprint == StatisticsFile(statistics).fingerprint
    compress("s.safetensors", "--budget", 0, "--dtype", "bfloat16")
    weights = load_file("slim-0/unet/diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].dtype == torch.bfloat16
    quick = ("--num-prompts", 1, "--steps", 1, "--repeats", 3, "--batch-sizes", 1)
    run("bench", "slim-0", *quick, *in_bfloat16, "-o", "report")
    report = json.loads(Path("report/report.json").read_text())
    assert report["provenance"]["precision"] == "bfloat16" and report["fidelity"]["drift"]["worst"] == 0


def test_nan_weights(here, model_folder):
    shutil.copytree(model_folder, "broken")
    path = "broken/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    out = run("calibrate", "broken", *QUICK, code=1)
    assert "conv_in.weight" in out and "NaN" in out


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_statistics(here, statistics, damage):
    data = bytearray(statistics.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    Path("s.safetensors").write_bytes(data[:-100] if damage == "truncated" else data)
    assert "damaged" in compress(Path("s.safetensors"), code=1)
    assert [p.name for p in here.iterdir()] == ["s.safetensors"]


def test_statistics_of_another_model(here, statistics):
    tiny_pipeline(here / "tokenizer", tiny_unet(seed=8)).save_pretrained("other")
    out = compress(statistics, "--model", "other", code=1)
    assert "another model" in out and "Calibrate this model" in out


@pytest.mark.parametrize("budget", ["-0.1", "1", "1.2", "much", "nan"])
def test_budgets_that_are_no_share_are_usage_errors(statistics, budget):
    out = compress(statistics, "--budget", budget, code=2)
    assert f"'{budget}' is not a share" in out and "0.35" in out


def test_an_impossible_budget_shows_the_arithmetic(statistics, tmp_path):
    out = compress(statistics, "--budget", 0.8, "--budget-of", "unet", "-o", tmp_path / "slim", code=1)
    assert "80.0% of the UNet's" in out and "The most for this model is --budget" in out
    assert not (tmp_path / "slim").exists()


def test_existing_output_needs_force(statistics, tmp_path):
    compress(statistics, "-o", tmp_path / "slim")
    before = (tmp_path / "slim/slimdiff/plan.json").read_text()
    assert "--force" in compress(statistics, "--budget", 0.2, "-o", tmp_path / "slim", code=1)
    assert (tmp_path / "slim/slimdiff/plan.json").read_text() == before
    compress(statistics, "--budget", 0.2, "--force", "-o", tmp_path / "slim")
    assert (tmp_path / "slim/slimdiff/plan.json").read_text() != before


@pytest.mark.parametrize("command", ["calibrate", "bench", "eval", "profile"])
@pytest.mark.parametrize("option", ["--height", "--width"])
def test_sizes_that_cannot_be_painted_are_usage_errors(here, command, option):
    for size in ("50", "0", "-8", "wide"):
        out = run(command, option, size, code=2)
        assert f"'{size}' is not a side" in out and "a multiple of 8 pixels" in out


def test_what_is_no_number_is_called_so(here):
    assert "'abc' is not a valid integer." in run("calibrate", "--steps", "abc", code=2)
    assert "'abc' is not a valid number." in run("compress", "--min-width", "abc", code=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_several_budgets_give_what_each_gives_alone_and_solve_once(statistics, tmp_path, monkeypatch):
    from slimdiff.methods import Method

    solved = []
    curve = Method.curve
    monkeypatch.setattr(Method, "curve", lambda self, on: solved.append(on.group.name) or curve(self, on))
    probing = ["--probe-prompts", 1, "--probe-steps", 1, "--device", "cpu"]
    out = run("compress", statistics, "--budget", "0.45, 0", *probing, "-o", tmp_path / "all")
    assert len(solved) == len(set(solved)) > 0
    assert out.count("achieved") == 2 and out.count("slim checkpoint,") == 2
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"slim-0.45", "slim-0"}
    for budget in ("0.45", "0"):
        run("compress", statistics, "--budget", budget, *probing, "-o", tmp_path / budget)
        assert contents(tmp_path / budget) == contents(tmp_path / f"all/slim-{budget}")


def test_several_budgets_are_checked_before_any_is_begun(statistics, tmp_path):
    compress(statistics, "--budget", 0.2, "-o", tmp_path / "all/slim-0.2")
    before = contents(tmp_path)
    out = compress(statistics, "--budget", "0.1,0.2", "-o", tmp_path / "all", code=1)
    assert "slim-0.2 exists" in out and "--force" in out
    out = compress(statistics, "--budget", "0.1,0.3", "-o", tmp_path / "all/slim-0.2", code=1)
    assert "is a slim checkpoint" in out and "several budgets" in out
    (tmp_path / "file").write_text("")
    assert "is a file" in compress(statistics, "--budget", "0.1,0.3", "-o", tmp_path / "file", code=1)
    (tmp_path / "file").unlink()
    out = compress(statistics, "--budget", "0.1,0.99", "-o", tmp_path / "new", code=1)
    assert "The most for this model is --budget" in out
    assert "0.1 is there twice" in compress(statistics, "--budget", "0.1,0.10", code=2)
    assert "'x' is not a share" in compress(statistics, "--budget", "0.1,x", code=2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["calibrate", "compress", "bench", "eval", "profile", "prompts", "merge"])
def test_unwritable_outputs_are_found_before_the_work(statistics, model_folder, here, monkeypatch, command):
    """No model is even loaded; nothing is left behind."""
    for function in ("slimdiff.pipeline.load", "slimdiff.pipeline.load_text", "slimdiff.pairs.load"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("a model is loaded"))
    Path("file").write_text("a cat")
    Path("p.txt").write_text("a cat")
    arguments = {
        "calibrate": [model_folder], "compress": [statistics], "bench": [], "eval": [],
        "profile": [model_folder], "prompts": ["--from", "p.txt", "--select", 1], "merge": [statistics],
    }[command]  # fmt: skip
    if command in ("bench", "eval"):
        monkeypatch.setattr("slimdiff.outputs.newest_slim", lambda: here / "slim")
        made = {"family": "demo", "steps": 2, "guidance_scale": 4, "height": 48, "width": 48}
        plan = SimpleNamespace(provenance={"recipe": made})
        monkeypatch.setattr("slimdiff.checkpoint.plan_of", lambda path: plan)
    before = contents(here)
    out = run(command, *arguments, "-o", "file/out/a.txt", code=1)
    assert "Cannot write file/out/a.txt" in out and "-o" in out
    assert contents(here) == before


def test_an_output_that_is_a_folder(model_folder, here):
    assert "is a folder, and -o names a file" in run("calibrate", model_folder, *QUICK, "-o", here, code=1)


def test_a_full_disk_leaves_nothing(statistics, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimdiff.checkpoint.shutil.copyfile", full)
    monkeypatch.setattr("slimdiff.checkpoint.shutil.copy2", full)
    monkeypatch.setattr("slimdiff.slim_unet.SlimUNet2DConditionModel.save_pretrained", full)
    assert "No space left" in compress(statistics, "-o", tmp_path / "slim", code=1)
    assert list(tmp_path.iterdir()) == []


def test_cuda_where_there_is_none(model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in run("calibrate", model_folder, "--device", "cuda", code=1)


@pytest.mark.parametrize("name", ["calibrate", "compress", "bench", "eval", "profile", "prompts"])
def test_advice_where_the_gpu_is_out_of_memory_names_options_that_are_there(monkeypatch, here, name):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    for function in ("source.find", "statistics.StatisticsFile.__init__", "outputs.newest_slim", "recipe.read_prompts"):
        monkeypatch.setattr(f"slimdiff.{function}", full)
    more = {"compress": ["s.safetensors"], "prompts": ["--from", "p.txt", "-o", "q.txt"]}.get(name, [])
    out = run(name, *more, code=1)
    options = set(re.findall(r"--[a-z-]+", out))
    assert "out of memory" in out and "--device" in options
    assert options <= {option for parameter in main.commands[name].params for option in parameter.opts}
    assert ("--probe-prompts" in options) == (name == "compress")


def test_nothing_to_pick_up(here):
    assert "slimdiff calibrate" in run("compress", code=1)
    assert "slimdiff compress" in run("bench", code=1)


def test_bench_of_a_folder_that_is_not_slim(model_folder, here):
    assert "slim" in run("bench", model_folder, code=1)


def test_paths_of_another_kind_are_named_with_the_right_one(statistics, tmp_path):
    shutil.copy(statistics, tmp_path / "statistics.safetensors")
    compress(tmp_path / "statistics.safetensors")
    for folder in (tmp_path, tmp_path / "slim-0.35"):
        out = compress(folder, code=1)
        assert f"{folder} is a folder" in out and f"Pass {tmp_path / 'statistics.safetensors'}." in out
    for command in ("bench", "inspect"):
        out = run(command, tmp_path, code=1)
        assert "is not a slim checkpoint" in out and f"pass {tmp_path / 'slim-0.35'}." in out
    (tmp_path / "empty").mkdir()
    assert "calibrate" in compress(tmp_path / "empty", code=1)
    assert "holds none" in run("inspect", tmp_path / "empty", code=1)
    assert f"no file or folder {tmp_path / 'nothing'}" in run("inspect", tmp_path / "nothing", code=1)


def test_damaged_checkpoints_are_named_with_a_remedy(statistics, tmp_path, here):
    compress(statistics, "-o", tmp_path / "slim")
    weights, plan = tmp_path / "slim/unet/diffusion_pytorch_model.safetensors", tmp_path / "slim/slimdiff/plan.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = run("lora", "any.safetensors", "--model", tmp_path / "slim", "-o", "out.safetensors", code=1)
    assert str(tmp_path / "slim") in out and "Copy the checkpoint anew" in out
    plan.write_text(plan.read_text()[:-100])
    for command, path in (("inspect", tmp_path / "slim"), ("inspect", plan), ("bench", tmp_path / "slim")):
        out = run(command, path, code=1)
        assert f"{plan} is not a plan" in out and "compress again" in out


def test_the_list_of_commands_is_not_cut_short():
    listed = run("--help").partition("Commands:")[2]
    assert "..." not in listed and all(name in listed for name in main.commands)


def test_every_option_has_help():
    for command in main.commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, (command.name, parameter.name)


def test_help_is_instant_and_loads_no_torch():
    code = "import sys; from slimdiff.cli import main; main(['--help'], standalone_mode=False)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 5  # half a second on an idle machine
