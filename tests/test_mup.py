"""muP: which parameter plays which role, what that does to weights and rates, and that activations ignore the width."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import tiny_config

from smalti.conditioning.prompted import build_prompted_network
from smalti.conditioning.tiny import TinyTextConfig
from smalti.config import apply_overrides, from_json, to_json
from smalti.errors import UserError
from smalti.interop.convert import write_weights
from smalti.interop.load import Weights, read_weights
from smalti.interop.surgery import without_attention_scale
from smalti.models import DiTConfig, MMDiTConfig, PixArtConfig, UViTConfig, build_model
from smalti.nn.attention import attention
from smalti.optim.mup import (
    MuP,
    WidthScale,
    attention_scale,
    check_mup,
    parameter_roles,
    rescale_initial_weights,
    width_scales,
)
from smalti.optim.optimizers import AdamWConfig, MuonConfig, build_optimizers
from smalti.recipes import recipe
from smalti.training.loop import train
from smalti.training.state import new_state
from smalti.types import Condition

DIT = DiTConfig(image_size=(8, 8), patch_size=2, width=64, depth=1, num_heads=4, positions="learned", qk_norm=True)
MMDIT = MMDiTConfig(
    image_size=(8, 8), in_channels=1, patch_size=2, width=64, depth=2, num_heads=4, text_width=6, pooled_width=5,
    position_grid=8, qk_norm=True, dual_attention_blocks=(0,), initialisation="wide",
)  # fmt: skip
UVIT = UViTConfig(image_size=(8, 8), patch_size=2, width=64, depth=2, num_heads=4, time_mlp=True, qkv_bias=True)
NETWORKS = [DIT, MMDIT, UVIT]

# What the papers' tables say of each layer, by hand: weights only; of biases see the test.
ROLES = {
    "dit": {
        "input": ["patch_embed", "time_embed.fc1", "label_embed", "positions_ND"],
        "hidden": ["time_embed.fc2", "modulation", "attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2"],
        "readout": ["output"],
        "fixed": ["q_norm", "k_norm"],
    },
    "mmdit": {
        "input": ["patch_embed", "time_embed.fc1", "pooled_embed.fc1", "text_embed"],
        "hidden": [
            "time_embed.fc2", "pooled_embed.fc2", "image_modulation", "text_modulation", "output_modulation",
            "image.qkv", "image.out", "text.qkv", "text.out", "image_attn.qkv", "image_attn.out", "image_mlp.fc1",
            "image_mlp.fc2", "text_mlp.fc1", "text_mlp.fc2",
        ],
        "readout": [".output"],
        "fixed": ["q_norm", "k_norm"],
    },
    # U-ViT's sinusoid is as wide as the network, so that the first layer of its time MLP is hidden.
    "uvit": {
        "input": ["patch_embed", "label_embed", "positions_ND"],
        "hidden": [
            "time_embed.fc1", "time_embed.fc2", "skip_linear", "attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2",
        ],
        "readout": ["output"],
        "vector": ["norm", "norm1", "norm2"],
        "fixed": ["final_conv"],
    },
}  # fmt: skip


def wider(config, factor, keep_heads=False):
    return dataclasses.replace(
        config, width=factor * config.width, num_heads=config.num_heads * (1 if keep_heads else factor)
    )


@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.kind)
def test_every_parameter_has_the_role_of_the_papers_tables(config):
    roles = parameter_roles(config)
    assert list(roles) == [name for name, _ in build_model(config).named_parameters()]
    for name, role in roles.items():
        layer = f".{name}".removesuffix(".weight")
        if name.endswith("bias"):
            expected = ["fixed" if name in ("output.bias", "final_conv.bias") else "vector"]
        else:
            expected = [
                role
                for role, layers in ROLES[config.kind].items()
                if any(layer.endswith(f".{x.lstrip('.')}") for x in layers)
            ]
        assert expected == [role], name


@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.kind)
def test_initial_weights_follow_the_table(config):
    """Standard deviations at width 256 against those at the base width, 64."""
    base, wide = build_model(config, 0), build_model(wider(config, 4), 0)
    scales = rescale_initial_weights(wide, MuP(64), seed=0)
    narrow = dict(base.named_parameters())
    for name, parameter in wide.named_parameters():
        expected = {"hidden": 4**-0.5, "readout": 1 / 4}.get(scales[name].role, 1.0)
        if scales[name].role == "fixed":
            assert torch.equal(parameter, narrow[name]), name
        tolerance = 0.35 if scales[name].role == "vector" else 0.001  # a draw of few
        before, after = (float(p.detach().square().mean().sqrt()) for p in (narrow[name], parameter))
        assert after == pytest.approx(before * expected, rel=tolerance), name


@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(weight_decay=0.1), MuonConfig(weight_decay=0.1)], ids=lambda o: o.kind
)
@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.kind)
def test_rates_follow_the_table_and_weight_decay_stays(config, optimizer):
    network = build_model(wider(config, 4))
    scales = width_scales(MuP(64), network)
    names = {id(p): name for name, p in network.named_parameters()}
    seen = []
    for kind, built in build_optimizers(optimizer, network, scales).items():
        full = optimizer.adamw_learning_rate if kind == "adamw" and isinstance(optimizer, MuonConfig) else 0
        full = full or optimizer.learning_rate
        for group in built.param_groups:
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * full)
            for parameter in group["params"]:
                seen.append(names[id(parameter)])
                scaled = scales[seen[-1]].role in ("hidden", "readout")
                assert group["lr"] == pytest.approx(full * ({"adamw": 1 / 4, "muon": 1 / 2}[kind] if scaled else 1))
        assert built.param_groups[-1]["lr"] == full or kind == "muon"  # what a run logs
    assert sorted(seen) == sorted(scales)


@settings(max_examples=30, deadline=None)
@given(fan_in=st.floats(0.1, 100), role=st.sampled_from(["input", "hidden", "readout", "vector", "fixed"]))
def test_a_step_moves_the_layers_output_alike_at_every_width(fan_in, role):
    """fan_in x rate (aligned updates) stays, and so does the initial output: sqrt(fan_in) x std, of a readout fan_in x
    std."""
    scale = WidthScale(role, fan_in)
    if role in ("hidden", "readout"):
        assert scale.fan_in * scale.adamw_rate == pytest.approx(1)
        power = 0.5 if role == "hidden" else 1.0
        assert scale.fan_in**power * scale.initial == pytest.approx(1)
    else:
        assert (scale.initial, scale.adamw_rate, scale.muon_rate) == (1, 1, 1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_base_width_a_run_is_the_standard_one_bit_for_bit(optimizer, tmp_path):
    config = tiny_config(3, f"optimizer={optimizer}", "weight_decay=0.1")
    mup = dataclasses.replace(config, parametrisation=MuP(base_width=32))
    runs = []
    for name, chosen in (("standard", config), ("mup", mup)):
        train(chosen, tmp_path / name)
        runs.append(read_weights(tmp_path / name, ema=False).tensors)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_text_encoder_beside_the_network_keeps_its_rates():
    text = TinyTextConfig(width=6, num_heads=1, vocab_size=300)
    prompted = build_prompted_network(dataclasses.replace(wider(MMDIT, 2), pooled_width=6), text)
    before = {name: p.detach().clone() for name, p in prompted.text.named_parameters()}
    scales = rescale_initial_weights(prompted, MuP(64), seed=0)
    assert all(scales[f"text.{name}"] == WidthScale("fixed") for name in before)
    assert all(torch.equal(p, before[name]) for name, p in prompted.text.named_parameters())
    assert scales["network.blocks.0.image_mlp.fc1.weight"] == WidthScale("hidden", 2.0)
    assert scales["network.text_embed.weight"] == WidthScale("input")


def test_logits_scale_by_one_over_the_head_width_where_heads_grow():
    """Of aligned q and k the logits, K x scale / sqrt(K), are the base's at every head width."""
    for head_width in (16, 64):
        scale = attention_scale(MuP(32, 16), dataclasses.replace(DIT, width=2 * head_width, num_heads=2))
        assert head_width * scale / math.sqrt(head_width) == pytest.approx(4)
    assert attention_scale(MuP(64), wider(DIT, 4)) == 1


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_scale_multiplies_the_logits(trains, masked):
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5]) if masked else None
    ours = attention(q.requires_grad_(trains), k, v, mask, logit_scale=0.5)
    torch.testing.assert_close(ours, attention(q * 0.5, k, v, mask))


def random_weights(config):
    network = build_model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return network


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.kind)
def test_the_scale_goes_into_the_weights_for_other_libraries(config, qk_norm):
    changes = {} if config.kind == "uvit" else {"qk_norm": qk_norm}
    config = dataclasses.replace(config, attention_scale=0.3, **changes)
    network = random_weights(config)
    plain = without_attention_scale(Weights(config, dict(network.state_dict()), "smalti"))
    assert plain.config.attention_scale == 1
    other = build_model(plain.config).eval()
    other.load_state_dict(plain.tensors)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    cond = Condition(class_labels=torch.tensor([1, 2]))
    if config.kind == "mmdit":
        cond = Condition(text_embeds=torch.randn(2, 3, 6), pooled_embeds=torch.randn(2, 5))
    with torch.no_grad():
        torch.testing.assert_close(other(x, t, cond), network(x, t, cond), rtol=1e-4, atol=1e-4)
        without = build_model(plain.config).eval()
        without.load_state_dict(network.state_dict())
        assert not torch.allclose(without(x, t, cond), network(x, t, cond), rtol=1e-3, atol=1e-3)


def test_an_export_has_no_scale(tmp_path):
    config = dataclasses.replace(DIT, positions="sincos", qk_norm=False, frequency_shift=1.0, attention_scale=0.5)
    network = random_weights(config)
    write_weights(Weights(config, dict(network.state_dict()), "smalti"), tmp_path / "theirs", "diffusers")
    back = read_weights(tmp_path / "theirs")
    assert back.config.attention_scale == 1
    ours = network.state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.equal(back.tensors["blocks.0.attn.qkv.weight"][:64], ours[:64] * 0.5)
    assert torch.equal(back.tensors["blocks.0.attn.qkv.weight"][64:], ours[64:])


def test_a_config_with_mup_survives_json_and_overrides():
    config = apply_overrides(
        recipe("mnist"), ["optimizer=adamw", "parametrisation=mup", "base_width=64", "model.width=256", "num_heads=8"]
    )
    assert config.parametrisation == MuP(64)
    assert from_json(type(config), to_json(config)) == config
    rates = [g["lr"] for g in new_state(config, torch.device("cpu")).optimizers["adamw"].param_groups]
    assert min(rates) == pytest.approx(1e-4 / 4, rel=0.05)
    assert rates[-1] == 1e-4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parametrisation=mup", "base_width=0"], "parametrisation.base_width=0 must be at least 1"),
        (["parametrisation=mup", "base_width=48"], "base_width=48 must divide by the head width, 32"),
        (["parametrisation=mup", "base_head_width=16"], "model.attention_scale=1 must be 0.707107"),
        (["parametrisation=mup", "base_head_width=2", "base_width=2"], "parametrisation.base_width: 2: model.width=2"),
        (["parametrisation=mup", "model=unet"], "there are rules for model=dit, mmdit and uvit, and this is unet"),
        (["parametrisation=sp"], "must be one of mup"),
        (["model.attention_scale=0"], "model.attention_scale=0.0 must be above 0"),
        (["model=uvit", "model.attention_scale=-1"], "model.attention_scale=-1.0 must be above 0"),
        (["optimizer=lion"], "optimizer='lion' must be one of adamw, muon"),
    ],
)
def test_mistakes_are_named(overrides, says):
    with pytest.raises(UserError, match=says):
        apply_overrides(recipe("mnist"), overrides)


def test_networks_without_rules_are_refused():
    with pytest.raises(UserError, match="this is pixart"):
        check_mup(MuP(), PixArtConfig())
    with pytest.raises(UserError, match=r"model\.attention_scale=0\.0 must"):
        dataclasses.replace(MMDIT, attention_scale=0.0)
