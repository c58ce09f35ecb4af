"""Z-Image against diffusers' ZImageTransformer2DModel with the same random weights, and the files of ComfyUI."""

import dataclasses

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised
from safetensors.torch import save_file

import smalti
from smalti.errors import UserError
from smalti.interop.zimage import ZIMAGE
from smalti.models import network_of, preset
from smalti.types import Condition

CASES = {
    "thin": {"dim": 48, "n_heads": 2, "n_layers": 1, "n_refiner_layers": 1, "axes_dims": [8, 8, 8]},
    "no QK-norm, patches of 1": {
        "dim": 24, "n_heads": 3, "n_layers": 2, "n_refiner_layers": 2, "axes_dims": [4, 2, 2], "qk_norm": False,
        "all_patch_size": [1], "t_scale": 500.0,
    },
    "wider than the time vector": {
        "dim": 288, "n_heads": 12, "n_layers": 1, "n_refiner_layers": 1, "axes_dims": [8, 8, 8], "norm_eps": 1e-3,
        "rope_theta": 100.0,
    },
}  # fmt: skip
SIZES = {"thin": (6, 10), "no QK-norm, patches of 1": (8, 4), "wider than the time vector": (8, 4)}  # 15, 32, 8 tokens


def reference(name):
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, cap_feat_dim=10, axes_lens=[128, 16, 16], **{"n_kv_heads": 7, **CASES[name]}
    )
    return randomised(model)


def call_of(theirs, captions, patch_size):
    """theirs in our layout of tensors, for one caption [tokens, width] a picture."""

    def call(x, t):
        return torch.stack(theirs(list(x[:, :, None]), t, captions, patch_size=patch_size).sample)[:, :, 0]

    return call


def inputs(name, *caption_lengths):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(caption_lengths), 4, *SIZES[name], generator=generator)
    captions = [torch.randn(length, 10, generator=generator) for length in caption_lengths]
    return x, torch.rand(len(caption_lengths), generator=generator), captions


@pytest.mark.parametrize("tokens", [5, 32])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_input_gradients_are_equal(name, tokens):
    theirs = reference(name)
    x, t, captions = inputs(name, tokens, tokens)
    call = call_of(theirs, captions, theirs.config.all_patch_size[0])
    assert_parity(theirs, call, x, t, Condition(text_embeds=torch.stack(captions)))


@pytest.mark.parametrize("mask_side", ["right", "left", "scattered"])
@pytest.mark.parametrize("name", CASES)
def test_captions_of_several_lengths(name, mask_side):
    theirs = reference(name)
    lengths = (5, 37, 64, 0)
    x, t, captions = inputs(name, *lengths)
    width = 64 if mask_side == "left" else 70
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(row))
        places = {"right": torch.arange(length), "left": torch.arange(width - length, width), "scattered": order}
        mask[row, places[mask_side][:length]] = True
    embeds = torch.full((4, width, 10), 9.0)
    embeds[mask] = torch.cat(captions)
    call = call_of(theirs, captions, theirs.config.all_patch_size[0])
    assert_parity(theirs, call, x, t, Condition(text_embeds=embeds, text_mask=mask))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    assert_round_trip(reference(name))


def comfyui_keys(depth, refiner_depth):
    """ComfyUI's key (a part without kind: its weight) of each of diffusers' (fused ones in q, k, v order)."""
    fixed = {
        "x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token", "cap_embedder.0.weight": "cap_embedder.0.weight"
    }  # fmt: skip
    both = {
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1", "t_embedder.mlp.0":
        "t_embedder.mlp.0", "t_embedder.mlp.2": "t_embedder.mlp.2", "cap_embedder.1": "cap_embedder.1",
    }  # fmt: skip
    stacks = {"noise_refiner": refiner_depth, "context_refiner": refiner_depth, "layers": depth}
    for block in [f"{stack}.{i}" for stack, count in stacks.items() for i in range(count)]:
        if "context" not in block:
            both[f"{block}.adaLN_modulation.0"] = f"{block}.adaLN_modulation.0"
        same = ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
        same += [f"feed_forward.w{i}" for i in (1, 2, 3)]
        fixed |= {f"{block}.{part}.weight": f"{block}.{part}.weight" for part in same}
        fixed[f"{block}.attention.out.weight"] = f"{block}.attention.to_out.0.weight"
        fixed[f"{block}.attention.q_norm.weight"] = f"{block}.attention.norm_q.weight"
        fixed[f"{block}.attention.k_norm.weight"] = f"{block}.attention.norm_k.weight"
        fixed[f"{block}.attention.qkv.weight"] = tuple(f"{block}.attention.to_{p}.weight" for p in "qkv")
    return fixed | {f"{a}.{kind}": f"{b}.{kind}" for a, b in both.items() for kind in ("weight", "bias")}


def test_comfyui_files(tmp_path):
    theirs = reference("thin")
    state, keys = theirs.state_dict(), comfyui_keys(1, 1)
    written = {
        ours: torch.cat([state[name] for name in names]) if isinstance(names, tuple) else state[names]
        for ours, names in keys.items()
    }
    stored = written | {"norm_final.weight": torch.full((48,), 3.0)}
    save_file({f"model.diffusion_model.{k}": v.contiguous() for k, v in stored.items()}, tmp_path / "z.safetensors")
    config = ZIMAGE.read_config(dict(theirs.config))
    network = smalti.load_backbone(tmp_path / "z.safetensors")
    recognised = dataclasses.replace(network.config, rope_lengths=config.rope_lengths)
    assert recognised == config
    expected = smalti.load_backbone(theirs).state_dict()
    ours = network.state_dict()
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    layout = ZIMAGE.originals[1].layout(config)
    back = layout.to_theirs(ours)
    assert set(back) == set(written)
    assert all(torch.equal(back[name], written[name]) for name in written)
    again = layout.to_ours(back)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_diffusers_keys_in_one_file(tmp_path):
    theirs = reference("no QK-norm, patches of 1")
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "z.safetensors")
    config = ZIMAGE.read_config(dict(theirs.config))  # without QK-norm the file does not tell the head's width
    ours = smalti.load_backbone(tmp_path / "z.safetensors", config=config).state_dict()
    expected = smalti.load_backbone(theirs).state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_published_network_is_diffusers_default():
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel()
        ours = network_of(preset("Z-Image"))
    assert ZIMAGE.read_config(dict(theirs.config)) == preset("Z-Image")
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 2) == 6.15
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    back = ZIMAGE.diffusers(preset("Z-Image")).to_theirs(ours.state_dict())
    assert {name: tensor.shape for name, tensor in back.items()} == shapes
    comfyui = ZIMAGE.originals[1]
    assert comfyui.config(comfyui.layout(preset("Z-Image")).to_theirs(ours.state_dict())) == preset("Z-Image")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"siglip_feat_dim": 8}, "siglip_feat_dim=8"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size"),
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1]}, "only one size"),
        ({"surprise": 1}, "not known"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        ZIMAGE.read_config(change)
