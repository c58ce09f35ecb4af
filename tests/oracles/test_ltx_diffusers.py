"""LTX-Video against diffusers' LTXVideoTransformer3DModel with the same random weights, and the authors' names."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from oracles.parity import assert_parity, assert_round_trip, randomised
from safetensors.torch import save_file

import smalti
from smalti.errors import UserError
from smalti.interop.formats import original_of_tensors
from smalti.interop.ltx import LTX
from smalti.models import LTXConfig, network_of
from smalti.types import Condition

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "num_layers": 2, "caption_channels": 12,
}  # fmt: skip
PATCHED = {"patch_size": 3, "patch_size_t": 2, "in_channels": 36, "out_channels": 54}
WIDER = {"num_attention_heads": 3, "attention_head_dim": 12, "cross_attention_dim": 36, "norm_eps": 1e-4}
CASES = {  # the class's config, the latents' (frames, height, width), whether some text is padding
    "wide, masked": ({}, (3, 4, 6), True),
    "tall": ({}, (2, 7, 3), False),
    "one frame, width divides by 6": (WIDER, (1, 5, 4), True),
    "patches": (PATCHED, (4, 6, 9), True),
}
MASK = torch.tensor([[True] * 5, [True, True, False, False, False]])
SCALE = (8 / 25, 32, 32)  # LTXPipeline's rope_interpolation_scale at 25 frames a second


def reference(change, std=0.1):
    return randomised(diffusers.LTXVideoTransformer3DModel(**{**TINY, **change}), std)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("std", [0.1, 0.01])  # small weights give small activations, in which each norm's eps counts
def test_outputs_and_input_gradients_are_equal(case, std):
    change, size, masked = CASES[case]
    theirs = reference(change, std)
    p, p_t = theirs.config.patch_size, theirs.config.patch_size_t
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, theirs.config.in_channels // (p * p * p_t), *size, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    grid = (size[0] // p_t, size[1] // p, size[2] // p)

    def call(x, t):
        packed = LTXPipeline._pack_latents(x, p, p_t)
        mask = MASK.long() if masked else None
        output = theirs(packed, text, t, mask, *grid, rope_interpolation_scale=SCALE).sample
        return LTXPipeline._unpack_latents(output, *grid, p, p_t)

    condition = Condition(text_embeds=text, text_mask=MASK if masked else None)
    assert_parity(theirs, call, x, torch.tensor([3.0, 721.0]), condition)


def test_causal_positions_and_frame_rate_are_those_of_the_condition_pipeline():
    theirs, frame_rate = reference({}), 30.0
    x, t, text = torch.randn(2, 4, 3, 4, 6), torch.tensor([3.0, 721.0]), torch.randn(2, 5, 12)
    ids = LTXConditionPipeline._prepare_video_ids(2, 3, 4, 6)
    coordinates = LTXConditionPipeline._scale_video_ids(ids, 32, 8).float()
    coordinates[:, 0] = coordinates[:, 0] * (1.0 / frame_rate)
    expected = theirs(x.flatten(2).transpose(1, 2), text, t, None, video_coords=coordinates).sample
    ours = smalti.load_backbone(theirs)
    config = dataclasses.replace(ours.config, causal_positions=True, frame_rate=frame_rate)
    network = network_of(config)
    network.load_state_dict(ours.state_dict())
    output = network(x, t, Condition(text_embeds=text))
    error = (output.flatten(2).transpose(1, 2) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert (ours(x, t, Condition(text_embeds=text)) - output).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    theirs = reference(CASES[case][0])
    assert_round_trip(theirs)
    written = LTX.write_config(LTX.read_config(dict(theirs.config)))
    assert {name: theirs.config[name] for name in written} == written


def test_what_a_config_leaves_out_is_as_published():
    assert LTX.read_config({}) == LTXConfig()
    assert LTX.read_config({**TINY, "out_channels": None}).out_channels == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"cross_attention_dim": 16}, "cross_attention_dim=16"),
        ({"patch_size": 3, "out_channels": 9}, "must divide by the 9 places"),
        ({"patch_size": 3, "in_channels": 9}, "must divide by the 9 places"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"attention_out_bias": False}, "attention_out_bias=False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"audio": True}, "audio=True"),
    ],
)
def test_configs_that_ours_does_not_have_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        LTX.read_config({**TINY, **change})


def original_from_diffusers(tensors):
    """The documented map (networks.md, 1.8), from diffusers' state dict to the authors'."""

    def renamed(name):
        head, *rest = name.split(".")
        head = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}.get(head, head)
        return ".".join([head, *({"norm_q": "q_norm", "norm_k": "k_norm"}.get(part, part) for part in rest)])

    return {renamed(name): tensor for name, tensor in tensors.items()}


def test_original_layout_is_the_documented_one_both_ways():
    theirs = reference({})
    config = LTX.read_config(dict(theirs.config))
    expected = original_from_diffusers(theirs.state_dict())
    ours = LTX.diffusers(config).to_ours(theirs.state_dict())
    layout = LTX.originals[0].layout(config)
    original = layout.to_theirs(ours)
    assert {"patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"} < set(original)
    assert {"transformer_blocks.1.attn2.q_norm.weight", "scale_shift_table"} < set(original)
    assert set(original) == set(expected)
    assert all(torch.equal(original[name], expected[name]) for name in expected)
    again = layout.to_ours(original)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_original_file_is_recognised(tmp_path):
    theirs = reference(
        {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "out_channels": 6}
    )
    original = original_from_diffusers(theirs.state_dict())
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    save_file({**file, "vae.decoder.timestep_scale_multiplier": torch.ones(1)}, tmp_path / "ltx.safetensors")
    network = smalti.load_backbone(tmp_path / "ltx.safetensors")
    assert network.config == LTX.read_config(dict(theirs.config))
    expected = smalti.load_backbone(theirs).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("width", "heads"), [(2048, 32), (4096, 32), (128, 2), (32, 1)])
def test_published_widths_have_32_heads_and_others_heads_of_64(width, heads):
    expected = LTXConfig(depth=1, width=width, num_heads=heads)
    with torch.device("meta"):
        ours = network_of(expected).state_dict()
    original = LTX.originals[0].layout(expected).to_theirs(ours)
    config, form = original_of_tensors(original, "a test")
    assert form.name == "LTX-Video"
    assert config == expected
