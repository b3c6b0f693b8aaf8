"""The groups of a UNet: complete, in order, with the right costs."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from slimdiff.errors import ModelError
from slimdiff.groups import KINDS, find_groups, names

torch.set_num_threads(1)
BLOCKS = 7  # one in each down block, one in the middle, two in each up block
RESNETS = 8  # as many, and one more in the middle


def sd_unet(**config: object) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **config)


def sdxl_unet() -> UNet2DConditionModel:
    return sd_unet(
        block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def layer_params(unet: nn.Module) -> int:
    """Parameters of the attention and feed-forward layers, but for the output biases, which no width touches."""
    total = 0
    for layer in unet.modules():
        if isinstance(layer, Attention | FeedForward):
            out = layer.to_out[0] if isinstance(layer, Attention) else layer.net[2]
            total += sum(p.numel() for p in layer.parameters()) - (0 if out.bias is None else out.bias.numel())
    return total


def test_every_layer_gives_its_groups_in_the_order_of_the_data():
    unet, met = tiny_unet(), []
    for path, layer in unet.named_modules():
        if isinstance(layer, Attention):
            layer.register_forward_pre_hook(lambda *_, path=path: met.extend([f"{path}.qk", f"{path}.vo"]))
        elif isinstance(layer, FeedForward):
            layer.register_forward_pre_hook(lambda *_, path=path: met.append(f"{path}.ffn"))
        elif isinstance(layer, ResnetBlock2D):
            layer.register_forward_pre_hook(lambda *_, path=path: met.append(f"{path}.resnet"))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 8, 12))
    assert [group.name for group in find_groups(unet, kinds=(*KINDS, "resnet"))] == met
    groups = find_groups(unet)
    assert [group.name for group in groups] == [name for name in met if not name.endswith(".resnet")]
    assert len(groups) == len(set(groups)) == 5 * BLOCKS
    assert len(met) == len(set(met)) == 5 * BLOCKS + RESNETS
    assert {kind: sum(g.kind == kind for g in groups) for kind in KINDS} == {"qk": 14, "vo": 14, "ffn": 7}
    assert all(group.name == f"{group.module}.{group.kind}" for group in groups)


def test_widths_are_those_of_the_layers():
    groups = {group.name: group for group in find_groups(tiny_unet())}
    down, mid = "down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"
    assert [(g.heads, g.width) for g in (groups[f"{down}.attn1.qk"], groups[f"{mid}.attn2.vo"])] == [(2, 8), (2, 16)]
    assert [(g.heads, g.width) for g in (groups[f"{down}.ff.ffn"], groups[f"{mid}.ff.ffn"])] == [(1, 64), (1, 128)]


@pytest.mark.parametrize("make", [tiny_unet, sdxl_unet], ids=["tiny", "sdxl"])
def test_params_are_those_of_the_weights_that_names_lists(make):
    unet = make()
    parameters, listed, total = dict(unet.named_parameters()), [], 0
    for group in find_groups(unet):
        where = names(unet, group)
        own = [name for pair in where.into for name in pair if name is not None]
        own += [where.out[0]] if where.out else []
        listed += own
        assert group.params == sum(parameters[name].numel() for name in own)
        assert group.params == group.width * group.params_per_width
        total += group.params
    assert len(listed) == len(set(listed))
    assert total == layer_params(unet)


@pytest.mark.parametrize(
    ("make", "blocks", "widths"),
    [
        (tiny_unet, 8, {4, 8}),
        (lambda: sd_unet(cross_attention_dim=768, attention_head_dim=8), 22, {10, 20, 40}),
        (lambda: sd_unet(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)), 22, {10, 20, 40}),
        (sdxl_unet, 17, {10, 20, 40}),
        (lambda: tiny_unet(resnet_time_scale_shift="scale_shift"), 8, {4, 8}),
    ],
    ids=["tiny", "sd1", "sd2", "sdxl", "scale and shift"],
)
def test_resnet_groups_hold_what_lies_between_the_two_convolutions(make, blocks, widths):
    unet = make()
    groups, parameters = find_groups(unet, kinds=("resnet",)), dict(unet.named_parameters())
    assert len(groups) == blocks
    assert {group.width for group in groups} == widths
    for group in groups:
        block, where = unet.get_submodule(group.module), names(unet, group)
        listed = [*(name for pair in where.into for name in pair), where.out[0], *where.norm]
        assert group.params == sum(parameters[name].numel() for name in listed)
        others = [*block.norm1.parameters(), block.conv2.bias]
        others += [] if block.conv_shortcut is None else block.conv_shortcut.parameters()
        assert group.params == sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in others)
        assert group.heads * group.width == block.out_channels


def test_biases_of_queries_and_values_are_counted_and_named():
    unet = tiny_unet(down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"))
    first = [group for group in find_groups(unet) if group.module == "down_blocks.0.attentions.0"]
    layer = unet.down_blocks[0].attentions[0]
    assert layer.to_q.bias is not None
    qk = [*layer.to_q.parameters(), *layer.to_k.parameters()]
    vo = [*layer.to_v.parameters(), layer.to_out[0].weight]
    assert [group.params for group in first] == [sum(p.numel() for p in part) for part in (qk, vo)]
    assert names(unet, first[0]).into[0] == (
        "down_blocks.0.attentions.0.to_q.weight",
        "down_blocks.0.attentions.0.to_q.bias",
    )


def test_sd15_has_242_million_of_its_860_million_parameters_in_groups():
    unet = sd_unet(cross_attention_dim=768, attention_head_dim=8)
    groups = find_groups(unet)
    assert len(groups) == 80
    assert sum(group.params for group in groups) / 1e6 == pytest.approx(242.3, abs=0.1)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(859.5, abs=0.1)
    assert {group.width for group in groups if group.kind == "qk"} == {40, 80, 160}


def test_a_unet_without_attention_is_refused():
    plain = UNet2DConditionModel(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    for model in (plain, nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ModelError, match="nothing to compress"):
            find_groups(model)


def test_a_model_that_is_no_unet_is_refused_in_words():
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError):
        find_groups(model)


def test_layers_of_another_form_are_refused():
    path = "mid_block.attentions.0.transformer_blocks.0"
    gelu = tiny_unet()
    gelu.get_submodule(path).ff = FeedForward(32, activation_fn="gelu")
    with pytest.raises(ModelError, match="GEGLU"):
        find_groups(gelu)
    fused = tiny_unet()
    fused.fuse_qkv_projections()
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        find_groups(fused)
    normed = tiny_unet()
    normed.get_submodule(path).attn1 = Attention(32, heads=2, dim_head=16, qk_norm="layer_norm")
    with pytest.raises(ModelError, match="normalises"):
        find_groups(normed)
