"""Video DiT against diffusers' CogVideoXTransformer3DModel with the same random weights, and against SAT's names."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from oracles.parity import assert_parity, assert_round_trip, randomised

import smalti
from smalti.errors import UserError
from smalti.interop.formats import original_of_tensors
from smalti.interop.video_dit import VIDEO_DIT
from smalti.models import VideoDiTConfig, network_of
from smalti.types import Condition

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "use_learned_positional_embeddings": True, "in_channels": 8}
OF_1_5 = {**ROTARY, "patch_size_t": 2, "patch_bias": False, "sample_frames": 13}
CASES = {  # the class's config and the video's (frames, height, width)
    "2B": ({}, (3, 8, 12)),
    "2B at another size": ({}, (2, 12, 6)),
    "2B, one wide frame": ({"temporal_interpolation_scale": 2.0, "norm_eps": 1e-4}, (1, 4, 16)),
    "2B, positions of another scale": ({"spatial_interpolation_scale": 1.25}, (3, 8, 12)),
    "5B": (ROTARY, (3, 8, 12)),
    "5B, taller than trained": (ROTARY, (2, 16, 8)),
    "5B, wider than trained": ({**ROTARY, "out_channels": 6}, (2, 4, 18)),
    "5B-I2V": (LEARNED, (3, 8, 12)),
    "5B, eight frames to one": ({**ROTARY, "temporal_compression_ratio": 8, "norm_eps": 1e-4}, (2, 8, 12)),
    "1.5-5B": (OF_1_5, (4, 8, 12)),
    "1.5-5B, smaller": (OF_1_5, (2, 6, 8)),
    "1.5-5B-I2V": ({**OF_1_5, "ofs_embed_dim": 8, "in_channels": 8}, (4, 8, 10)),
}


def reference(change, std=0.1):
    model = randomised(diffusers.CogVideoXTransformer3DModel(**{**TINY, **change}), std)
    if "use_learned_positional_embeddings" in change:  # a buffer: randomised() sees parameters only
        model.patch_embed.pos_embedding.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def rotary_of_the_pipeline(config, size):
    """What CogVideoXPipeline._prepare_rotary_positional_embeddings makes for latents of this size."""
    if not config.use_rotary_positional_embeddings:
        return None
    frames, *sides = size
    trained = (config.sample_height, config.sample_width)
    grid, base = (tuple(n // config.patch_size for n in pair) for pair in (sides, trained))
    if config.patch_size_t is None:
        crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames)
    frames = (frames + config.patch_size_t - 1) // config.patch_size_t
    return get_3d_rotary_pos_embed(config.attention_head_dim, None, grid, frames, grid_type="slice", max_size=base)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("std", [0.1, 0.01])  # small weights give small activations, in which each norm's eps counts
def test_outputs_and_input_gradients_are_equal(case, std):
    change, size = CASES[case]
    theirs = reference(change, std)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, theirs.config.in_channels, *size, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    rotary = rotary_of_the_pipeline(theirs.config, size)
    ofs = torch.tensor([2.0]) if theirs.config.ofs_embed_dim else None

    def call(x, t):
        return theirs(x.transpose(1, 2), text, t, ofs=ofs, image_rotary_emb=rotary).sample.transpose(1, 2)

    assert_parity(theirs, call, x, torch.tensor([3.0, 721.0]), Condition(text_embeds=text))


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    theirs = reference(CASES[case][0])
    assert_round_trip(theirs)
    written = VIDEO_DIT.write_config(VIDEO_DIT.read_config(dict(theirs.config)))
    assert {name: theirs.config[name] for name in written if name != "patch_bias"} == {
        name: value for name, value in written.items() if name != "patch_bias"
    }


def test_what_a_config_leaves_out_is_as_published():
    assert VIDEO_DIT.read_config({}) == VideoDiTConfig()
    assert VIDEO_DIT.read_config({**TINY, "out_channels": None}).out_channels == 4
    # Frames that the autoencoder joins: the first stands alone, the last may be fewer.
    assert [VIDEO_DIT.read_config({**TINY, "sample_frames": n}).video_size[0] for n in (1, 8, 9, 10)] == [1, 2, 3, 3]


def test_another_ofs_than_the_usual_one():
    theirs = reference(CASES["1.5-5B-I2V"][0])
    x, t, text = torch.randn(2, 8, 2, 8, 8), torch.tensor([3.0, 721.0]), torch.randn(2, 5, 12)
    rotary, ofs = rotary_of_the_pipeline(theirs.config, (2, 8, 8)), torch.tensor([1.0, 7.0])
    expected = theirs(x.transpose(1, 2), text, t, ofs=ofs, image_rotary_emb=rotary).sample.transpose(1, 2)
    output = smalti.load_backbone(theirs)(x, t, Condition(text_embeds=text, micro_conditions=ofs[:, None]))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False"),
        ({"use_learned_positional_embeddings": True}, "needs rotary"),
        ({"patch_bias": False}, "patch_bias=False"),
        ({"norm_elementwise_affine": False}, "norm_elementwise_affine=False"),
        ({"attention_type": "new"}, "attention_type='new'"),
    ],
)
def test_configs_that_ours_does_not_have_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        VIDEO_DIT.read_config({**TINY, **change})


def test_factorised_attention_has_no_class_at_diffusers():
    config = dataclasses.replace(VIDEO_DIT.read_config(TINY), attention="factorised")
    with pytest.raises(UserError, match="attention='factorised'"):
        VIDEO_DIT.write_config(config)


MIDDLES = {  # SAT's names after "transformer.layers.{i}." and diffusers' after "transformer_blocks.{i}."
    "input_layernorm": "norm1.norm", "post_attention_layernorm": "norm2.norm", "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
}  # fmt: skip
ENDS = {
    "mixins.patch_embed.proj": "patch_embed.proj", "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "transformer.final_layernorm": "norm_final", "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear", "mixins.final_layer.linear": "proj_out",
}  # fmt: skip
OFS = {"ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2"}


def sat_from_diffusers(tensors, depth, ofs=False, learned=False):
    """The documented map (networks.md, 1.7), from diffusers' state dict to the authors'."""
    original = {}
    for kind in ("weight", "bias"):
        for ours, theirs in {**ENDS, **(OFS if ofs else {})}.items():
            original[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
        for i in range(depth):
            layer, block = f"transformer.layers.{i}", f"transformer_blocks.{i}"
            for ours, theirs in MIDDLES.items():
                original[f"{layer}.{ours}.{kind}"] = tensors[f"{block}.{theirs}.{kind}"]
            for name in ("query", "key"):
                norm = tensors[f"{block}.attn1.norm_{name[0]}.{kind}"]
                original[f"mixins.adaln_layer.{name}_layernorm_list.{i}.{kind}"] = norm
            qkv = torch.cat([tensors[f"{block}.attn1.to_{part}.{kind}"] for part in "qkv"])
            original[f"{layer}.attention.query_key_value.{kind}"] = qkv
            first, second = (tensors[f"{block}.norm{j}.linear.{kind}"].chunk(6) for j in (1, 2))
            rows = torch.cat([*first[:3], *second[:3], *first[3:], *second[3:]])
            original[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = rows
    if learned:
        original["mixins.pos_embed.pos_embedding"] = tensors["patch_embed.pos_embedding"]
    return original


@pytest.mark.parametrize("case", ["2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V"])
def test_original_layout_is_the_documented_one_both_ways(case):
    theirs = reference(CASES[case][0])
    config = VIDEO_DIT.read_config(dict(theirs.config))
    expected = sat_from_diffusers(theirs.state_dict(), 2, config.ofs_width, "learned" in config.positions)
    ours = VIDEO_DIT.diffusers(config).to_ours(theirs.state_dict())
    layout = VIDEO_DIT.originals[0].layout(config)
    original = layout.to_theirs(ours)
    assert set(original) == set(expected)
    assert all(torch.equal(original[name], expected[name]) for name in expected)
    again = layout.to_ours(original)
    assert set(again) == set(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_original_file_is_recognised_with_its_tables_and_prefix(tmp_path):
    change = {"in_channels": 32, "out_channels": 16, "max_text_seq_length": 226}
    theirs = reference({**OF_1_5, **change, "max_text_seq_length": 224, "ofs_embed_dim": 8})
    original = sat_from_diffusers(theirs.state_dict(), 2, ofs=True)
    original["mixins.pos_embed.freqs_sin"] = torch.zeros(2, 3, 4, 16)
    original["transformer.position_embeddings.weight"] = torch.zeros(64, 32)
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    torch.save({"module": {**file, "first_stage_model.conv.weight": torch.zeros(3)}}, tmp_path / "mp_rank_00.pt")
    network = smalti.load_backbone(tmp_path / "mp_rank_00.pt")
    assert network.config == dataclasses.replace(
        VIDEO_DIT.read_config(dict(theirs.config)), video_size=(21, 96, 170), temporal_compression=4
    )
    expected = smalti.load_backbone(theirs).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "positions"), [(ROTARY, "rope"), (LEARNED, "rope+learned"), (OF_1_5, "rope")], ids=["5B", "I2V", "1.5"]
)
def test_original_files_say_which_positions_they_have(change, positions):
    theirs = reference({**change, "out_channels": 16})
    original = sat_from_diffusers(theirs.state_dict(), 2, learned="learned" in positions)
    config, form = original_of_tensors(original, "a test")
    assert form.name == "CogVideoX (SAT)"
    assert (config.positions, config.num_heads, config.depth, config.out_channels) == (positions, 2, 2, 16)


@pytest.mark.parametrize(
    ("name", "expected", "table"),
    [
        ("2B", VideoDiTConfig(depth=1), False),
        ("2B with its table", VideoDiTConfig(depth=1, width=64, num_heads=2, text_width=12), True),
        ("5B", VideoDiTConfig(depth=1, width=3072, num_heads=48, positions="rope"), False),
    ],
)
def test_original_files_of_the_first_networks_give_their_configs(name, expected, table):
    """On the meta device, as smalti info reads them. The fixed table is in some files, with zeros for the text."""
    with torch.device("meta"):
        ours = network_of(expected).state_dict()
    layout = VIDEO_DIT.originals[0].layout(expected)
    original = dict(layout.to_theirs(ours))
    if table:
        tokens = torch.cat([torch.zeros(1, 226, 64), torch.ones(1, 6, 64)], dim=1)
        original["mixins.pos_embed.pos_embedding"] = tokens
    config, _ = original_of_tensors(original, "a test")
    assert config == expected
    layout.check(original, ours, "a test")
    if expected.width == 1920:
        rotary = {**original, "mixins.pos_embed.freqs_cos": torch.zeros(1)}
        assert original_of_tensors(rotary, "a test")[0].positions == "rope"


def test_a_learned_table_is_no_surplus_and_is_needed():
    theirs = reference({**LEARNED, "out_channels": 16})
    original = sat_from_diffusers(theirs.state_dict(), 2, learned=True)
    layout = VIDEO_DIT.originals[0].layout(VIDEO_DIT.read_config(dict(theirs.config)))
    ours = layout.to_ours(original)
    assert torch.equal(ours["positions_SD"], theirs.patch_embed.pos_embedding[0])
    layout.check(original, ours, "a test")
    del original["mixins.pos_embed.pos_embedding"]
    with pytest.raises(UserError, match=r"missing: mixins\.pos_embed\.pos_embedding"):
        layout.check(original, ours, "a test")
