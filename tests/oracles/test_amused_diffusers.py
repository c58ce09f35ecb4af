"""aMUSEd against diffusers' UVit2DModel with the same random weights, and open-muse's names of its tensors."""

from dataclasses import replace

import diffusers
import pytest
import torch
from oracles.parity import assert_round_trip, assert_same_function, randomised
from safetensors.torch import save_file

import smalti
from smalti.errors import UserError
from smalti.interop.amused import AMUSED
from smalti.models import AmusedConfig
from smalti.types import Condition

TINY = {
    "hidden_size": 64, "cond_embed_dim": 24, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
    "encoder_hidden_size": 20, "vocab_size": 40, "codebook_size": 32, "in_channels": 12, "block_out_channels": 48,
    "num_res_blocks": 2, "block_num_heads": 4, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 72, "sample_size": 8,
}  # fmt: skip
CASES = {  # fields beside TINY's; rows and columns of the tokens
    "plain": ({}, (5, 7)),
    "downsample": ({"downsample": True, "upsample": True}, (6, 10)),
    "one width": ({"block_out_channels": 64, "num_res_blocks": 1}, (3, 4)),
    "many text tokens": ({"downsample": True, "upsample": True, "layer_norm_eps": 1e-5}, (4, 4)),
    "odd sinusoid": ({"micro_cond_encode_dim": 7, "micro_cond_embed_dim": 21}, (6, 6)),
}


def reference(fields):
    model = diffusers.UVit2DModel(**TINY | fields)
    return randomised(model)


def condition(model, batch, text_tokens):
    generator = torch.Generator().manual_seed(2)
    config = model.config
    micro = config.micro_cond_embed_dim // config.micro_cond_encode_dim
    return Condition(
        text_embeds=torch.randn(batch, text_tokens, config.encoder_hidden_size, generator=generator),
        pooled_embeds=torch.randn(batch, config.cond_embed_dim, generator=generator),
        micro_conditions=torch.tensor([512.0, 384.0, 0.0, 16.0, 6.5])[:micro].repeat(batch, 1)
        * torch.rand(batch, micro, generator=generator),
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_equal(name):
    fields, size = CASES[name]
    theirs = reference(fields)
    ours = smalti.load_backbone(theirs)
    x = torch.randint(0, 40, (3, *size), generator=torch.Generator().manual_seed(1))
    cond = condition(theirs, 3, text_tokens=300 if name == "many text tokens" else 9)

    def call(text, pooled):
        return theirs(x, text, pooled, cond.micro_conditions)

    # Tokens are integers: the gradients are those by what the network is told.
    assert_same_function(
        lambda text: ours(x, None, replace(cond, text_embeds=text)),
        lambda text: call(text, cond.pooled_embeds),
        cond.text_embeds,
    )
    assert_same_function(
        lambda pooled: ours(x, None, replace(cond, pooled_embeds=pooled)),
        lambda pooled: call(cond.text_embeds, pooled),
        cond.pooled_embeds,
    )


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    assert_round_trip(reference(CASES[name][0]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"downsample": True}, "only both or neither"),
        ({"use_bias": True}, "use_bias=True"),
        ({"ln_elementwise_affine": False}, "ln_elementwise_affine=False"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ({"micro_cond_embed_dim": 41}, "must divide by 8"),
    ],
)
def test_what_the_network_does_not_have_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        AMUSED.read_config(TINY | fields)


def test_absent_fields_are_the_classes_defaults():
    with torch.device("meta"):
        default = diffusers.UVit2DModel()
    assert AMUSED.read_config({}) == AMUSED.read_config(dict(default.config)) == AmusedConfig(grid_size=64)


@pytest.mark.parametrize(("name", "downsample"), [("aMUSEd-256", False), ("aMUSEd-512", True)])
def test_presets_have_as_many_parameters_as_diffusers(name, downsample):
    from smalti.models import network_of, preset

    with torch.device("meta"):
        ours = network_of(preset(name))
        theirs = diffusers.UVit2DModel(downsample=downsample, upsample=downsample)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count // 10**6 == {"aMUSEd-256": 603, "aMUSEd-512": 608}[name]  # aMUSEd, section 3


def open_muse_names(layers, pairs, resampled, mapped):
    """open-muse's tensor -> diffusers' tensor(s), after diffusers' own converter and open-muse's modules."""
    names = {
        "encoder_proj.weight": "encoder_proj.weight",
        "encoder_proj_layer_norm.weight": "encoder_proj_layer_norm.weight",
        "embed.embeddings.weight": "embed.embeddings.weight",
        "embed.layer_norm.weight": "embed.layer_norm.weight",
        "embed.conv.weight": "embed.conv.weight",
        "cond_embed.0.weight": "cond_embed.linear_1.weight",
        "cond_embed.2.weight": "cond_embed.linear_2.weight",
        "project_to_hidden_norm.weight": "project_to_hidden_norm.weight",
        "project_to_hidden.weight": "project_to_hidden.weight",
        "project_from_hidden_norm.weight": "project_from_hidden_norm.weight",
        "project_from_hidden.weight": "project_from_hidden.weight",
        "mlm_layer.conv1.weight": "mlm_layer.conv1.weight",
        "mlm_layer.layer_norm.norm.weight": "mlm_layer.layer_norm.weight",
        "mlm_layer.conv2.weight": "mlm_layer.conv2.weight",
    }
    if resampled:
        names |= {
            "down_blocks.0.downsample.0.norm.weight": "down_block.downsample.norm.weight",
            "down_blocks.0.downsample.1.weight": "down_block.downsample.conv.weight",
            "up_blocks.0.upsample.0.norm.weight": "up_block.upsample.norm.weight",
            "up_blocks.0.upsample.1.weight": "up_block.upsample.conv.weight",
        }
    attention = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    for side in ("down", "up"):
        for i in range(pairs):
            theirs, here = f"{side}_blocks.0.res_blocks.{i}", f"{side}_block.res_blocks.{i}"
            names |= {
                f"{theirs}.depthwise.weight": f"{here}.depthwise.weight",
                f"{theirs}.norm.norm.weight": f"{here}.norm.weight",
                f"{theirs}.channelwise.0.weight": f"{here}.channelwise_linear_1.weight",
                f"{theirs}.channelwise.2.gamma": f"{here}.channelwise_norm.gamma",
                f"{theirs}.channelwise.2.beta": f"{here}.channelwise_norm.beta",
                f"{theirs}.channelwise.4.weight": f"{here}.channelwise_linear_2.weight",
                f"{theirs}.adaLN_modulation.mapper.weight": f"{here}.cond_embeds_mapper.weight",
            }
            theirs, here = f"{side}_blocks.0.attention_blocks.{i}", f"{side}_block.attention_blocks.{i}"
            if mapped:
                names[f"{theirs}.kv_mapper.weight"] = f"{here}.kv_mapper.weight"
            names[f"{theirs}.attn_layer_norm.weight"] = f"{here}.norm1.weight"
            names[f"{theirs}.crossattn_layer_norm.weight"] = f"{here}.norm2.weight"
            for part, name in attention.items():
                names[f"{theirs}.attention.{part}.weight"] = f"{here}.attn1.{name}.weight"
                names[f"{theirs}.crossattention.{part}.weight"] = f"{here}.attn2.{name}.weight"
    for i in range(layers):
        layer = f"transformer_layers.{i}"
        names |= {
            f"{layer}.attn_layer_norm.weight": f"{layer}.norm1.norm.weight",
            f"{layer}.self_attn_adaLN_modulation.mapper.weight": f"{layer}.norm1.linear.weight",
            f"{layer}.crossattn_layer_norm.weight": f"{layer}.norm2.norm.weight",
            f"{layer}.cross_attn_adaLN_modulation.mapper.weight": f"{layer}.norm2.linear.weight",
            f"{layer}.ffn.pre_mlp_layer_norm.weight": f"{layer}.norm3.norm.weight",
            f"{layer}.ffn.adaLN_modulation.mapper.weight": f"{layer}.norm3.linear.weight",
            f"{layer}.ffn.wo.weight": f"{layer}.ff.net.2.weight",
        }
        for part, name in attention.items():
            names[f"{layer}.attention.{part}.weight"] = f"{layer}.attn1.{name}.weight"
            names[f"{layer}.crossattention.{part}.weight"] = f"{layer}.attn2.{name}.weight"
    return names


@pytest.mark.parametrize("name", ["plain", "downsample", "one width"])
def test_open_muse_layout(name):
    theirs = reference(CASES[name][0])
    config = AMUSED.read_config(dict(theirs.config))
    ours = smalti.load_backbone(theirs).state_dict()
    (original,) = AMUSED.originals
    layout = original.layout(config)
    stored = layout.to_theirs(ours)
    names = open_muse_names(config.depth, config.conv_depth, config.downsample, config.width != config.conv_width)
    gates = {f"transformer_layers.{i}.ffn.wi_{n}.weight" for i in range(config.depth) for n in (0, 1)}
    assert set(stored) == set(names) | gates
    reference_tensors = theirs.state_dict()
    assert all(torch.equal(stored[old], reference_tensors[new]) for old, new in names.items())
    for i in range(config.depth):
        layer = f"transformer_layers.{i}"
        proj = torch.cat([stored[f"{layer}.ffn.wi_1.weight"], stored[f"{layer}.ffn.wi_0.weight"]])
        assert torch.equal(proj, reference_tensors[f"{layer}.ff.net.0.proj.weight"])
    again = layout.to_ours(stored)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize("downsample", [False, True])
def test_an_open_muse_file_is_recognised(tmp_path, downsample):
    config = AmusedConfig(
        codebook_size=32, vocabulary_size=40, grid_size=32 if downsample else 16, width=128, depth=1, num_heads=2,
        mlp_width=72, token_width=12, conv_width=64, conv_depth=1, conv_heads=1, downsample=downsample, text_width=20,
        pooled_width=24,
    )  # fmt: skip
    ours = smalti.models.build_model(config).eval()
    (original,) = AMUSED.originals
    save_file(original.layout(config).to_theirs(ours.state_dict()), tmp_path / "muse.safetensors")
    loaded = smalti.load_backbone(tmp_path / "muse.safetensors")
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in ours.state_dict().items())
