"""Keys and values of the text: projected once for a picture, and again whenever anything they depend on changes."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from conftest import noise, tiny_pipeline, tiny_unet
from peft import LoraConfig
from torch import nn

from slimdiff.slim_unet import SlimUNet2DConditionModel, TextProjection

RANKS = {"mid_block.attentions.0.transformer_blocks.0.attn2.vo": 6}


@pytest.fixture
def slim() -> SlimUNet2DConditionModel:
    torch.manual_seed(0)
    unet = SlimUNet2DConditionModel.from_config(tiny_unet().config, slim_ranks=RANKS)
    return unet.eval().requires_grad_(False)


def texts(count: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 8, 12, generator=generator) for _ in range(count)]


@torch.no_grad()
def run(unet: nn.Module, text: torch.Tensor, seed: int = 0) -> torch.Tensor:
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return unet(sample, 10, text).sample


def afresh(unet: SlimUNet2DConditionModel, text: torch.Tensor) -> torch.Tensor:
    """What the UNet says when it remembers nothing."""
    unet = copy.deepcopy(unet)
    unet.reuse_text_projections(False)
    return run(unet, text)


def layers(unet: nn.Module) -> list[TextProjection]:
    return [layer for layer in unet.modules() if isinstance(layer, TextProjection)]


def test_every_step_after_the_first_projects_nothing_and_changes_nothing(slim):
    (text,) = texts()
    wanted = [afresh(slim, text), run(slim, text)]
    assert len(layers(slim)) == 2 * sum(path.endswith("attn2") for path, _ in slim.named_modules())
    weights = {id(layer.weight) for layer in layers(slim)}
    with mock.patch("torch.nn.functional.linear", wraps=nn.functional.linear) as linear:
        assert torch.equal(run(slim, text), wanted[0])
    assert linear.call_count > 0
    assert not weights & {id(call.args[1]) for call in linear.call_args_list}
    assert torch.equal(*wanted)


def test_another_text_or_the_same_one_overwritten_is_projected_anew(slim):
    one, other = texts(2)
    for text in (one, other, one):
        assert torch.equal(run(slim, text), afresh(slim, text))
    before = run(slim, one)
    one.copy_(other)
    assert torch.equal(run(slim, one), run(slim, other))
    assert not torch.equal(run(slim, one), before)


@torch.no_grad()
def test_another_thread_that_paints_in_between_changes_nothing():
    one, other = texts(2)

    class Interrupted(TextProjection):
        """Another thread projects its own text as soon as this one's is kept."""

        @property
        def _seen(self) -> tuple | None:
            return self.__dict__.get("kept")

        @_seen.setter
        def _seen(self, kept: tuple | None) -> None:
            is_first = "kept" not in self.__dict__
            self.__dict__["kept"] = kept
            if is_first:
                self(other)

    layer = Interrupted.of(nn.Linear(12, 16))
    assert torch.equal(layer(one), nn.functional.linear(one, layer.weight, layer.bias))


def test_weights_that_change_are_seen(slim):
    (text,) = texts()
    before = run(slim, text)
    slim.load_state_dict({name: 2 * value for name, value in slim.state_dict().items()})
    assert torch.equal(run(slim, text), afresh(slim, text))
    assert not torch.equal(run(slim, text), before)


def test_weights_that_are_replaced_are_seen(slim):
    """As by what quantises a model: the new weights were never written to either."""
    (text,) = texts()
    found = []
    for _ in range(2):
        for layer in layers(slim):
            layer.weight = nn.Parameter(layer.weight.neg(), requires_grad=False)
            assert layer.weight._version == 0
        found.append(run(slim, text))
        assert torch.equal(found[-1], afresh(slim, text))
    assert not torch.equal(*found)


def test_loras_switch_scale_fuse_and_go(slim):
    (text,) = texts()
    before = run(slim, text)
    for name in ("a", "b"):
        slim.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), name)
    found = {}
    for name, scale in (("a", 1.0), ("b", 1.0), ("b", 0.5)):
        slim.set_adapters(name, scale)
        found[name, scale] = run(slim, text)
        assert torch.equal(found[name, scale], afresh(slim, text))
    slim.fuse_lora(adapter_names=["b"])
    torch.testing.assert_close(run(slim, text), found["b", 0.5])
    slim.unfuse_lora()
    slim.unload_lora()
    torch.testing.assert_close(run(slim, text), before)
    assert len({float(x.sum()) for x in (before, *found.values())}) == 4


def test_what_was_projected_goes_with_the_text(slim):
    (text,) = texts()
    run(slim, text)
    assert all(layer._seen is not None for layer in layers(slim))
    del text
    assert all(layer._seen is None for layer in layers(slim))


def test_gradients_and_inference_mode_are_as_ever(slim):
    (text,) = texts()
    wanted = run(slim, text)
    text.requires_grad_(True)
    slim(torch.randn(2, 4, 8, 8), 10, text).sample.sum().backward()
    assert text.grad is not None
    assert float(text.grad.abs().max()) > 0
    with torch.inference_mode():
        made_inside = texts()[0]
        torch.testing.assert_close(run(slim, made_inside), wanted)


def test_pictures_of_a_pipeline_are_the_same_bit_for_bit(slim, tmp_path):
    pipe = tiny_pipeline(tmp_path, slim)

    def paint(prompts: list[str]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe(
            prompts, num_inference_steps=3, height=16, width=16, output_type="latent", generator=generator
        ).images

    with_reuse = [paint(["cat", "dog"]), paint(["sea", "sky"]), paint(["cat", "dog"])]
    slim.reuse_text_projections(False)
    without = [paint(["cat", "dog"]), paint(["sea", "sky"])]
    assert torch.equal(with_reuse[0], without[0])
    assert torch.equal(with_reuse[1], without[1])
    assert torch.equal(with_reuse[2], without[0])


def test_weights_keep_their_names_and_their_meaning():
    dense = tiny_unet()
    whole = SlimUNet2DConditionModel.from_config(dense.config, slim_ranks={})
    whole.load_state_dict(dense.state_dict())
    assert torch.equal(noise(whole.eval()), noise(dense))
