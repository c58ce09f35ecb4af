"""PixArt against diffusers' PixArtTransformer2DModel with the same random weights, and its original files."""

import json

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised

import smalti
from smalti.errors import UserError
from smalti.interop.formats import format_of_class, original_of_tensors
from smalti.models import network_of, preset
from smalti.nn.positions import rescaled_sincos_grid
from smalti.types import Condition

SMALL = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "caption_channels": 20}
CASES = {  # diffusers' fields, size of the latents, with a text mask
    "alpha": ({}, (8, 8), True),
    "micro conditions": ({"use_additional_conditions": True, "interpolation_scale": 2}, (8, 12), True),
    "sigma": ({"out_channels": 4, "interpolation_scale": 0.5, "patch_size": 1}, (5, 7), False),
    "unprojected text": ({"caption_channels": None, "cross_attention_dim": 12, "norm_eps": 1e-3}, (14, 6), False),
    "defaults": ({"sample_size": 128, "num_layers": 1, "out_channels": None, "in_channels": 3}, (6, 10), True),
}


def reference(**fields):
    fields = SMALL | {"cross_attention_dim": 48} | fields
    return randomised(diffusers.PixArtTransformer2DModel(**fields))


def inputs(theirs, size, masked, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, theirs.config.in_channels, *size, generator=generator)
    text_width = theirs.config.caption_channels or theirs.config.cross_attention_dim
    return x, Condition(
        text_embeds=torch.randn(batch, 6, text_width, generator=generator),
        text_mask=torch.arange(6) < torch.tensor([[6], [1], [4]])[:batch] if masked else None,
        micro_conditions=torch.tensor([[512.0, 768.0, 0.67], [1024.0, 256.0, 4.0], [64.0, 64.0, 1.0]])[:batch]
        if theirs.use_additional_conditions
        else None,
    )


def call_theirs(theirs, x, t, cond):
    sizes = cond.micro_conditions
    return theirs(
        x,
        encoder_hidden_states=cond.text_embeds,
        timestep=t,
        encoder_attention_mask=cond.text_mask,
        added_cond_kwargs={"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]} if sizes is not None else None,
    ).sample


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_equal(case):
    fields, size, masked = CASES[case]
    theirs = reference(**fields)
    x, cond = inputs(theirs, size, masked)
    t = torch.tensor([0.0, 417.0, 999.0])
    assert_parity(theirs, lambda x, t: call_theirs(theirs, x, t, cond), x, t, cond)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    assert_round_trip(reference(**CASES[case][0]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cross_attention_dim": 32}, "cross_attention_dim=32"),
        ({"out_channels": 3}, "out_channels=3"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"frame_rate": 8}, "frame_rate=8"),
    ],
)
def test_fields_that_our_network_does_not_have_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        format_of_class("PixArtTransformer2DModel").read_config(SMALL | {"cross_attention_dim": 48} | fields)


def test_squares_only_can_be_written():
    import dataclasses

    config = dataclasses.replace(preset("PixArt-XL/2"), image_size=(64, 32))
    with pytest.raises(UserError, match="image_size"):
        format_of_class("PixArtTransformer2DModel").write_config(config)


@pytest.mark.parametrize("norm_type", ["ada_norm_single", "ada_norm_zero"])
def test_folders_of_the_old_class_load(tmp_path, norm_type):
    """The published PixArt and DiT folders name Transformer2DModel as their class."""
    single = norm_type == "ada_norm_single"
    theirs = diffusers.Transformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=48 if single else None,
        caption_channels=20 if single else None,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type=norm_type,
        norm_elementwise_affine=False,
        use_additional_conditions=False if single else None,
    )
    randomised(theirs)
    if not single:
        for block in theirs.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "Transformer2DModel"
    ours = smalti.load_backbone(tmp_path)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    if single:
        cond = Condition(text_embeds=torch.randn(2, 5, 20))
        expected = theirs(
            x,
            encoder_hidden_states=cond.text_embeds,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    else:
        cond = Condition(class_labels=torch.tensor([3, 9]))
        expected = theirs(x, timestep=t.long(), class_labels=cond.class_labels).sample
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-5, atol=1e-5)


def original_keys(depth, micro_conditions):
    """The keys of PixArt-alpha/PixArt-alpha's state dict, by its source (diffusion/model/nets)."""
    embedders = ["t_embedder", *(["csize_embedder", "ar_embedder"] if micro_conditions else [])]
    layers = [f"{e}.mlp.{i}" for e in embedders for i in (0, 2)]
    layers += ["x_embedder.proj", "t_block.1", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear"]
    keys = {"pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table"}
    for i in range(depth):
        parts = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
        layers += [f"blocks.{i}.{part}" for part in (*parts, "mlp.fc1", "mlp.fc2")]
        keys.add(f"blocks.{i}.scale_shift_table")
    return keys | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def to_diffusers(original, depth, micro_conditions):
    """The repository's own conversion (tools/convert_pixart_to_diffusers.py), key by key."""
    theirs = {}

    def layer(new, old):
        theirs[f"{new}.weight"], theirs[f"{new}.bias"] = original[f"{old}.weight"], original[f"{old}.bias"]

    def split(news, old):
        for kind in ("weight", "bias"):
            for new, part in zip(news, original[f"{old}.{kind}"].chunk(len(news)), strict=True):
                theirs[f"{new}.{kind}"] = part

    embedders = {"t_embedder": "timestep_embedder"}
    if micro_conditions:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for old, new in embedders.items():
        layer(f"adaln_single.emb.{new}.linear_1", f"{old}.mlp.0")
        layer(f"adaln_single.emb.{new}.linear_2", f"{old}.mlp.2")
    layer("pos_embed.proj", "x_embedder.proj")
    layer("caption_projection.linear_1", "y_embedder.y_proj.fc1")
    layer("caption_projection.linear_2", "y_embedder.y_proj.fc2")
    layer("adaln_single.linear", "t_block.1")
    layer("proj_out", "final_layer.linear")
    theirs["scale_shift_table"] = original["final_layer.scale_shift_table"]
    for i in range(depth):
        new, old = f"transformer_blocks.{i}", f"blocks.{i}"
        theirs[f"{new}.scale_shift_table"] = original[f"{old}.scale_shift_table"]
        split([f"{new}.attn1.to_{part}" for part in "qkv"], f"{old}.attn.qkv")
        layer(f"{new}.attn1.to_out.0", f"{old}.attn.proj")
        layer(f"{new}.attn2.to_q", f"{old}.cross_attn.q_linear")
        split([f"{new}.attn2.to_{part}" for part in "kv"], f"{old}.cross_attn.kv_linear")
        layer(f"{new}.attn2.to_out.0", f"{old}.cross_attn.proj")
        layer(f"{new}.ff.net.0.proj", f"{old}.mlp.fc1")
        layer(f"{new}.ff.net.2", f"{old}.mlp.fc2")
    return theirs


def original_file(micro_conditions, scale, seed=0):
    """A random original state dict: heads of 64, 2 blocks, 8x8 latents."""
    generator = torch.Generator().manual_seed(seed)
    width, text_width, depth = 192, 20, 2
    shapes = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, text_width), "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (32, width),
    }  # fmt: skip
    if micro_conditions:
        for name in ("csize_embedder", "ar_embedder"):
            shapes |= {f"{name}.mlp.0": (width // 3, 256), f"{name}.mlp.2": (width // 3, width // 3)}
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.cross_attn.q_linear": (width, width), f"blocks.{i}.cross_attn.kv_linear": (2 * width, width),
            f"blocks.{i}.cross_attn.proj": (width, width), f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
        }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1 for name, shape in shapes.items()}
    tables = [*(f"blocks.{i}.scale_shift_table" for i in range(depth)), "final_layer.scale_shift_table"]
    tensors |= {n: torch.randn(6 if "blocks" in n else 2, width, generator=generator) for n in tables}
    tensors["y_embedder.y_embedding"] = torch.randn(7, text_width, generator=generator)
    tensors["pos_embed"] = rescaled_sincos_grid(width, 4, 4, (4, 4), scale)[None]
    return tensors


@pytest.mark.parametrize(("micro_conditions", "scale"), [(False, 1.0), (True, 2.0), (False, 0.5)])
def test_original_files(tmp_path, micro_conditions, scale):
    original = original_file(micro_conditions, scale)
    assert set(original) == original_keys(2, micro_conditions)
    config, form = original_of_tensors(original, "a test")
    assert form.name == "PixArt"
    assert (config.num_heads, config.image_size, config.interpolation_scale) == (3, (8, 8), scale)
    layout = form.layout(config)
    ours = layout.to_ours(original)
    back = layout.to_theirs(ours)
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
    again = layout.to_ours(back)
    assert set(again) == set(ours) == set(network_of(config).state_dict())
    assert all(torch.equal(again[name], ours[name]) for name in ours)

    expected = to_diffusers(original, 2, micro_conditions)
    pixart = format_of_class("PixArtTransformer2DModel")
    given = pixart.diffusers(config).to_theirs(ours)
    assert set(given) == set(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    theirs = diffusers.PixArtTransformer2DModel(**pixart.write_config(config))
    theirs.load_state_dict(expected)

    torch.save({"state_dict": original}, tmp_path / "PixArt.pth")
    loaded = smalti.load_backbone(tmp_path / "PixArt.pth")
    x, cond = inputs(theirs, (8, 12), masked=True)
    t = torch.tensor([0.0, 417.0, 999.0])
    with torch.inference_mode():
        expected_output = call_theirs(theirs, x, t, cond)
        torch.testing.assert_close(loaded(x, t, cond), expected_output, rtol=1e-4, atol=1e-5)
        null = loaded.null_condition(3)
    assert torch.equal(null.text_embeds[2], original["y_embedder.y_embedding"])


def test_original_files_may_lack_the_table_of_positions_and_the_null_text(tmp_path):
    original = original_file(micro_conditions=False, scale=1.0)
    del original["pos_embed"], original["y_embedder.y_embedding"]
    torch.save(original, tmp_path / "PixArt.pth")
    model = smalti.load_backbone(tmp_path / "PixArt.pth")
    assert model.config.image_size == (64, 64)
    assert model.null_condition(1) is None


def test_original_files_with_another_table_are_refused(tmp_path):
    original = original_file(micro_conditions=False, scale=1.0)
    original["pos_embed"][0, 5, 7] += 0.1
    torch.save(original, tmp_path / "PixArt.pth")
    with pytest.raises(UserError, match="pos_embed is not the table"):
        smalti.load_backbone(tmp_path / "PixArt.pth")
