"""FLUX.1 against diffusers' FluxTransformer2DModel with the same random weights, and the layout of BFL's files."""

import dataclasses

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised
from safetensors.torch import save_file

import smalti
from smalti.interop.flux import FLUX
from smalti.nn.embeddings import patchify, unpatchify
from smalti.types import Condition

TINY = {
    "patch_size": 1, "in_channels": 8, "out_channels": None, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 20,
    "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
CASES = {
    "dev": (TINY, (8, 12)),
    "schnell": (TINY | {"guidance_embeds": False}, (12, 4)),
    # 272 tokens of the image, past what plain attention takes; conditioned on more channels than it gives
    "fill": (
        TINY
        | {
            "in_channels": 24, "out_channels": 4, "num_layers": 1, "num_single_layers": 3, "num_attention_heads": 3,
            "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14),
        },
        (34, 32),
    ),
}  # fmt: skip


def reference(case):
    """diffusers' network with random weights."""
    return randomised(diffusers.FluxTransformer2DModel(**CASES[case][0]))


def inputs(case, batch=3, text_tokens=5):
    fields, size = CASES[case]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, fields["in_channels"] // 4, *size, generator=generator)
    text = torch.randn(batch, text_tokens, 12, generator=generator)
    pooled = torch.randn(batch, 20, generator=generator)
    guidance = torch.tensor([1.0, 3.5, 30.0])[:batch] if fields["guidance_embeds"] else None
    t = torch.tensor([0.003, 0.417, 1.0])[:batch]
    return x, t, Condition(text_embeds=text, pooled_embeds=pooled, guidance=guidance)


def in_our_layout(theirs, cond):
    """Their forward on latents: packed 2 x 2 for it, with the ids that their pipeline makes."""

    def call(x, t):
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)[None, :]
        packed = theirs(
            patchify(x, 2), cond.text_embeds, cond.pooled_embeds, t, ids.view(-1, 3),
            torch.zeros(cond.text_embeds.shape[1], 3), cond.guidance,
        ).sample  # fmt: skip
        return unpatchify(packed, 2, x.shape[2], x.shape[3], "channel_first")

    return call


def test_tokens_are_packed_as_their_pipeline_packs_them():
    x = torch.randn(2, 3, 6, 8)
    packed = x.view(2, 3, 3, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 12, 12)  # FluxPipeline._pack_latents
    assert torch.equal(patchify(x, 2), packed)
    assert torch.equal(unpatchify(packed, 2, 6, 8, "channel_first"), x)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_equal(case):
    theirs = reference(case)
    x, t, cond = inputs(case)
    assert_parity(theirs, in_our_layout(theirs, cond), x, t, cond)


def test_bfloat16_is_as_near_as_bfloat16_allows():
    theirs = reference("dev").to(torch.bfloat16)
    x, t, cond = inputs("dev")
    x, cond = x.bfloat16(), cond.map(lambda tensor: tensor.bfloat16())
    ours = smalti.load_backbone(theirs)
    with torch.inference_mode():
        expected, output = in_our_layout(theirs, cond)(x, t), ours(x, t, cond)
    assert output.dtype == torch.bfloat16
    assert float((output - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    assert_round_trip(reference(case))


def test_class_defaults_of_absent_fields_are_theirs():
    written = FLUX.write_config(FLUX.read_config({}))
    fields = diffusers.FluxTransformer2DModel(**TINY).config
    assert set(written) == {name for name in fields if not name.startswith("_")}
    assert written | {"axes_dims_rope": (16, 56, 56)} == {
        "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip


def as_original(fields, theirs):
    """Black Forest Labs' state dict from diffusers' one, written down from the two repositories."""
    original = {}

    def put(name, *parts, change=torch.clone):
        for kind in ("weight", "bias"):
            original[f"{name}.{kind}"] = change(torch.cat([theirs[f"{part}.{kind}"] for part in parts]))

    def put_norms(name, q, k):
        original[f"{name}.query_norm.scale"] = theirs[f"{q}.weight"]
        original[f"{name}.key_norm.scale"] = theirs[f"{k}.weight"]

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    embedders = {"time_in": "timestep", "vector_in": "text"}
    for name, embedder in (embedders | ({"guidance_in": "guidance"} if fields["guidance_embeds"] else {})).items():
        put(f"{name}.in_layer", f"time_text_embed.{embedder}_embedder.linear_1")
        put(f"{name}.out_layer", f"time_text_embed.{embedder}_embedder.linear_2")
    for i in range(fields["num_layers"]):
        name, block = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{name}.img_mod.lin", f"{block}.norm1.linear")
        put(f"{name}.txt_mod.lin", f"{block}.norm1_context.linear")
        put(f"{name}.img_attn.qkv", *(f"{block}.attn.to_{p}" for p in "qkv"))
        put(f"{name}.txt_attn.qkv", *(f"{block}.attn.add_{p}_proj" for p in "qkv"))
        put_norms(f"{name}.img_attn.norm", f"{block}.attn.norm_q", f"{block}.attn.norm_k")
        put_norms(f"{name}.txt_attn.norm", f"{block}.attn.norm_added_q", f"{block}.attn.norm_added_k")
        put(f"{name}.img_attn.proj", f"{block}.attn.to_out.0")
        put(f"{name}.txt_attn.proj", f"{block}.attn.to_add_out")
        put(f"{name}.img_mlp.0", f"{block}.ff.net.0.proj")
        put(f"{name}.img_mlp.2", f"{block}.ff.net.2")
        put(f"{name}.txt_mlp.0", f"{block}.ff_context.net.0.proj")
        put(f"{name}.txt_mlp.2", f"{block}.ff_context.net.2")
    for i in range(fields["num_single_layers"]):
        name, block = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{name}.modulation.lin", f"{block}.norm.linear")
        put(f"{name}.linear1", *(f"{block}.attn.to_{p}" for p in "qkv"), f"{block}.proj_mlp")
        put_norms(f"{name}.norm", f"{block}.attn.norm_q", f"{block}.attn.norm_k")
        put(f"{name}.linear2", f"{block}.proj_out")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", change=lambda t: torch.cat(t.chunk(2)[::-1]))
    return original


@pytest.mark.parametrize("case", CASES)
def test_original_layout(case):
    fields, _ = CASES[case]
    theirs = reference(case).state_dict()
    (form,) = FLUX.originals
    config = FLUX.read_config(fields)
    ours = FLUX.diffusers(config).to_ours(theirs)
    written = form.layout(config).to_theirs(ours)
    expected = as_original(fields, theirs)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = form.layout(config).to_ours(written)
    assert set(again) == set(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert form.config(written) == config


def test_the_published_split_of_a_head_is_found_from_a_file():
    (form,) = FLUX.originals
    config = dataclasses.replace(
        FLUX.read_config({"guidance_embeds": True}), depth=1, single_depth=1, num_heads=1, width=128
    )
    from smalti.models import Flux

    with torch.device("meta"):
        tensors = Flux(config).state_dict()
    assert form.config(form.layout(config).to_theirs(tensors)) == config


def test_original_file(tmp_path):
    theirs = reference("dev")
    original = as_original(TINY, theirs.state_dict())
    save_file(original, tmp_path / "flux1-dev.safetensors")
    ours = smalti.load_backbone(tmp_path / "flux1-dev.safetensors")
    x, t, cond = inputs("dev")
    with torch.inference_mode():
        expected = in_our_layout(theirs, cond)(x, t)
        torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-4, atol=1e-5)
