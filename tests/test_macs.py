"""Multiply-accumulates: the known figures, and what a step of width costs."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel

from slimdiff.groups import KINDS, find_groups
from slimdiff.macs import count, token_counts
from slimdiff.slim_unet import SlimUNet2DConditionModel

torch.set_num_threads(1)
SIZE, TEXT = (8, 12), 6
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


def saved(ranks: dict[str, int]) -> tuple[int, int]:
    """MACs that these widths save: counted on the slim UNet, and by the groups' own account."""
    dense = tiny_unet()
    with torch.device("meta"):
        slim = SlimUNet2DConditionModel.from_config(dense.config, slim_ranks=ranks)
    groups = {group.name: group for group in find_groups(dense, token_counts(dense, SIZE, TEXT), (*KINDS, "resnet"))}
    counted = count(dense, SIZE, TEXT).total - count(slim, SIZE, TEXT).total
    return counted, sum((groups[name].width - r) * groups[name].macs_per_width for name, r in ranks.items())


def test_sd15_at_512_pixels_has_the_known_macs():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    macs = count(unet, (64, 64))
    assert macs.total / 1e9 == pytest.approx(401.6, abs=0.1)
    assert macs.core / 1e9 == pytest.approx(63.0, abs=0.1)
    assert macs.without_core == macs.total - macs.core
    assert token_counts(unet, (64, 64))["mid_block.attentions.0.transformer_blocks.0.attn2"] == (64, 77)


def test_core_is_two_products_of_every_attention():
    unet = tiny_unet()
    tokens = token_counts(unet, SIZE, TEXT)
    expected = sum(
        2 * q * k * group.heads * group.width
        for group in find_groups(unet)
        if group.kind == "qk"
        for q, k in [tokens[group.module]]
    )
    assert count(unet, SIZE, TEXT).core == expected > 0


def test_tokens_are_those_of_each_level_and_of_the_text():
    tokens = token_counts(tiny_unet(), SIZE, TEXT)
    down = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert [tokens[f"{down}.{layer}"] for layer in ("attn1", "attn2", "ff")] == [(96, 96), (96, 6), (96, 96)]
    assert [tokens[f"{BLOCK}.{layer}"] for layer in ("attn1", "attn2", "ff")] == [(24, 24), (24, 6), (24, 24)]


@pytest.mark.parametrize(
    "ranks",
    [
        {f"{BLOCK}.attn1.qk": 4, f"{BLOCK}.attn1.vo": 4},
        {f"{BLOCK}.attn2.qk": 10, f"{BLOCK}.attn2.vo": 10},
        {f"{BLOCK}.ff.ffn": 24},
        {"up_blocks.0.resnets.1.resnet": 5},
    ],
    ids=["self-attention", "cross-attention", "feed-forward", "resnet"],
)
def test_a_step_of_width_costs_what_counting_the_slim_unet_says(ranks):
    counted, claimed = saved(ranks)
    assert claimed == counted > 0


def test_unequal_widths_are_accounted_without_the_padding_they_run_with():
    counted, claimed = saved({f"{BLOCK}.attn1.qk": 4, f"{BLOCK}.attn1.vo": 10})
    assert claimed - counted == 24 * 24 * 2 * (10 - 4)


def test_counting_works_for_sdxl_inputs_and_leaves_the_model_alone():
    plain = tiny_unet()
    xl = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 24
    )
    before = {name: tensor.clone() for name, tensor in xl.state_dict().items()}
    extra = sum(layer.weight.numel() for layer in (xl.add_embedding.linear_1, xl.add_embedding.linear_2))
    assert count(xl, SIZE, TEXT).total == count(plain, SIZE, TEXT).total + extra
    token_counts(xl, SIZE, TEXT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in xl.state_dict().items())
    assert not any(module._forward_pre_hooks for module in xl.modules())


def test_attention_without_text_counts_pixels_as_tokens():
    unet = tiny_unet(down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"))
    assert token_counts(unet, SIZE, TEXT)["down_blocks.0.attentions.0"] == (96, 96)
