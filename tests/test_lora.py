"""LoRAs and other adapters of the dense model on the slim one: through exact maps, or refused."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import noise
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimdiff import checkpoint
from slimdiff.calibrate import collect
from slimdiff.cli import main
from slimdiff.compress import Options, make_plan
from slimdiff.errors import ModelError
from slimdiff.groups import Group, find_groups, names
from slimdiff.linalg import regularised
from slimdiff.lora import merge
from slimdiff.methods import Evidence
from slimdiff.pipeline import encode, fingerprint, load
from slimdiff.plan import Plan
from slimdiff.recipe import Recipe
from slimdiff.slim_unet import SlimUNet2DConditionModel
from slimdiff.solve.solution import Solution
from slimdiff.source import find
from slimdiff.statistics import StatisticsFile
from slimdiff.surgery import build, slim_weights

pytest.importorskip("peft")

WORDS = ("a cat", "hill", "red", "dogs", "boat", "sun")
OPTIONS = Options(0.4, influence="local", independent_ranks=True)
EVERY_RANK = 1000
BIG = {
    f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": shape
    for side, shape in (("A", (2, 320)), ("B", (320, 2)))
}
"""Tensors of a LoRA of a larger model."""
ALPHA, RANK = 3.0, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """The dense pipeline, a plan, its solutions, and the slim UNet with maps of every rank."""
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path_factory.mktemp("lora") / "s.safetensors"
    collect(pipe, find(str(model_folder)), Recipe("sd1", WORDS, ("",) * len(WORDS), 4, 3.0, 16, 16), path)
    file = StatisticsFile(path)
    plan, curves = make_plan(pipe, file, OPTIONS)
    solutions = {name: curve.solve() for name, curve in curves.items()}
    assert {name.rpartition(".")[2] for name in plan.ranks()} == {"qk", "vo", "ffn"}
    return pipe, file, plan, solutions, build(pipe.unet, plan.ranks(), solutions, EVERY_RANK)


def with_unet(pipe: DiffusionPipeline, unet: torch.nn.Module) -> DiffusionPipeline:
    made = StableDiffusionPipeline(**(pipe.components | {"unet": unet}), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def targets(unet: torch.nn.Module) -> list[str]:
    """A matrix or convolution of every kind, cut ones and others."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".net.0.proj", ".net.2", ".proj_in", "resnets.0.conv1")
    return [name for name, _ in unet.named_modules() if name.endswith(ends)]


def lora_of(unet: torch.nn.Module, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a random LoRA, by layer."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name in targets(unet):
        outputs, inputs, *kernel = unet.get_submodule(name).weight.shape
        a, b = (RANK, inputs, *kernel), (outputs, RANK, *(1 for _ in kernel))
        lora[name] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in (a, b))
    return lora


def peft_names(lora: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    sides = {f"unet.{name}.lora_A.weight": a for name, (a, _) in lora.items()}
    return sides | {f"unet.{name}.lora_B.weight": scale * b for name, (_, b) in lora.items()}


def old_names(lora: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in lora.items():
        path, _, matrix = name.removesuffix(".0").rpartition(".")
        stem = f"{path}.processor.{matrix}_lora" if matrix.startswith("to_") else f"{name}.lora"
        named |= {f"unet.{stem}.down.weight": a, f"unet.{stem}.up.weight": b}
    return named


def kohya_names(lora: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in lora.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        named |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    return named


def merged(unet: torch.nn.Module, lora: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> torch.nn.Module:
    unet = copy.deepcopy(unet)
    for name, (a, b) in lora.items():
        unet.get_submodule(name).weight.data += scale * (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
    return unet


def uncentred_fit(file: StatisticsFile, unet: torch.nn.Module, group: Group, solution: Solution, width: int) -> Tensor:
    """`Z Rᵀ (R Z Rᵀ)⁻¹` with the moment Z = E[x xᵀ] of what enters a group's last matrix, straight from the formula."""
    evidence, (kept,) = Evidence(unet, group, file.moments), solution.at(width).into
    moments = evidence.guided() if group.kind == "ffn" else evidence.inner()
    z = regularised(moments.covariance) + torch.outer(moments.mean, moments.mean).double()
    r = torch.eye(len(z), dtype=z.dtype)[kept] if group.kind == "ffn" else torch.block_diag(*kept)
    return z @ r.mT @ torch.linalg.inv(r @ z @ r.mT)


def merged_first(made, lora: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> torch.nn.Module:
    """The slim UNet of the dense one with the LoRA merged, cut by the same maps."""
    pipe, file, plan, solutions, _ = made
    slim = build(merged(pipe.unet, lora, scale), plan.ranks(), solutions)
    for group in find_groups(pipe.unet):
        if group.name in plan.ranks() and (where := names(pipe.unet, group).out):
            a, b = lora[where[0].removesuffix(".weight")]
            fit = uncentred_fit(file, pipe.unet, group, solutions[group.name], plan.ranks()[group.name])
            slim.get_parameter(where[0]).data += scale * (b.double() @ a.double() @ fit).float()
    return slim


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.fixture
def slim_pipe(made) -> DiffusionPipeline:
    return with_unet(made[0], copy.deepcopy(made[-1]))


@pytest.mark.parametrize(
    ("named", "scale"),
    [(peft_names, 1.0), (old_names, 1.0), (kohya_names, ALPHA / RANK)],
    ids=["peft", "old diffusers", "kohya"],
)
def test_a_dense_lora_is_exact_against_merging_it_first(made, slim_pipe, named, scale):
    lora = lora_of(made[0].unet)
    before = noise(slim_pipe.unet)
    slim_pipe.load_lora_weights(named(lora))
    with_lora, expected = noise(slim_pipe.unet), noise(merged_first(made, lora, scale))
    assert (expected - before).norm() > 0.1 * before.norm()
    assert close(with_lora, expected)
    slim_pipe.fuse_lora()
    assert close(noise(slim_pipe.unet), expected)
    slim_pipe.unfuse_lora()
    assert close(noise(slim_pipe.unet), expected)
    slim_pipe.unload_lora_weights()
    assert close(noise(slim_pipe.unet), before)


def test_alpha_of_a_peft_file_counts(made, slim_pipe, tmp_path):
    lora = lora_of(made[0].unet)
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(lora)}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(peft_names(lora), tmp_path / "lora.safetensors", metadata)
    slim_pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert close(noise(slim_pipe.unet), noise(merged_first(made, lora, ALPHA / RANK)))


def test_several_adapters_add_up_with_their_scales(made, slim_pipe):
    one, two = lora_of(made[0].unet, 1), lora_of(made[0].unet, 2)
    slim_pipe.load_lora_weights(peft_names(one), adapter_name="one")
    slim_pipe.load_lora_weights(old_names(two), adapter_name="two")
    slim_pipe.set_adapters(["one", "two"], [0.7, -0.4])
    both = {
        name: (torch.cat([one[name][0], two[name][0]]), torch.cat([0.7 * one[name][1], -0.4 * two[name][1]], 1))
        for name in one
    }
    assert close(noise(slim_pipe.unet), noise(merged_first(made, both)))
    slim_pipe.set_adapters("two")
    assert close(noise(slim_pipe.unet), noise(merged_first(made, two)))
    slim_pipe.delete_adapters("two")
    slim_pipe.set_adapters("one")
    assert close(noise(slim_pipe.unet), noise(merged_first(made, one)))


def test_scales_by_block_are_those_of_the_dense_model(made, slim_pipe):
    lora, found = peft_names(lora_of(made[0].unet)), []
    for pipe in (with_unet(made[0], copy.deepcopy(made[0].unet)), slim_pipe):
        pipe.load_lora_weights(dict(lora), adapter_name="one")
        pipe.set_adapters("one", {"unet": {"down": {"block_1": [0.5]}, "mid": -1.0, "up": 0.25}})
        layers = pipe.unet.named_modules()
        found.append({name: layer.scaling["one"] for name, layer in layers if getattr(layer, "scaling", None)})
    assert found[0] == found[1] and {0.5, -1.0, 0.25} <= set(found[0].values())


def test_the_text_encoders_part_is_left_alone(made, slim_pipe):
    dense = made[0]
    name = next(name for name, _ in dense.text_encoder.named_modules() if name.endswith("q_proj"))
    torch.manual_seed(0)
    text = {f"text_encoder.{name}.lora_A.weight": torch.randn(RANK, 12)}
    text |= {f"text_encoder.{name}.lora_B.weight": torch.randn(12, RANK)}
    pipes = [with_unet(copy.copy(dense), copy.deepcopy(unet)) for unet in (dense.unet, slim_pipe.unet)]
    seen = []
    for pipe in pipes:
        pipe.text_encoder = copy.deepcopy(dense.text_encoder)
        pipe.load_lora_weights(peft_names(lora_of(dense.unet)) | text)
        seen.append(encode(pipe, ["a cat"], [""])["prompt_embeds"])
    assert torch.equal(*seen)
    assert not close(seen[0], encode(dense, ["a cat"], [""])["prompt_embeds"])


@pytest.mark.parametrize("kind", ["vo", "ffn"])
def test_few_ranks_keep_the_mean_and_most_of_the_rest(made, kind):
    """The first rank carries the mean; each further one can only help, up to the least-squares fit."""
    pipe, file, plan, solutions, _ = made
    for group in (g for g in find_groups(pipe.unet, kinds=(kind,)) if g.name in plan.ranks()):
        solution, width = solutions[group.name], plan.ranks()[group.name]
        evidence, (kept,) = Evidence(pipe.unet, group, file.moments), solution.at(width).into
        moments = evidence.guided() if kind == "ffn" else evidence.inner()
        z = regularised(moments.covariance) + torch.outer(moments.mean, moments.mean).double()
        r = torch.eye(len(z), dtype=z.dtype)[kept] if kind == "ffn" else torch.block_diag(*kept)

        def error(fit: Tensor, z: Tensor = z, r: Tensor = r) -> float:
            off = torch.eye(len(z), dtype=z.dtype) - fit @ r
            return float((off @ z @ off.mT).trace())

        errors = [error(r.mT)]
        for rank in range(1, len(z) - len(r) + 2):
            left, right = solution.dropped(width, rank)
            assert left.shape == (len(z), rank) and right.shape == (rank, len(r))
            errors.append(error(r.mT + left @ right))
        best = error(uncentred_fit(file, pipe.unet, group, solution, width))
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))
        assert errors[-1] == pytest.approx(best, rel=1e-6) and errors[0] > 1.01 * best


def test_a_lora_of_the_slim_model_stays_as_it_is(made):
    """Also where the cut halves a feed-forward layer, so that both halves of its rows number as the dense units do."""
    dense = made[0].unet
    ranks = {group.name: group.width // 2 for group in find_groups(dense)}
    unet = SlimUNet2DConditionModel.from_config(dense.config, slim_ranks=ranks, slim_maps=4)
    lora = peft_names(lora_of(unet))
    mapped = unet.mapped_lora(lora)
    assert mapped.keys() == lora.keys() and all(mapped[name] is lora[name] for name in lora)


def test_what_cannot_be_mapped_is_refused_and_leaves_no_trace(made):
    pipe, _, plan, solutions, slim = made
    lora = peft_names(lora_of(pipe.unet))
    bare = build(pipe.unet, plan.ranks(), solutions)
    assert not any("slim_" in name for name in bare.state_dict())
    vectors = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(x))
        for name, x in lora.items() if "lora_B" in name
    }  # fmt: skip
    for unet, adapter, why in ((bare, lora, "no map for it"), (slim, lora | vectors, "no map for DoRAs")):
        names_before, before = list(unet.state_dict()), noise(unet)
        with pytest.raises(ValueError, match=rf"does not fit.*attn1\.to_.*{why}. Merge it into the dense model"):
            with_unet(pipe, unet).load_lora_weights(adapter)
        assert list(unet.state_dict()) == names_before and torch.equal(noise(unet), before)


@pytest.fixture(scope="module")
def tied(made):
    """The slim UNet with one width for queries, keys and values, and the same function in the dense shapes."""
    pipe, file, *_ = made
    plan, solutions = make_plan(pipe, file, replace(OPTIONS, independent_ranks=False))
    padded, factors = copy.deepcopy(pipe.unet), {}
    for group in (group for group in find_groups(pipe.unet) if group.name in plan.ranks()):
        factors[group.name] = solutions[group.name].at(plan.ranks()[group.name])
        padded.load_state_dict(slim_weights(pipe.unet, group, factors[group.name], padded=True), strict=False)
    return build(pipe.unet, plan.ranks(), solutions, 4), padded, factors


def test_an_ip_adapters_keys_and_values_follow_the_same_maps(tied):
    slim, padded, factors = (copy.deepcopy(part) for part in tied)
    torch.manual_seed(3)
    ours, theirs = {}, {}
    layers = [name.removesuffix(".processor") for name in padded.attn_processors if "attn2" in name]
    for number, path in enumerate(layers):
        heads, rows = padded.get_submodule(path).heads, padded.get_submodule(path).to_k.out_features
        for matrix, group, side in (("to_k_ip", f"{path}.qk", 1), ("to_v_ip", f"{path}.vo", 0)):
            name, weight = f"{2 * number + 1}.{matrix}.weight", torch.randn(rows, 12)
            ours[name] = theirs[name] = weight
            if group in factors:
                cut = (factors[group].into[side] @ weight.double().unflatten(0, (heads, -1))).float()
                theirs[name] = F.pad(cut, (0, 0, 0, rows // heads - cut.shape[1])).flatten(0, 1)
    assert any(theirs[name] is not ours[name] for name in ours)
    image = {"proj.weight": torch.randn(48, 6), "proj.bias": torch.randn(48)}
    image |= {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    embeddings, seen = {"image_embeds": [torch.randn(2, 1, 6)]}, []
    for unet, weights in ((slim, ours), (padded, theirs)):
        before = noise(unet)
        unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}])
        inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 600])
        text = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            seen.append(unet(*inputs, text, added_cond_kwargs=embeddings).sample)
        assert not close(seen[-1], before)
    assert close(*seen)


def draw(pipe: DiffusionPipeline, **inputs: object) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return pipe("a <new>", num_inference_steps=2, generator=generator, output_type="latent", **inputs).images


def test_a_textual_inversion_and_a_controlnet_work_as_on_the_dense_model(made, tied):
    dense = made[0]
    torch.manual_seed(4)
    control = ControlNetModel.from_unet(dense.unet, conditioning_embedding_out_channels=(4, 4)).eval()
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1)
    image, word = torch.rand(1, 3, 16, 16), {"<new>": torch.randn(12)}
    drawn = []
    for unet in tied[:2]:
        text = {"text_encoder": copy.deepcopy(dense.text_encoder), "tokenizer": copy.deepcopy(dense.tokenizer)}
        pipe = with_unet(dense, unet)
        pipe.register_modules(**text)
        plain = draw(pipe)
        pipe.load_textual_inversion(word, token="<new>")
        invented = draw(pipe)
        controlled = StableDiffusionControlNetPipeline(
            **pipe.components, controlnet=control, requires_safety_checker=False
        )
        controlled.set_progress_bar_config(disable=True)
        drawn.append((invented, draw(controlled, image=image)))
        assert not close(plain, invented) and not close(invented, drawn[-1][1])
    assert all(close(*pair) for pair in zip(*drawn, strict=True))


@pytest.fixture(scope="module")
def slim_folder(made, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "slim"
    checkpoint.write(folder, made[-1], made[0], "{}", model_folder)
    return folder


WITHOUT_SLIMDIFF = """
import sys
sys.modules["slimdiff"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, again, lora, results = sys.argv[1:]
torch.set_num_threads(1)

def noise(unet):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([10, 600]), text).sample

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained(again)
pipe.load_lora_weights(lora)
seen = {"loaded": noise(pipe.unet)}
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
pipe.load_lora_weights(lora)
seen["saved again"] = noise(pipe.unet)
assert not [name for name in sys.modules if name.startswith("slimdiff.")]
save_file(seen, results)
"""


def test_maps_travel_with_the_checkpoint(made, slim_folder, tmp_path):
    lora = lora_of(made[0].unet)
    save_file(kohya_names(lora), tmp_path / "lora.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(slim_folder), *(str(tmp_path / name) for name in ("again", "lora.safetensors", "seen"))]
    command = [sys.executable, "-c", WITHOUT_SLIMDIFF, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = noise(merged_first(made, lora, ALPHA / RANK))
    seen = load_file(tmp_path / "seen")
    assert len(seen) == 2 and all(close(x, expected) for x in seen.values())
    half = checkpoint.load(slim_folder, torch_dtype=torch.float16)
    half.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    half.unet.to(torch.float32)
    assert (noise(half.unet) - expected).norm() < 0.01 * expected.norm()
    assert "LoRAs trained on the original work here" in (slim_folder / "README.md").read_text()


@pytest.mark.parametrize(("named", "scale"), [(peft_names, 1.0), (kohya_names, ALPHA / RANK)])
def test_a_converted_file_needs_no_maps(made, slim_folder, tmp_path, named, scale):
    lora = lora_of(made[0].unet)
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(RANK, 12)}
    text = text if named is peft_names else {}
    save_file(named(lora) | text, tmp_path / "dense.safetensors", {"author": "me"})
    invoke = ["lora", str(tmp_path / "dense.safetensors"), "--model", str(slim_folder), "-o", str(tmp_path / "slim")]
    done = CliRunner().invoke(main, invoke)
    assert done.exit_code == 0, done.output
    converted = load_file(tmp_path / "slim")
    assert all(torch.equal(converted[name], x) for name, x in text.items())
    with safe_open(tmp_path / "slim", framework="pt") as file:
        assert file.metadata() == {"author": "me"}
    pipe, _, plan, solutions, _ = made
    bare = build(pipe.unet, plan.ranks(), solutions)
    bare.load_lora_adapter(converted, prefix="unet")
    assert close(noise(bare), noise(merged_first(made, lora, scale)))
    again = CliRunner().invoke(main, invoke)
    assert again.exit_code == 1 and "exists" in again.output and "--force" in again.output
    assert CliRunner().invoke(main, [*invoke, "--force"]).exit_code == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (4, 2)}, "is no plain LoRA.*hada_w1_a.*Merge it into"),
        ({"lora_unet_mid_block_attentions_0_proj_in.dora_scale": (4, 1)}, "is no plain LoRA.*dora_scale"),
        ({"unet.mid_block.attentions.0.proj_in.lokr_w1": (4, 4)}, "is no plain LoRA.*lokr_w1"),
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (4, 4)}, "is no plain LoRA.*oft_blocks"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight": (31, 2)}, "does not fit.*attn2"),
        ({"x": (1,)}, "holds 1 tensor such as x, none of a LoRA"),
        ({"transformer.blocks.0.lora_A.weight": (2, 4)}, "holds 1 tensor such as transformer.*none of a LoRA"),
        ({"unet.nowhere.to_q.lora_A.weight": (2, 4)}, "does not fit.* nowhere.to_q, which is not there.*another model"),
        (BIG, "does not fit.*attn1.to_q with 320 inputs, and there are 32. It was trained on another model"),
        (None, "cannot be read as a LoRA"),
    ],
)
def test_what_is_no_lora_of_the_model_is_not_converted(slim_folder, tmp_path, tensors, message):
    path = tmp_path / "dense.safetensors"
    if tensors:
        save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    arguments = ["lora", str(path), "--model", str(slim_folder), "-o", str(tmp_path / "out.safetensors")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and re.search(message, done.output.replace("\n", " ")), done.output
    assert not list(tmp_path.glob("*out*"))


def test_merging_without_peft_says_how_to_get_it(made, monkeypatch):
    monkeypatch.setattr("slimdiff.lora.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"peft, which is not installed.*slimdiff\[lora\]"):
        merge(made[0], [("style.safetensors", 1.0)])


def test_a_lora_merged_before_calibration_is_part_of_the_model(made, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense, lora = made[0], lora_of(made[0].unet)
    layer = next(name for name, _ in dense.text_encoder.named_modules() if name.endswith("q_proj"))
    torch.manual_seed(0)
    sides = torch.randn(RANK, 12), torch.randn(12, RANK)
    text = dict(zip((f"text_encoder.{layer}.lora_A.weight", f"text_encoder.{layer}.lora_B.weight"), sides, strict=True))
    save_file(peft_names(lora) | text, tmp_path / "style.safetensors")

    def run(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        return done.output

    quick = ["--num-prompts", 2, "--steps", 2, "--device", "cpu"]
    run("calibrate", model_folder, "--lora", "style.safetensors:0.5", *quick)
    run("compress", "--budget", 0, "--device", "cpu")
    run("bench", "--num-prompts", 1, "--repeats", 3, "--batch-sizes", 1, "--device", "cpu")
    slim = checkpoint.load(tmp_path / "slimdiff-out" / "tiny+style" / "slim-0")
    expected = merged(dense.unet, lora, 0.5)
    torch.testing.assert_close(slim.unet.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
    weight = dense.text_encoder.get_submodule(layer).weight + 0.5 * sides[1] @ sides[0]
    torch.testing.assert_close(slim.text_encoder.get_submodule(layer).weight, weight, rtol=0, atol=1e-6)
    provenance = Plan.from_json(checkpoint.read_plan(tmp_path / "slimdiff-out/tiny+style/slim-0")).provenance
    assert provenance["loras"] == [[str(tmp_path / "style.safetensors"), 0.5]]
    assert provenance["fingerprint"] == fingerprint(slim.unet) != fingerprint(dense.unet)
    (tmp_path / "style.safetensors").unlink()
    out = run("compress", "--budget", 0.3, "--device", "cpu", code=1)
    assert "There is no .safetensors file" in out and "style.safetensors" in out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": (1,)}, "holds 1 tensor such as x, none of a LoRA"),
        (BIG, r"cannot be merged: it changes \S*attn1.to_q with 320 inputs, and there are 32. .*another"),
        (
            {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (2, 768),
             "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": (768, 2)},
            r"cannot be merged: it changes \S*q_proj with 768 inputs, and there are 12. .*trained on another model",
        ),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_the_model_is_not_merged(model_folder, tmp_path, caplog, tensors, message):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "lora.safetensors")
    arguments = ["calibrate", str(model_folder), "--lora", str(tmp_path / "lora.safetensors"), "--device", "cpu"]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "s.safetensors")])
    assert done.exit_code == 1 and re.search(message, done.output.replace("\n", " ")), done.output
    assert "unsuccessful" not in done.output + caplog.text
    assert not (tmp_path / "s.safetensors").exists()


def test_merging_does_not_depend_on_the_working_precision(made, model_folder, tmp_path):
    save_file(kohya_names(lora_of(made[0].unet)), tmp_path / "style.safetensors")
    source = find(str(model_folder)).with_loras([(str(tmp_path / "style.safetensors"), 0.3)])
    prints = {fingerprint(load(source, dtype).unet) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert len(prints) == 1
