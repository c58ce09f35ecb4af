"""U-Net against diffusers' UNet2DModel with the same random weights."""

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised

import smalti
from smalti.errors import UserError
from smalti.interop.unet import UNET
from smalti.models import preset
from smalti.types import Condition

PLAIN, ATTENDED = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
ADM = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")


def levels(*types):
    return {"down_block_types": [t[0] for t in types], "up_block_types": [t[1] for t in reversed(types)]}


CASES = {
    "DDPM": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), **levels(PLAIN, ATTENDED),
        "layers_per_block": 2, "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1,
        "downsample_padding": 0, "norm_eps": 1e-6, "sample_size": (8, 12),
    },
    "classes and heads": {
        "in_channels": 1, "out_channels": 2, "block_out_channels": (16, 8, 24), **levels(ATTENDED, PLAIN, ATTENDED),
        "layers_per_block": 1, "attention_head_dim": 4, "num_class_embeds": 5, "sample_size": 12,
        "time_embedding_dim": 20, "attn_norm_num_groups": 2,
    },
    "ADM": {
        "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 16, 16), **levels(ADM, ATTENDED, ADM),
        "layers_per_block": 2, "attention_head_dim": 8, "num_class_embeds": 5, "sample_size": 8, "dropout": 0.1,
        "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    },
    "scale and shift, no norm in the middle": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": (12, 8), **levels(PLAIN, ATTENDED),
        "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8, "act_fn": "swish",
    },
    "no attention": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 8), **levels(PLAIN, PLAIN),
        "layers_per_block": 1, "add_attention": False,
    },
    "residual types at levels that change nothing": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8,
        "down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "an epsilon that counts": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), **levels(PLAIN, ATTENDED),
        "layers_per_block": 1, "norm_eps": 0.03, "sample_size": 8,
    },
    "no middle": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 8), **levels(PLAIN, ATTENDED),
        "layers_per_block": 1, "mid_block_type": None, "sample_size": 4,
    },
}  # fmt: skip


def reference(name, **changes):
    return randomised(diffusers.UNet2DModel(norm_num_groups=4, **{**CASES[name], **changes}))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_input_gradients_are_equal(name):
    theirs = reference(name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CASES[name]["in_channels"], 12, 8, generator=generator)
    t = torch.tensor([0.0, 417.0, 999.0])
    labels = torch.tensor([0, 3, 4]) if "num_class_embeds" in CASES[name] else None
    cond = None if labels is None else Condition(class_labels=labels)
    assert_parity(theirs, lambda x, t: theirs(x, t, class_labels=labels).sample, x, t, cond)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    assert_round_trip(reference(name))


def test_a_norm_of_the_middle_is_written_where_none_would_drop_it():
    config = preset("UNet-Tiny")
    assert (config.time_modulation, config.middle_norm_groups) == ("scale_shift", None)
    theirs = diffusers.UNet2DModel(**UNET.write_config(config))
    assert theirs.mid_block.attentions[0].group_norm.num_groups == config.norm_groups
    assert UNET.read_config(dict(theirs.config)).middle_norm_groups == config.norm_groups


def test_keys_are_the_documented_ones():
    theirs = reference("classes and heads", block_out_channels=(8, 16), **levels(PLAIN, ATTENDED))
    layout = UNET.diffusers(UNET.read_config(dict(theirs.config)))
    resnet = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    attention = ["group_norm", "to_q", "to_k", "to_v", "to_out.0"]
    layers = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out"]
    layers += ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]
    names = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]
    names += [f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(2)]
    layers += [f"{name}.{part}" for name in names for part in resnet]
    layers += [f"{name}.conv_shortcut" for name in names if name.startswith("up") or name == "down_blocks.1.resnets.0"]
    names = ["down_blocks.1", "mid_block"]
    layers += [f"{name}.attentions.0.{part}" for name in names for part in attention]
    layers += [f"up_blocks.0.attentions.{j}.{part}" for j in range(2) for part in attention]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"class_embedding.weight"}
    assert {name for rule in layout.rules for name in rule.theirs} == expected
    state = smalti.load_backbone(theirs).state_dict()
    block = theirs.up_blocks[0].attentions[1]
    assert torch.equal(state["up.0.attentions.1.attn.qkv.weight"][16:32], block.to_k.weight)
    assert torch.equal(state["modulation.weight"][:8], theirs.down_blocks[0].resnets[0].time_emb_proj.weight)
    assert torch.equal(state["modulation.weight"][-8:], theirs.up_blocks[1].resnets[1].time_emb_proj.weight)


@pytest.mark.parametrize("name", ["DDPM-CIFAR10", "ADM-ImageNet64"])
def test_presets_are_expressible_and_of_their_size(name):
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**UNET.write_config(preset(name)))
    layout = UNET.diffusers(preset(name))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    with torch.device("meta"):
        ours = layout.to_theirs(smalti.models.network_of(preset(name)).state_dict())
    assert {key: tuple(value.shape) for key, value in ours.items()} == shapes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"out_channels": 3}, "only 2 or 4"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, "the same levels"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}, "one way of resampling"),
        ({"downsample_padding": 2}, "0 or 1"),
        ({"surprise": 1}, "not known"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(change, says):
    body = {"norm_num_groups": 4, **CASES["no attention"], **change}
    with pytest.raises(UserError, match=says):
        UNET.read_config(body)
