"""The slim UNet: what its layers compute, what its configuration holds, what it refuses."""

from __future__ import annotations

import copy
import json
from unittest import mock

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimdiff.slim_unet import SlimAttnProcessor, SlimUNet2DConditionModel, UnequalAttention

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
MID = "mid_block.attentions.0.transformer_blocks.0"
UP = "up_blocks.1.attentions.0.transformer_blocks.0"
# Dense head widths are 8 in DOWN and UP, 16 in MID; feed-forwards have 64 and 128 hidden units.
TIED = {f"{DOWN}.attn1.qk": 4, f"{DOWN}.attn1.vo": 4, f"{MID}.attn2.qk": 6, f"{MID}.attn2.vo": 6, f"{UP}.ff.ffn": 24}
UNTIED = {f"{DOWN}.attn1.qk": 3, f"{DOWN}.attn2.vo": 5, f"{MID}.attn2.qk": 9, f"{MID}.attn2.vo": 2, f"{UP}.ff.ffn": 1}


def make_unet(ranks: dict[str, int] | None = None, cls=SlimUNet2DConditionModel, **config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if cls is SlimUNet2DConditionModel:
        config["slim_ranks"] = ranks
    return cls(**(CONFIG | config)).eval()


def make_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64).to(dtype)
    return {"sample": sample, "timestep": torch.tensor(7), "encoder_hidden_states": text}


@torch.no_grad()
def run(unet, **inputs) -> torch.Tensor:
    return unet(**(make_inputs(unet.dtype) | inputs)).sample


def expected_attention(layer, x, context, mask=None) -> torch.Tensor:
    """softmax(q k^T / sqrt(r)) v, head by head, with the layer's own matrices; `mask` `(batch, keys)` is added."""
    heads = layer.heads
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    outputs = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        logits = q_h @ k_h.mT / q_h.shape[-1] ** 0.5
        outputs.append((logits if mask is None else logits + mask[:, None]).softmax(-1) @ v_h)
    return layer.to_out[0](torch.cat(outputs, -1))


def shapes(module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def unequal_layers(unet) -> dict[str, UnequalAttention]:
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, UnequalAttention)}


def test_without_ranks_it_is_the_dense_unet():
    dense, slim = make_unet(cls=UNet2DConditionModel), make_unet()
    assert dense.state_dict().keys() == slim.state_dict().keys()
    assert torch.equal(run(dense), run(slim))


@pytest.mark.parametrize("ranks", [TIED, UNTIED], ids=["tied", "untied"])
def test_cut_layers_have_the_widths_asked_for(ranks):
    unet, dense = make_unet(ranks), make_unet()
    for path in {name.rpartition(".")[0] for name in ranks}:
        layer, full = unet.get_submodule(path), dense.get_submodule(path)
        if isinstance(layer, Attention):
            qk = ranks.get(f"{path}.qk", full.to_q.out_features // 2)
            vo = ranks.get(f"{path}.vo", full.to_v.out_features // 2)
            assert [layer.to_q.weight.shape[0], layer.to_k.weight.shape[0]] == [2 * qk, 2 * qk]
            assert [layer.to_v.weight.shape[0], layer.to_out[0].weight.shape[1]] == [2 * vo, 2 * vo]
            assert layer.scale == qk**-0.5
            assert layer.to_q.bias is None
            assert layer.to_out[0].bias.shape == full.to_out[0].bias.shape
        else:
            assert layer.net[0].proj.out_features == 2 * ranks[f"{path}.ffn"]
            assert layer.net[2].in_features == ranks[f"{path}.ffn"]
    untouched = [name for name in dense.state_dict() if not any(name.startswith(r.rpartition(".")[0]) for r in ranks)]
    assert untouched
    assert all(unet.state_dict()[name].shape == dense.state_dict()[name].shape for name in untouched)


def test_tied_attention_is_what_diffusers_itself_would_build():
    cut = make_unet({f"{DOWN}.attn2.qk": 4, f"{DOWN}.attn2.vo": 4}).get_submodule(f"{DOWN}.attn2")
    stock = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=4, bias=False)
    assert type(cut) is Attention
    assert type(cut.processor) is type(stock.processor)
    plain = (int, float, bool, str, type(None))
    attributes = {name: value for name, value in vars(stock).items() if isinstance(value, plain)}
    attributes["training"] = False
    assert {name: getattr(cut, name) for name in attributes} == attributes
    assert shapes(cut) == shapes(stock)


@pytest.mark.parametrize("time", ["default", "scale_shift"])
def test_a_cut_resnet_block_is_what_diffusers_itself_would_build(time):
    cut = make_unet({"mid_block.resnets.0.resnet": 3}, resnet_time_scale_shift=time).mid_block.resnets[0]
    stock = ResnetBlock2D(
        in_channels=32, out_channels=12, conv_2d_out_channels=32, temb_channels=64, groups=4, eps=cut.norm2.eps,
        time_embedding_norm=time,
    ).eval()  # fmt: skip
    assert shapes(cut) == shapes(stock)
    stock.load_state_dict(cut.state_dict())
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 64)
    assert torch.equal(cut(x, temb), stock(x, temb))


def test_a_lora_of_the_dense_convolutions_does_not_fit_a_cut_resnet_block():
    unet = make_unet({"mid_block.resnets.0.resnet": 3}, slim_maps=4)
    for convolution in ("conv1", "conv2"):
        name = f"unet.mid_block.resnets.0.{convolution}.lora_"
        lora = {f"{name}A.weight": torch.zeros(2, 32, 3, 3), f"{name}B.weight": torch.zeros(32, 2, 1, 1)}
        with pytest.raises(ValueError, match=f"{convolution}, which was cut"):
            unet.mapped_lora(lora)
        other = {key.replace("resnets.0", "resnets.1"): x for key, x in lora.items()}
        assert unet.mapped_lora(other).keys() == other.keys()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("qk", "vo"), [(4, 4), (3, 7), (7, 3), (3, None), (None, 3)], ids=["tied", "qk<vo", "qk>vo", "qk only", "vo only"]
)
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_attention_is_the_softmax_formula(kind, qk, vo, masked):
    ranks = {f"{DOWN}.{kind}.{group}": width for group, width in (("qk", qk), ("vo", vo)) if width}
    layer = make_unet(ranks).double().get_submodule(f"{DOWN}.{kind}")
    x, text = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    context = x if kind == "attn1" else text
    mask = torch.randn(2, 1, context.shape[1], dtype=torch.float64) if masked else None
    got = layer(x, encoder_hidden_states=None if kind == "attn1" else text, attention_mask=mask)
    expected = expected_attention(layer, x, context, mask[:, 0] if masked else None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert isinstance(layer, UnequalAttention) == (qk != vo)


@pytest.mark.parametrize(("qk", "vo"), [(3, 7), (7, 3)])
def test_unequal_attention_stays_on_the_fused_kernel(qk, vo):
    layer = make_unet({f"{DOWN}.attn1.qk": qk, f"{DOWN}.attn1.vo": vo}).get_submodule(f"{DOWN}.attn1")
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert layer(torch.randn(2, 6, 16)).shape == (2, 6, 16)


def test_unequal_attention_with_every_option_of_attention():
    torch.manual_seed(0)
    options = {"heads": 2, "dim_head": 8, "norm_num_groups": 4, "residual_connection": True, "bias": True}
    layer = Attention(query_dim=16, cross_attention_norm="layer_norm", rescale_output_factor=3.0, **options)
    layer.group_norm.weight.data.uniform_()
    image, text = torch.randn(2, 16, 3, 3), torch.randn(2, 5, 16)
    for context in (None, text):
        layer.processor = AttnProcessor2_0()
        expected = layer(image, encoder_hidden_states=context)
        layer.processor = SlimAttnProcessor()
        torch.testing.assert_close(layer(image, encoder_hidden_states=context), expected, rtol=0, atol=1e-6)


def test_a_cut_feed_forward_is_geglu_of_its_weights():
    layer = make_unet(TIED).double().get_submodule(f"{UP}.ff")
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    a, g = layer.net[0].proj(x).chunk(2, -1)
    torch.testing.assert_close(layer(x), layer.net[2](a * torch.nn.functional.gelu(g)), rtol=0, atol=1e-14)


def test_options_of_the_dense_layers_survive_the_cut():
    unet = make_unet(UNTIED | {f"{MID}.attn1.qk": 4, f"{MID}.attn1.vo": 4}, upcast_attention=True)
    for name in (f"{DOWN}.attn1", f"{MID}.attn1"):
        layer = unet.get_submodule(name)
        assert layer.upcast_attention
        assert layer.heads == 2


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), accelerate.init_empty_weights])
def test_builds_without_memory_and_takes_weights(context):
    with context():
        empty = make_unet(UNTIED)
    assert all(parameter.is_meta for parameter in empty.parameters())
    unet = make_unet(UNTIED)
    empty.load_state_dict(unet.state_dict(), assign=True)
    assert torch.equal(run(unet), run(empty))


def test_configuration_round_trip(tmp_path):
    unet = make_unet(UNTIED)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["slim_ranks"] == UNTIED
    assert config["slim_format"] == 1
    assert config["auto_map"] == {"AutoModel": "slimdiff_unet.SlimUNet2DConditionModel"}
    assert config["_class_name"] == "SlimUNet2DConditionModel"
    assert (tmp_path / "slimdiff_unet.py").read_bytes() == SlimUNet2DConditionModel.code
    with mock.patch("diffusers.configuration_utils.logger.warning") as warning:
        again = SlimUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(run(unet), run(again))
    warning.assert_not_called()
    dense = make_unet(cls=UNet2DConditionModel)
    from_dense = SlimUNet2DConditionModel.from_config(dense.config, slim_ranks=UNTIED)
    assert shapes(from_dense) == shapes(unet)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ({"down_blocks.7.attn1.qk": 4}, "down_blocks.7.attn1.qk.*no such group"),
        ({f"{DOWN}.attn1.ffn": 4}, "no such group"),
        ({f"{DOWN}.ff.qk": 4}, "no such group"),
        ({DOWN: 4}, "no such group"),
        ({"qk": 4}, "no such group"),
        ({f"{DOWN}.attn1.qk": 0}, "attn1.qk is 0.*from 1 to its dense width 8"),
        ({f"{DOWN}.attn1.vo": 9}, "attn1.vo is 9.*dense width 8"),
        ({f"{DOWN}.ff.ffn": 65}, "ff.ffn is 65.*dense width 64"),
        ({"mid_block.resnets.0.resnet": 9}, "resnet is 9.*dense width 8"),
        ({"mid_block.resnets.0.conv1.resnet": 1}, "no such group"),
        ({"mid_block.resnets.0.ffn": 1}, "no such group"),
        ({f"{DOWN}.ff.ffn": 3.0}, "expected an integer"),
        ({f"{DOWN}.ff.ffn": True}, "expected an integer"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks, text):
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        make_unet(ranks)


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match=r"slim format 2.*up to 1.*Upgrade slimdiff"):
        make_unet(slim_format=2)


SWITCHES = {
    "default": lambda unet: unet.set_default_attn_processor(),
    "plain": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "2_0": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "own": lambda unet: unet.set_attn_processor(unet.attn_processors),
    "slice": lambda unet: unet.set_attention_slice("auto"),
    "slice max": lambda unet: unet.set_attention_slice("max"),
    "unslice": lambda unet: [unet.set_attention_slice(size) for size in ("max", None)],
    "no xformers": lambda unet: unet.set_use_memory_efficient_attention_xformers(False),
    "backend": lambda unet: unet.set_attention_backend("native"),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
    "offload": lambda unet: accelerate.cpu_offload(unet, execution_device=torch.device("cpu")),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("ranks", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_diffusers_do_not_change_the_result(ranks, switch):
    unet = make_unet(ranks)
    before = run(unet)
    result = SWITCHES[switch](unet)
    after = run(result if isinstance(result, UNet2DConditionModel) else unet)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_the_default_processor_is_really_set():
    unet = make_unet(UNTIED)
    assert SlimAttnProcessor in {type(processor) for processor in unet.attn_processors.values()}
    unet.set_default_attn_processor()
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}


def test_fused_projections():
    tied = make_unet(TIED)
    before = run(tied)
    tied.fuse_qkv_projections()
    assert hasattr(tied.get_submodule(f"{DOWN}.attn1"), "to_qkv")
    torch.testing.assert_close(run(tied), before, rtol=0, atol=2e-6)

    untied = make_unet(UNTIED)
    names, before = set(untied.state_dict()), run(untied)
    with pytest.raises(ValueError, match="cannot be fused: query-key and value heads differ in width in 3 layers"):
        untied.fuse_qkv_projections()
    assert set(untied.state_dict()) == names
    assert torch.equal(run(untied), before)


@pytest.mark.parametrize("processor", [FusedAttnProcessor2_0(), PAGIdentitySelfAttnProcessor2_0()])
def test_processors_that_would_be_wrong_are_refused(processor):
    unet = make_unet({f"{MID}.attn2.qk": 9})
    before, processors = run(unet), unet.attn_processors
    name, layer = next(iter(unequal_layers(unet).items()))
    with pytest.raises(ValueError, match=f"{type(processor).__name__} cannot run attention"):
        unet.set_attn_processor(processor)
    assert unet.attn_processors == processors
    with pytest.raises(ValueError, match="cannot run attention"):
        unet.set_attn_processor(processors | {f"{name}.processor": processor})
    with pytest.raises(ValueError, match="cannot run attention"):
        layer.processor = processor
    assert unet.attn_processors == processors
    assert torch.equal(run(unet), before)


@pytest.mark.parametrize("ranks", [TIED, UNTIED], ids=["tied", "untied"])
def test_gradient_checkpointing_gives_the_same_gradients(ranks):
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet(ranks).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**make_inputs()).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][:4])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_freeu_acts_and_goes():
    unet = make_unet(UNTIED)
    before = run(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for block in unet.up_blocks:
        block.resolution_idx = 0
    assert run(unet).isfinite().all()
    unet.disable_freeu()
    assert torch.equal(run(unet), before)


UNTIED_DOWN = {f"{DOWN}.attn1.qk": 3, f"{DOWN}.attn2.vo": 5, f"{DOWN}.ff.ffn": 8}


def test_compiles_without_graph_breaks():
    unet = make_unet(UNTIED_DOWN, **ONE_LEVEL)
    before = run(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**make_inputs()).sample, before, rtol=0, atol=2e-6)


@torch._dynamo.config.patch(recompile_limit=1)  # unlike monkeypatch, it leaves the setting as it was
def test_repeated_blocks_compile_past_the_recompile_limit():
    torch._dynamo.reset()
    unet = make_unet(UNTIED_DOWN, **ONE_LEVEL)
    before = run(unet)
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(unet), before, rtol=0, atol=2e-6)
    assert torch._dynamo.config.recompile_limit == 4 * 3


def make_lora(unet, targets: list[str]) -> dict[str, torch.Tensor]:
    weights = {}
    for name in targets:
        outputs, inputs = unet.get_submodule(name).weight.shape
        weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, inputs)
        weights[f"unet.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    return weights


LORA_TARGETS = [f"{DOWN}.attn1.to_q", f"{DOWN}.attn2.to_v", f"{MID}.attn2.to_out.0", f"{UP}.ff.net.2"]


def test_a_dense_lora_is_refused_and_leaves_no_trace():
    pytest.importorskip("peft")
    unet = make_unet(UNTIED)
    names, before = list(unet.state_dict()), run(unet)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*Merge it into the dense model"):
        unet.load_lora_adapter(make_lora(make_unet(), LORA_TARGETS), prefix="unet")
    assert list(unet.state_dict()) == names
    assert torch.equal(run(unet), before)


def test_a_lora_of_the_slim_model_loads_and_stays_when_a_dense_one_is_refused():
    pytest.importorskip("peft")
    unet = make_unet(UNTIED)
    before, lora = run(unet), make_lora(unet, LORA_TARGETS)
    unet.load_lora_adapter(lora, prefix="unet", adapter_name="own")
    with_lora = run(unet)
    assert (with_lora - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="does not fit"):
        unet.load_lora_adapter(make_lora(make_unet(), LORA_TARGETS), prefix="unet", adapter_name="other")
    unet.set_adapters("own")
    assert torch.equal(run(unet), with_lora)

    merged = make_unet(UNTIED)
    for name in LORA_TARGETS:
        delta = lora[f"unet.{name}.lora_B.weight"] @ lora[f"unet.{name}.lora_A.weight"]
        merged.get_submodule(name).weight.data += delta
    torch.testing.assert_close(with_lora, run(merged), rtol=1e-4, atol=1e-4)


def make_ip_adapter(unet) -> dict[str, dict[str, torch.Tensor]]:
    keys = {}
    for number, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for matrix in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{matrix}.weight"] = torch.randn(width, 12)
    projection = {"proj.weight": torch.randn(48, 6), "proj.bias": torch.randn(48)}
    norm = {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    return {"image_proj": projection | norm, "ip_adapter": keys}


@pytest.mark.parametrize("group", ["qk", "vo"])
def test_an_ip_adapter_is_refused_where_cross_attention_is_cut(group):
    unet = make_unet({f"{DOWN}.attn1.qk": 4, f"{MID}.attn2.{group}": 4})
    before = run(unet)
    with pytest.raises(ValueError, match=rf"IP-Adapter.*1 groups, {MID}.attn2.{group} among them"):
        unet._load_ip_adapter_weights([make_ip_adapter(make_unet())])
    assert torch.equal(run(unet), before)


def test_an_ip_adapter_loads_where_cross_attention_is_whole():
    unet = make_unet({f"{DOWN}.attn1.qk": 4, f"{UP}.ff.ffn": 8})
    before = run(unet)
    unet._load_ip_adapter_weights([make_ip_adapter(unet)])
    images = {"image_embeds": [torch.randn(2, 1, 6)]}
    assert (run(unet, added_cond_kwargs=images) - before).abs().max() > 1e-4
    assert isinstance(unet.get_submodule(f"{DOWN}.attn1").processor, SlimAttnProcessor)


def test_xformers_is_asked_for_heads_of_both_widths():
    """The library itself needs a GPU; here its kernel is replaced by the formula."""

    def kernel(query, key, value, attn_bias, op, scale):
        assert query.shape[-1] != value.shape[-1]
        return (query @ key.mT * scale).softmax(-1) @ value

    layer = make_unet(UNTIED).get_submodule(f"{DOWN}.attn1")
    x = torch.randn(2, 6, 16)
    before = layer(x)
    layer.set_processor(XFormersAttnProcessor())
    library = mock.Mock()
    library.ops.memory_efficient_attention = kernel
    with mock.patch("diffusers.models.attention_processor.xformers", library):
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)
