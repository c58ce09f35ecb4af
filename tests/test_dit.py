"""DiT: its reference, its initialisation, its counts, and what it does with positions and conditions."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    DiT,
    DiTConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    preset,
    preset_names,
)
from smalti.nn.embeddings import patchify, unpatchify
from smalti.nn.positions import rope_angles_2d, rotate_pairs
from smalti.types import Condition

TINY = DiTConfig(image_size=(8, 12), in_channels=2, patch_size=2, width=32, depth=2, num_heads=4)


def randomised(config, seed=0):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.image_size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return x, t, Condition(class_labels=torch.arange(batch) % max(config.num_classes, 1))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5),
    patch_size=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_patchify_round_trip(batch, channels, rows, columns, patch_size):
    height, width = rows * patch_size, columns * patch_size
    x = torch.randn(batch, channels, height, width)
    tokens = patchify(x, patch_size)
    assert tokens.shape == (batch, rows * columns, channels * patch_size**2)
    # In: (channel, row, column) inside a token; out: (row, column, channel).
    reordered = tokens.unflatten(-1, (channels, patch_size, patch_size)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(reordered, patch_size, height, width), x)


def test_patchify_is_a_patch_convolution():
    x, kernel = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4)
    convolved = torch.nn.functional.conv2d(x, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, 4) @ kernel.flatten(1).T, convolved, rtol=1e-4, atol=1e-4)


def test_rotary_products_depend_on_relative_positions_alone():
    angles = rope_angles_2d(8, 5, 6)
    q, k = torch.randn(8), torch.randn(8)
    grid_q = rotate_pairs(q.expand(30, 8), angles).view(5, 6, 8)
    grid_k = rotate_pairs(k.expand(30, 8), angles).view(5, 6, 8)
    products = torch.einsum("abk,cdk->abcd", grid_q, grid_k)
    torch.testing.assert_close(products[1, 1, 2, 4], products[2, 2, 3, 5])
    assert not torch.isclose(products[1, 1, 2, 4], products[1, 1, 4, 2])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("positions", ["sincos", "learned", "rope", "sincos+rope"])
def test_blocks_are_the_identity_at_initialisation(positions, activation):
    config = dataclasses.replace(TINY, positions=positions, activation=activation, qk_norm=True)
    model = build_model(config)
    x, t, cond = inputs(config)
    tokens = torch.randn(3, 24, 32)
    modulation = model.modulation(torch.nn.functional.silu(model.embed_condition(t, cond))).view(3, -1, 32)
    for i, block in enumerate(model.blocks):
        assert torch.equal(block(tokens, modulation[:, 6 * i : 6 * i + 6], model.rope_2NK), tokens)
    assert torch.equal(model(x, t, cond), torch.zeros_like(x))


def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = build_model(TINY, 1), build_model(TINY, 1), build_model(TINY, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].attn.qkv.weight, c.blocks[0].attn.qkv.weight)


def test_each_sample_has_its_own_time_and_label():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_missing_condition_is_the_null_label():
    model = randomised(TINY)
    x, t, _ = inputs(TINY)
    assert torch.equal(model(x, t), model(x, t, model.null_condition(3)))


@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("DiT-Tiny", 1)]
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(sum(count_parameters(DiT(preset(name))).values()) / 1e6) == millions


def test_published_flops():
    assert round(forward_flops(preset("DiT-XL/2")) / 2e9, 1) == pytest.approx(118.6, abs=0.3)  # DiT, table 1: GMACs
    assert sum(name.startswith("DiT-") for name in preset_names()) == 13


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_equal_the_counter(activation):
    config = dataclasses.replace(TINY, activation=activation, learn_sigma=True)
    model = build_model(config)
    x, t, cond = inputs(config, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, cond)
    assert counter.get_total_flops() == forward_flops(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 5}, "must divide by model.patch_size"),
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"width": 0}, "model.width=0"),
        ({"num_classes": -1}, "num_classes"),
        ({"width": 24, "num_heads": 4, "positions": "rope"}, "must divide by 4"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'DiT-XL/2'"):
        preset("DiT-XL-2")


def test_training_lowers_the_validation_loss():
    model = build_model(DiTConfig(width=64, depth=2, initialisation="wide"))
    before, after = validation_losses(model, list(model.parameters()), lambda labels: Condition(class_labels=labels))
    assert before > 1.2
    assert after < 0.6


def test_features_by_name():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    output, features = forward_with_features(model, ["blocks.1", "blocks.0.attn"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["blocks.1"].shape == features["blocks.0.attn"].shape == (3, 24, 32)
    assert not model.blocks[1]._forward_hooks
    with pytest.raises(UserError, match=r"did you mean 'blocks.1'"):
        forward_with_features(model, ["blocks.7"], x, t, cond)


@pytest.mark.parametrize("positions", ["sincos", "rope", "sincos+rope"])
def test_another_size_is_what_a_network_made_for_it_computes(positions):
    config = dataclasses.replace(TINY, positions=positions)
    other = dataclasses.replace(config, image_size=(config.image_size[0] + 4 * config.patch_size, config.patch_size))
    model, wanted = randomised(config), build_model(other).eval()
    wanted.load_state_dict(model.state_dict())
    x, t, cond = inputs(other)
    torch.testing.assert_close(model(x, t, cond), wanted(x, t, cond))


def test_sizes_that_do_not_fit_are_refused():
    x, t, cond = inputs(TINY)
    for positions, wrong, says in (("sincos", x[..., 1:], "must divide"), ("learned", torch.cat([x, x], 2), "learned")):
        with pytest.raises(UserError, match=says):
            build_model(dataclasses.replace(TINY, positions=positions))(wrong, t, cond)
