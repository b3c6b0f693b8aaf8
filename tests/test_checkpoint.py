"""The slim checkpoint: loads without slimdiff, is complete or absent, copies what did not change, refuses the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slimdiff import checkpoint
from slimdiff.errors import ModelError, OutputError, SlimdiffError
from slimdiff.slim_unet import SlimUNet2DConditionModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
RANKS = {f"{BLOCK}.attn1.qk": 4, f"{BLOCK}.attn1.vo": 4, f"{BLOCK}.attn2.qk": 3, f"{BLOCK}.ff.ffn": 24}
PLAN = '{"ranks": "all of them"}'


def make_slim(dense: UNet2DConditionModel) -> SlimUNet2DConditionModel:
    torch.manual_seed(1)
    return SlimUNet2DConditionModel.from_config(dense.config, slim_ranks=RANKS).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The folder of a tiny dense pipeline."""
    folder = tmp_path_factory.mktemp("source")
    tiny_pipeline(folder).save_pretrained(folder / "dense")
    return folder / "dense"


@pytest.fixture(scope="module")
def dense(source) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(source)


@pytest.fixture(scope="module")
def slim(dense) -> SlimUNet2DConditionModel:
    return make_slim(dense.unet)


@pytest.fixture(scope="module")
def written(tmp_path_factory, source, dense, slim) -> Path:
    """A slim checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "slim"
    checkpoint.write(folder, slim, dense, PLAN, source)
    return folder


def with_unet(pipe: DiffusionPipeline, unet: UNet2DConditionModel) -> DiffusionPipeline:
    return StableDiffusionPipeline(**(pipe.components | {"unet": unet}), requires_safety_checker=False)


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    return pipe("a c", num_inference_steps=2, generator=generator, output_type="latent").images


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WITHOUT_SLIMDIFF = """
import sys
sys.modules["slimdiff"] = None

import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file

folder, again, results, threads = sys.argv[1:]
torch.set_num_threads(int(threads))

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    return pipe("a c", num_inference_steps=2, generator=generator, output_type="latent").images

first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
drawn = {"loaded": draw(first)}
first.save_pretrained(again)
second = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
drawn["saved again"] = draw(second)
second.unet = AutoModel.from_pretrained(again + "/unet", trust_remote_code=True)
drawn["AutoModel"] = draw(second)
passed = AutoModel.from_pretrained(folder + "/unet", trust_remote_code=True)
drawn["passed"] = draw(DiffusionPipeline.from_pretrained(again, unet=passed))
first.unet.set_attn_processor(first.unet.attn_processors)
first.unet.set_attn_processor(AttnProcessor2_0())
drawn["first, after the others"] = draw(first)
second.save_pretrained(again)
drawn["saved over itself"] = draw(DiffusionPipeline.from_pretrained(again, trust_remote_code=True))
assert not [name for name in sys.modules if name.startswith("slimdiff.")]
save_file(drawn, results)
"""


def test_loads_without_slimdiff_again_and_again(tmp_path, written, dense, slim):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(written), str(tmp_path / "again"), str(tmp_path / "drawn"), str(torch.get_num_threads())]
    command = [sys.executable, "-c", WITHOUT_SLIMDIFF, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = draw(with_unet(dense, slim))
    assert (expected - draw(dense)).abs().max() > 1e-3
    drawn = load_file(tmp_path / "drawn")
    assert len(drawn) == 6
    assert [name for name, images in drawn.items() if not torch.equal(images, expected)] == []
    assert torch.equal(draw(checkpoint.load(tmp_path / "again")), expected)
    assert checkpoint.is_slim(tmp_path / "again")
    with pytest.raises(ModelError, match=r"its plan cannot be read.*copy it over"):
        checkpoint.read_plan(tmp_path / "again")


def test_load_runs_no_code_from_the_checkpoint(tmp_path, written, dense, slim):
    folder = shutil.copytree(written, tmp_path / "slim")
    (folder / "unet" / "slimdiff_unet.py").write_text("raise SystemExit('this ran')")
    for path in (folder, str(folder)):
        pipe = checkpoint.load(path)
        assert type(pipe.unet) is SlimUNet2DConditionModel
        assert torch.equal(draw(pipe), draw(with_unet(dense, slim)))
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        checkpoint.load(folder)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("asked", "unet", "vae"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ({"unet": torch.bfloat16, "default": torch.float32}, torch.bfloat16, torch.float32),
        ({"vae": torch.float32, "default": torch.bfloat16}, torch.bfloat16, torch.float32),
        (None, torch.float32, torch.float32),
    ],
)
def test_load_passes_the_type_on(written, asked, unet, vae):
    pipe = checkpoint.load(written, torch_dtype=asked, safety_checker=None)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (unet, vae)


def test_load_passes_variant_and_place_on(tmp_path, written, source, dense, slim):
    checkpoint.load(written, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16", variant="bf16")
    pipe = checkpoint.load(tmp_path / "bf16", variant="bf16", dtype=torch.float32, device_map="cpu")
    for name, tensor in slim.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor.bfloat16().float()), name
    assert pipe.unet.hf_device_map == pipe.vae.hf_device_map
    (tmp_path / "bf16/vae/diffusion_pytorch_model.bf16.safetensors").rename(
        tmp_path / "bf16/vae/diffusion_pytorch_model.safetensors"
    )
    checkpoint.load(tmp_path / "bf16", variant="bf16")
    shutil.copytree(written / "unet", tmp_path / "bf16/unet", dirs_exist_ok=True)
    (tmp_path / "bf16/unet/diffusion_pytorch_model.bf16.safetensors").unlink()
    assert draw(checkpoint.load(tmp_path / "bf16", variant="bf16")).isfinite().all()


@pytest.mark.parametrize("given", [{"device_map": "balanced"}, {"quantization_config": object()}])
def test_load_refuses_what_would_pass_the_unet_by(written, given):
    with pytest.raises(SlimdiffError, match=r"do not reach a UNet.*trust_remote_code=True"):
        checkpoint.load(written, **given)


def test_a_plain_load_paints_also_where_text_encoders_are_stored_in_half_precision(tmp_path, source, slim):
    dense = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16)
    dense.save_pretrained(tmp_path / "half")
    wanted = (tmp_path / "half/text_encoder/model.safetensors").read_bytes()
    checkpoint.write(tmp_path / "slim", slim, dense, PLAN, tmp_path / "half")
    assert (tmp_path / "slim/text_encoder/model.safetensors").read_bytes() == wanted
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float32}
    assert draw(pipe).isfinite().all()


def test_everything_but_the_unet_is_copied_byte_by_byte(source, written):
    assert tree(written) == (tree(source) | {"README.md", "slimdiff/plan.json", "unet/slimdiff_unet.py"})
    copied = [name for name in tree(source) if not name.startswith("unet/") and name != "model_index.json"]
    assert len(copied) >= 7
    assert [name for name in copied if (written / name).read_bytes() != (source / name).read_bytes()] == []
    index, dense_index = (json.loads((folder / "model_index.json").read_text()) for folder in (written, source))
    assert index.pop("unet") == ["slimdiff_unet", "SlimUNet2DConditionModel"]
    dense_index.pop("unet")
    assert index == dense_index
    assert checkpoint.read_plan(written) == PLAN


def test_what_is_written_names_no_local_path_and_is_readable_by_all(source, written):
    texts = {file: file.read_text() for file in written.rglob("*") if file.suffix in {".json", ".md", ".py"}}
    assert len(texts) >= 8
    local = (str(source.parent), str(written.parent))
    assert [file for file, text in texts.items() if any(path in text for path in local)] == []
    assert "trust_remote_code=True" in (written / "README.md").read_text()
    modes = {file.stat().st_mode & 0o777 for file in written.rglob("*") if file.is_file()}
    assert modes == {(written / "README.md").stat().st_mode & 0o777}


def rewrite(file: Path, target: Path, scale: float) -> None:
    save_file({name: tensor * scale for name, tensor in load_file(file).items()}, target, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("sharded", ["whole", "sharded", "sharded, old names"])
def test_the_variant_in_use_is_copied_under_plain_names(tmp_path, source, slim, variant, sharded):
    folder = shutil.copytree(source, tmp_path / "dense")
    rewrite(folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "model.fp16.safetensors", 2)
    pipe = DiffusionPipeline.from_pretrained(source)
    for scale, name in ((1, None), (2, "fp16")):
        vae = AutoencoderKL.from_pretrained(source / "vae")
        for parameter in vae.parameters():
            parameter.data *= scale
        vae.save_pretrained(folder / "vae", variant=name, max_shard_size="40KB" if sharded != "whole" else "1GB")
    if sharded != "whole":
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    if sharded == "sharded, old names":
        index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.fp16.json"
        text = index.read_text()
        for file in list((folder / "vae").glob("*.fp16-*")):
            renamed = file.name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            text = text.replace(file.name, renamed)
            file.rename(file.with_name(renamed))
        index.with_name("diffusion_pytorch_model.safetensors.fp16.index.json").write_text(text)
        index.unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "flax_model.msgpack", "pytorch_model.bin.index.json", "weights.pt"):
        (folder / "text_encoder" / name).write_text("a pickle")
    (folder / "LICENSE.md").write_text("free")

    checkpoint.write(tmp_path / "slim", slim, pipe, PLAN, folder, variant=variant)

    files = tree(tmp_path / "slim")
    assert [name for name in files if "fp16" in name] == []
    assert [name for name in files if b"a pickle" in (tmp_path / "slim" / name).read_bytes()] == []
    assert "LICENSE.md" in files
    assert len([name for name in files if name.startswith("vae/diff")]) == (1 if sharded == "whole" else 3)
    loaded = checkpoint.load(tmp_path / "slim")
    scale = 2 if variant else 1
    for part in ("vae", "text_encoder"):
        expected = {name: scale * tensor for name, tensor in getattr(pipe, part).state_dict().items()}
        torch.testing.assert_close(getattr(loaded, part).state_dict(), expected, rtol=0, atol=0)


def test_a_variant_that_a_component_lacks_falls_back_to_its_plain_weights(tmp_path, source, dense, slim):
    checkpoint.write(tmp_path / "slim", slim, dense, PLAN, source, variant="fp16")
    assert tree(tmp_path / "slim") == tree(source) | {"README.md", "slimdiff/plan.json", "unet/slimdiff_unet.py"}


def test_a_component_with_pickles_only_is_refused(tmp_path, source, dense, slim):
    folder = shutil.copytree(source, tmp_path / "dense")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"text_encoder has no safetensors.*found: .*pytorch_model\.bin.*pickles"):
        checkpoint.write(tmp_path / "slim", slim, dense, PLAN, folder)
    weights.with_name("pytorch_model.bin").rename(weights.with_name("model.fp16.safetensors"))
    with pytest.raises(ModelError, match=r"found: .*model.fp16.safetensors.*name the variant in use"):
        checkpoint.write(tmp_path / "slim", slim, dense, PLAN, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_source_that_lacks_a_component_is_refused(tmp_path, source, dense, slim):
    folder = shutil.copytree(source, tmp_path / "dense")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="lacks tokenizer"):
        checkpoint.write(tmp_path / "slim", slim, dense, PLAN, folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match="not a complete pipeline folder"):
        checkpoint.write(tmp_path / "slim", slim, dense, PLAN, folder)


def test_a_component_the_pipeline_replaced_is_that_of_the_source(tmp_path, source, dense, slim):
    pipe = with_unet(dense, dense.unet)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    checkpoint.write(tmp_path / "slim", slim, pipe, PLAN, source)
    assert isinstance(checkpoint.load(tmp_path / "slim").scheduler, DDIMScheduler)


def test_a_component_the_pipeline_dropped_is_left_out(tmp_path, source, dense, slim):
    folder = shutil.copytree(source, tmp_path / "dense")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    checkpoint.write(tmp_path / "slim", slim, dense, PLAN, folder)
    assert not (tmp_path / "slim" / "safety_checker").exists()
    assert checkpoint.load(tmp_path / "slim").safety_checker is None


def test_without_a_source_the_components_are_saved(tmp_path, source, dense, slim):
    checkpoint.write(tmp_path / "slim", slim, dense, PLAN, source=None)
    assert tree(tmp_path / "slim") == tree(source) | {"README.md", "slimdiff/plan.json", "unet/slimdiff_unet.py"}
    loaded = checkpoint.load(tmp_path / "slim")
    assert torch.equal(draw(loaded), draw(with_unet(dense, slim)))


def test_a_sharded_unet_loads(tmp_path, written, slim):
    folder = shutil.copytree(written, tmp_path / "slim")
    size = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert checkpoint.size_in_bytes(folder) == size
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no UNet weights"):
        checkpoint.size_in_bytes(folder)
    slim.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    assert checkpoint.size_in_bytes(folder) == sum(file.stat().st_size for file in (folder / "unet").glob("*-of-*"))
    torch.testing.assert_close(checkpoint.load(folder).unet.state_dict(), slim.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("there", ["file", "empty folder", "other folder", "dense pipeline"])
def test_force_replaces_nothing_but_slim_checkpoints(tmp_path, source, dense, slim, there):
    target = tmp_path / "target"
    if there == "file":
        target.write_text("mine")
    elif there == "dense pipeline":
        shutil.copytree(source, target)
    else:
        target.mkdir()
    if there == "other folder":
        (target / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"exists\. Choose another folder, or pass --force"):
        checkpoint.write(target, slim, dense, PLAN, source)
    with pytest.raises(OutputError, match=r"is not a slim checkpoint.*so --force does not replace it"):
        checkpoint.write(target, slim, dense, PLAN, source, force=True)
    assert tree(tmp_path) == before
    assert target.exists()


@pytest.mark.parametrize("linked", [False, True])
def test_force_replaces_a_slim_checkpoint(tmp_path, source, dense, slim, written, linked):
    target = shutil.copytree(written, tmp_path / "slim")
    (target / "old.txt").write_text("old")
    output = target
    if linked:
        output = tmp_path / "link"
        output.symlink_to(target)
    with pytest.raises(OutputError, match="--force"):
        checkpoint.write(output, slim, dense, "new plan", source)
    assert checkpoint.read_plan(output) == PLAN
    checkpoint.write(output, slim, dense, "new plan", source, force=True)
    assert checkpoint.read_plan(output) == "new plan"
    assert output.is_symlink() == linked
    assert tree(target) == tree(written)
    assert {path.name for path in tmp_path.iterdir()} == {"slim", output.name}


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "replacing"])
@pytest.mark.parametrize(
    ("failure", "seen", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "cannot be written.*No space left"),
        (SafetensorError("I/O error: No space left"), OutputError, "cannot be written.*No space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (ZeroDivisionError(), ZeroDivisionError, None),
    ],
    ids=["disk full", "disk full in safetensors", "Ctrl-C", "bug"],
)
@pytest.mark.parametrize("moment", ["weights", "rename"])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path, monkeypatch, source, dense, slim, written, old, failure, seen, text, moment
):
    target = tmp_path / "slim"
    if old:
        shutil.copytree(written, target)
    before = tree(tmp_path)
    happened = []

    def weights(folder, **_):
        (Path(folder)).mkdir()
        (Path(folder) / "half.safetensors").write_text("half")
        happened.append(folder)
        raise failure

    rename = Path.rename

    def renaming(path, to):
        if path.suffix == ".partial":
            happened.append(path)
            raise failure
        return rename(path, to)

    if moment == "weights":
        monkeypatch.setattr(slim, "save_pretrained", weights)
    else:
        monkeypatch.setattr(Path, "rename", renaming)
    with pytest.raises(seen, match=text):
        checkpoint.write(target, slim, dense, "new plan", source, force=old)
    assert len(happened) == 1
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["slim"] if old else [])
    if old:
        assert checkpoint.read_plan(target) == PLAN


def test_a_place_that_cannot_be_written(tmp_path, source, dense, slim):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"Cannot write \S*file/slim: Not a directory"):
        checkpoint.write(tmp_path / "file" / "slim", slim, dense, PLAN, source)


def test_missing_parents_are_made(tmp_path, source, dense, slim):
    checkpoint.write(tmp_path / "a" / "b", slim, dense, PLAN, source)
    assert checkpoint.is_slim(tmp_path / "a" / "b")


def test_what_is_no_slim_checkpoint_is_refused_with_advice(tmp_path, source, written):
    def broken(name: str, file: str, text: str) -> Path:
        folder = shutil.copytree(written, tmp_path / name)
        (folder / file).write_text(text)
        return folder

    newer = json.loads((written / "unet" / "config.json").read_text()) | {"slim_format": 2}
    stranger = newer | {"slim_format": 1, "slim_ranks": {"nowhere.qk": 1}}
    wrong = newer | {"slim_format": 1, "slim_ranks": RANKS | {f"{BLOCK}.ff.ffn": 23}}
    cases = {
        tmp_path / "absent": "is not a folder.*Hub loads with",
        tmp_path: "not a slim checkpoint.*no model_index.json",
        source: "is not a slim checkpoint: its UNet is a UNet2DConditionModel. Load it with DiffusionPipeline",
        broken("json", "unet/config.json", "{"): "not a complete pipeline folder",
        broken("list", "model_index.json", "[]"): "not a complete pipeline folder.*does not hold a JSON object",
        broken("newer", "unet/config.json", json.dumps(newer)): "slim format 2.*up to 1.*Upgrade slimdiff",
        broken("stranger", "unet/config.json", json.dumps(stranger)): "cannot be loaded.*no such group",
        broken("wrong", "unet/config.json", json.dumps(wrong)): r"(?s)cannot be loaded.*ff\.net",
        broken("damaged", "unet/diffusion_pytorch_model.safetensors", "x"): "UNet in .* cannot be loaded",
    }
    for path, text in cases.items():
        with pytest.raises(ModelError, match=text):
            checkpoint.load(path)
    with pytest.raises(ModelError, match="is not a slim checkpoint"):
        checkpoint.read_plan(source)
    assert [path.name for path in cases if checkpoint.is_slim(path)] == [
        "list",
        "newer",
        "stranger",
        "wrong",
        "damaged",
    ]
