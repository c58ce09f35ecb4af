"""MM-DiT against diffusers' SD3Transformer2DModel with the same random weights, and the layout of single files."""

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised
from safetensors.torch import save_file

import smalti
from smalti.interop.mmdit import MMDIT
from smalti.models import MMDiT
from smalti.types import Condition

TINY = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 20,
    "out_channels": 4, "pos_embed_max_size": 6, "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip
CASES = {
    "SD3": (TINY, (8, 8)),
    "SD3.5-large": (TINY | {"qk_norm": "rms_norm"}, (12, 4)),
    "SD3.5-medium": (TINY | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (8, 12)),
    # 16 x 12 tokens of the image and 5 of the text; the last block has the second attention too; other channels out
    "wide": (
        TINY
        | {
            "sample_size": 32, "patch_size": 1, "in_channels": 3, "out_channels": 6, "pos_embed_max_size": 40,
            "num_attention_heads": 3, "attention_head_dim": 16, "caption_projection_dim": 48, "num_layers": 2,
            "dual_attention_layers": (1,),
        },
        (21, 12),
    ),
}  # fmt: skip


def reference(case):
    """diffusers' network with random weights."""
    return randomised(diffusers.SD3Transformer2DModel(**CASES[case][0]))


def inputs(case, batch=3, text_tokens=5):
    fields, size = CASES[case]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, fields["in_channels"], *size, generator=generator)
    text = torch.randn(batch, text_tokens, 12, generator=generator)
    pooled = torch.randn(batch, 20, generator=generator)
    return x, torch.tensor([0.0, 417.3, 999.0])[:batch], Condition(text_embeds=text, pooled_embeds=pooled)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_equal(case):
    theirs = reference(case)
    x, t, cond = inputs(case)

    def call(x, t):
        return theirs(x, cond.text_embeds, cond.pooled_embeds, t).sample

    assert_parity(theirs, call, x, t, cond)


@pytest.mark.parametrize("case", ["SD3", "SD3.5-medium"])
def test_small_tokens_meet_the_same_epsilon(case):
    """Text of variance 1e-7, beside which the norms' 1e-6 counts."""
    theirs = reference(case)
    with torch.no_grad():
        theirs.context_embedder.weight.mul_(1e-3)
        theirs.context_embedder.bias.zero_()
    x, t, cond = inputs(case)
    assert_parity(
        theirs, lambda x, t: theirs(x, cond.text_embeds, cond.pooled_embeds, t).sample, x, t, cond, limit=3e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    assert_round_trip(reference(case))


@pytest.mark.parametrize("case", CASES)
def test_position_table_is_theirs(case):
    theirs = reference(case)
    ours = MMDiT(MMDIT.read_config(CASES[case][0]))
    torch.testing.assert_close(ours.positions_ND, theirs.pos_embed.pos_embed[0], rtol=0, atol=1e-7)


def test_class_defaults_of_absent_fields_are_theirs():
    written = MMDIT.write_config(MMDIT.read_config({}))
    with torch.device("meta"):
        theirs = dict(diffusers.SD3Transformer2DModel().config)
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in written.items()} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in theirs.items()
        if not name.startswith("_")
    }


def half_swapped(tensor):
    return torch.cat([tensor[len(tensor) // 2 :], tensor[: len(tensor) // 2]])


def as_original(fields, theirs):
    """Stability AI's state dict from diffusers' one, written down from the two repositories."""
    original = {"pos_embed": theirs["pos_embed.pos_embed"]}

    def put(name, parts, change=lambda tensor: tensor):
        for kind in ("weight", "bias"):
            original[f"{name}.{kind}"] = change(torch.cat([theirs[f"{part}.{kind}"] for part in parts]))

    put("x_embedder.proj", ["pos_embed.proj"])
    for mlp, layer in ((0, 1), (2, 2)):
        put(f"t_embedder.mlp.{mlp}", [f"time_text_embed.timestep_embedder.linear_{layer}"])
        put(f"y_embedder.mlp.{mlp}", [f"time_text_embed.text_embedder.linear_{layer}"])
    put("context_embedder", ["context_embedder"])
    for i in range(fields["num_layers"]):
        block, x_block, context = (
            f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        )  # fmt: skip
        last = i == fields["num_layers"] - 1
        put(f"{x_block}.adaLN_modulation.1", [f"{block}.norm1.linear"])
        put(f"{context}.adaLN_modulation.1", [f"{block}.norm1_context.linear"], half_swapped if last else torch.clone)
        put(f"{x_block}.attn.qkv", [f"{block}.attn.to_{p}" for p in "qkv"])
        put(f"{context}.attn.qkv", [f"{block}.attn.add_{p}_proj" for p in "qkv"])
        put(f"{x_block}.attn.proj", [f"{block}.attn.to_out.0"])
        put(f"{x_block}.mlp.fc1", [f"{block}.ff.net.0.proj"])
        put(f"{x_block}.mlp.fc2", [f"{block}.ff.net.2"])
        if not last:
            put(f"{context}.attn.proj", [f"{block}.attn.to_add_out"])
            put(f"{context}.mlp.fc1", [f"{block}.ff_context.net.0.proj"])
            put(f"{context}.mlp.fc2", [f"{block}.ff_context.net.2"])
        if i in fields["dual_attention_layers"]:
            put(f"{x_block}.attn2.qkv", [f"{block}.attn2.to_{p}" for p in "qkv"])
            put(f"{x_block}.attn2.proj", [f"{block}.attn2.to_out.0"])
        if fields["qk_norm"]:
            for p in "qk":
                original[f"{x_block}.attn.ln_{p}.weight"] = theirs[f"{block}.attn.norm_{p}.weight"]
                original[f"{context}.attn.ln_{p}.weight"] = theirs[f"{block}.attn.norm_added_{p}.weight"]
                if i in fields["dual_attention_layers"]:
                    original[f"{x_block}.attn2.ln_{p}.weight"] = theirs[f"{block}.attn2.norm_{p}.weight"]
    put("final_layer.linear", ["proj_out"])
    put("final_layer.adaLN_modulation.1", ["norm_out.linear"], half_swapped)
    return original


@pytest.mark.parametrize("case", CASES)
def test_original_layout(case):
    fields, _ = CASES[case]
    theirs = reference(case).state_dict()
    (form,) = MMDIT.originals
    config = MMDIT.read_config(fields)
    ours = MMDIT.diffusers(config).to_ours(theirs)
    written = form.layout(config).to_theirs(ours)
    expected = as_original(fields, theirs)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = form.layout(config).to_ours(written)
    assert set(again) == set(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    found = form.config(written)
    assert found is not None
    if fields["qk_norm"]:  # else the file does not say how wide a head is
        assert found == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_file_beside_other_networks(tmp_path, dtype):
    case = "SD3.5-medium"
    theirs = reference(case)
    theirs.pos_embed.pos_embed = theirs.pos_embed.pos_embed.clone()
    theirs.to(dtype)
    original = as_original(CASES[case][0], theirs.state_dict())
    file = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in original.items()}
    save_file(file | {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "sd3.safetensors")
    ours = smalti.load_backbone(tmp_path / "sd3.safetensors")
    assert ours.config == MMDIT.read_config(CASES[case][0])
    assert ours.positions_ND.dtype == dtype
    if dtype == torch.float32:
        x, t, cond = inputs(case)
        with torch.inference_mode():
            expected = theirs(x, cond.text_embeds, cond.pooled_embeds, t).sample
            torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-4, atol=1e-5)
