"""Sana against diffusers' SanaTransformer2DModel with the same random weights, and its original files."""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers
from oracles.parity import assert_parity, assert_round_trip, randomised

import smalti
from smalti.errors import UserError
from smalti.interop.formats import format_of_class, original_of_tensors
from smalti.models import network_of
from smalti.nn.positions import rescaled_sincos_grid
from smalti.types import Condition

SMALL = {
    "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 20, "sample_size": 8,
    "in_channels": 4, "out_channels": 4,
}  # fmt: skip
CASES = {  # diffusers' fields, size of the latents, with a text mask
    "sana": ({}, (8, 8), True),
    "sprint": ({"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, (6, 9), True),
    "positions": ({"interpolation_scale": 2.0, "patch_size": 2}, (12, 10), False),
    "native positions": ({"interpolation_scale": 1.0, "attention_bias": True, "norm_eps": 1e-3}, (8, 8), False),
    "learned sigma": ({"out_channels": 8, "mlp_ratio": 1.3, "in_channels": 3}, (1, 5), True),
}


def reference(**fields):
    return randomised(diffusers.SanaTransformer2DModel(**SMALL | fields))


def inputs(theirs, size, masked, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, theirs.config.in_channels, *size, generator=generator)
    return x, Condition(
        text_embeds=torch.randn(batch, 6, theirs.config.caption_channels, generator=generator),
        text_mask=torch.arange(6) < torch.tensor([[6], [1], [4]])[:batch] if masked else None,
        guidance=torch.tensor([0.45, 0.1, 2.0])[:batch] if theirs.config.guidance_embeds else None,
    )


def call_theirs(theirs, x, t, cond):
    return theirs(
        x,
        encoder_hidden_states=cond.text_embeds,
        timestep=t,
        guidance=cond.guidance,
        encoder_attention_mask=cond.text_mask,
    ).sample


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_equal(case):
    fields, size, masked = CASES[case]
    theirs = reference(**fields)
    x, cond = inputs(theirs, size, masked)
    t = torch.tensor([0.0, 417.5, 999.0])
    assert_parity(theirs, lambda x, t: call_theirs(theirs, x, t, cond), x, t, cond)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    assert_round_trip(reference(**CASES[case][0]))


def test_fields_for_who_calls_the_network_are_kept():
    form = format_of_class("SanaTransformer2DModel")
    config = form.read_config({"timestep_scale": 1000.0, "guidance_embeds_scale": 0.2})
    assert (config.timestep_scale, config.guidance_embeds_scale) == (1000.0, 0.2)
    assert form.write_config(config)["timestep_scale"] == 1000.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cross_attention_dim": 16}, "cross_attention_dim=16"),
        ({"cross_attention_head_dim": 8}, "cross_attention_head_dim=8"),
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"frame_rate": 8}, "frame_rate=8"),
    ],
)
def test_fields_that_our_network_does_not_have_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        format_of_class("SanaTransformer2DModel").read_config(SMALL | fields)


def original_keys(depth, distilled):
    """The keys of NVlabs/Sana's state dict, by its source (diffusion/model/nets) and diffusers' converter."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1"]
    layers += ["y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear"]
    layers += ["cfg_embedder.mlp.0", "cfg_embedder.mlp.2"] if distilled else []
    keys = {"pos_embed", "y_embedder.y_embedding", "attention_y_norm.weight", "final_layer.scale_shift_table"}
    for i in range(depth):
        parts = ("attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
        layers += [f"blocks.{i}.{p}" for p in (*parts, "mlp.inverted_conv.conv", "mlp.depth_conv.conv")]
        weights = ["attn.qkv", "mlp.point_conv.conv"]
        weights += [f"{a}.{n}" for a in ("attn", "cross_attn") for n in ("q_norm", "k_norm")] if distilled else []
        keys |= {f"blocks.{i}.scale_shift_table", *(f"blocks.{i}.{w}.weight" for w in weights)}
    return keys | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def original_file(distilled, table, seed=0):
    """A random original state dict: heads of 32 and 64, 2 blocks, 4x4 latents."""
    generator = torch.Generator().manual_seed(seed)
    width, text_width, depth, hidden = 128, 20, 2, 320
    shapes = {
        "x_embedder.proj": (width, 4, 1, 1),
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, text_width), "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (4, width),
    }  # fmt: skip
    if distilled:
        shapes |= {"cfg_embedder.mlp.0": (width, 256), "cfg_embedder.mlp.2": (width, width)}
    without_bias = {}
    for i in range(depth):
        name = f"blocks.{i}"
        without_bias |= {f"{name}.attn.qkv": (3 * width, width), f"{name}.mlp.point_conv.conv": (width, hidden, 1, 1)}
        shapes |= {
            f"{name}.attn.proj": (width, width), f"{name}.cross_attn.q_linear": (width, width),
            f"{name}.cross_attn.kv_linear": (2 * width, width), f"{name}.cross_attn.proj": (width, width),
            f"{name}.mlp.inverted_conv.conv": (2 * hidden, width, 1, 1),
            f"{name}.mlp.depth_conv.conv": (2 * hidden, 1, 3, 3),
        }  # fmt: skip
        if distilled:
            norms = [f"{name}.{a}.{n}" for a in ("attn", "cross_attn") for n in ("q_norm", "k_norm")]
            without_bias |= dict.fromkeys(norms, (width,))
    everything = shapes | without_bias | {"attention_y_norm": (width,)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in everything.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1 for name, shape in shapes.items()}
    tables = [*(f"blocks.{i}.scale_shift_table" for i in range(depth)), "final_layer.scale_shift_table"]
    tensors |= {n: torch.randn(6 if "blocks" in n else 2, width, generator=generator) for n in tables}
    tensors["y_embedder.y_embedding"] = torch.randn(7, text_width, generator=generator)
    tensors["pos_embed"] = table
    return tensors


TABLES = {None: torch.zeros(1, 16, 128), 2.0: rescaled_sincos_grid(128, 4, 4, (4, 4), 2.0)[None]}


@pytest.mark.parametrize(("distilled", "scale"), [(False, None), (False, 2.0), (True, None)])
def test_original_files(tmp_path, distilled, scale):
    original = original_file(distilled, TABLES[scale])
    assert set(original) == original_keys(2, distilled)
    config, form = original_of_tensors(original, "a test")
    assert form.name == "Sana"
    assert (config.num_heads, config.num_cross_heads, config.image_size) == (4, 2, (4, 4))
    assert (config.interpolation_scale, config.guidance_embeds, config.qk_norm) == (scale, distilled, distilled)
    layout = form.layout(config)
    ours = layout.to_ours(original)
    back = layout.to_theirs(ours)
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
    again = layout.to_ours(back)
    assert set(again) == set(ours) == set(network_of(config).state_dict())
    assert all(torch.equal(again[name], ours[name]) for name in ours)

    sana = format_of_class("SanaTransformer2DModel")
    given = sana.diffusers(config).to_theirs(ours)
    theirs = diffusers.SanaTransformer2DModel(**sana.write_config(config))
    expected = expected_diffusers(original, distilled)
    assert set(given) == set(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    theirs.load_state_dict(expected)

    logvar = {"logvar_linear.weight": torch.zeros(1, 128), "logvar_linear.bias": torch.zeros(1)} if distilled else {}
    torch.save({"state_dict": original | logvar}, tmp_path / "Sana.pth")
    loaded = smalti.load_backbone(tmp_path / "Sana.pth")
    x, cond = inputs(theirs, (4, 6), masked=True)
    t = torch.tensor([0.0, 417.0, 999.0])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x, t, cond), call_theirs(theirs, x, t, cond), rtol=1e-4, atol=1e-5)


def expected_diffusers(original, distilled):
    """diffusers' own conversion, and for the distilled network the keys that only its script knows."""
    script = {}
    if distilled:
        new = {"t_embedder": "timestep_embedder", "cfg_embedder": "guidance_embedder"}
        for embedder in new:
            for old, layer in (("0", "linear_1"), ("2", "linear_2")):
                for kind in ("weight", "bias"):
                    script[f"time_embed.{new[embedder]}.{layer}.{kind}"] = original[f"{embedder}.mlp.{old}.{kind}"]
        for i in range(2):
            for old, attention in (("attn", "attn1"), ("cross_attn", "attn2")):
                for part in "qk":
                    name = f"transformer_blocks.{i}.{attention}.norm_{part}.weight"
                    script[name] = original[f"blocks.{i}.{old}.{part}_norm.weight"]
    converted = convert_sana_transformer_to_diffusers(dict(original))
    return {n: t for n, t in converted.items() if not (distilled and n.startswith("time_embed.emb."))} | script
