"""PixArt: its initialisation, its counts, what it does with texts, sizes and micro conditions, and that it learns."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    PixArtConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.nn.positions import rescaled_sincos_grid, sincos_grid
from smalti.types import Condition

TINY = PixArtConfig(
    image_size=(8, 8), in_channels=2, width=48, depth=2, num_heads=4, text_width=12, micro_conditions=True
)


def randomised(config, seed=0):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, size=(8, 12), batch=3, tokens=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return (
        x,
        t,
        Condition(
            text_embeds=torch.randn(batch, tokens, config.text_width, generator=generator),
            text_mask=torch.arange(tokens) < torch.arange(1, batch + 1)[:, None],
            micro_conditions=torch.rand(batch, 3, generator=generator) * 100 if config.micro_conditions else None,
        ),
    )


def test_published_initialisation():
    """The network starts at 0 and ignores the text; its blocks are not the identity (their gates are random)."""
    config = dataclasses.replace(TINY, width=192)
    model = build_model(config)
    x, t, cond = inputs(config)
    output, features = forward_with_features(model, ["blocks.0", "blocks.1.cross_attn"], x, t, cond)
    assert torch.equal(output, torch.zeros(3, 4, 8, 12))
    assert torch.equal(features["blocks.1.cross_attn"], torch.zeros(3, 24, 192))
    assert float(features["blocks.0"].detach().std()) > 0.1
    assert float(model.modulation_rows.detach().std()) == pytest.approx(192**-0.5, rel=0.1)
    assert float(model.modulation.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.text_embed.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), batch=st.integers(1, 4))
def test_each_sample_has_its_own_time_text_and_size(rows, columns, batch):
    model = randomised(TINY)
    x, t, cond = inputs(TINY, (2 * rows, 2 * columns), batch)
    with torch.inference_mode():
        together = model(x, t, cond)
        assert together.shape == (batch, 4, 2 * rows, 2 * columns)
        for i in range(batch):
            alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_padding_that_is_masked_changes_nothing_and_unmasked_text_does():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    with torch.inference_mode():
        expected = model(x, t, cond)
        noise = torch.where(cond.text_mask[..., None], cond.text_embeds, 100 * torch.randn(3, 5, 12))
        longer = dataclasses.replace(
            cond,
            text_embeds=torch.cat([noise, torch.randn(3, 2, 12)], dim=1),
            text_mask=torch.cat([cond.text_mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1),
        )
        torch.testing.assert_close(model(x, t, longer), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(x, t, dataclasses.replace(longer, text_mask=None)), expected, atol=1e-2)


def test_micro_conditions_count_each_on_its_own():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    with torch.inference_mode():
        expected = model(x, t, cond)
        for i in range(3):
            changed = cond.micro_conditions.clone()
            changed[:, i] += 5
            output = model(x, t, dataclasses.replace(cond, micro_conditions=changed))
            assert not torch.allclose(output, expected, atol=1e-3)


def test_positions_span_the_native_range_at_any_size():
    assert torch.equal(rescaled_sincos_grid(16, 4, 6, (4, 6), 1.0), sincos_grid(16, 4, 6))
    twice = rescaled_sincos_grid(16, 8, 12, (4, 6), 1.0).view(8, 12, 16)
    native = rescaled_sincos_grid(16, 4, 6, (4, 6), 1.0).view(4, 6, 16)
    torch.testing.assert_close(twice[::2, ::2], native)
    torch.testing.assert_close(rescaled_sincos_grid(16, 4, 6, (8, 12), 2.0), sincos_grid(16, 4, 6))


def test_null_text():
    x, t, _ = inputs(TINY)
    assert build_model(TINY).null_condition(3) is None
    config = dataclasses.replace(TINY, null_text_tokens=4, micro_conditions=False)
    model = randomised(config)
    null = model.null_condition(3)
    assert null.text_embeds.shape == (3, 4, 12)
    assert float(null.text_embeds.std()) > 0.1
    assert torch.equal(model(x, t), model(x, t, null))


@pytest.mark.parametrize("field", ["text_embeds", "micro_conditions"])
def test_missing_conditions_are_named(field):
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    with pytest.raises(UserError, match=f"{field} is missing"):
        model(x, t, dataclasses.replace(cond, **{field: None}))
    with pytest.raises(UserError, match="text_embeds is missing"):
        model(x, t)


def test_sizes_that_no_patch_divides_are_refused():
    x, t, cond = inputs(TINY, (8, 9))
    with pytest.raises(UserError, match="8x9"):
        build_model(TINY)(x, t, cond)


@pytest.mark.parametrize(("change", "text_tokens"), [({}, 5), ({"micro_conditions": False, "learn_sigma": False}, 7)])
@pytest.mark.parametrize("projection", [True, False])
def test_flops_equal_the_counter(change, text_tokens, projection):
    config = dataclasses.replace(TINY, text_projection=projection, **change)
    x, t, cond = inputs(config, batch=1, tokens=text_tokens)
    cond = dataclasses.replace(cond, text_mask=None)
    with FlopCounterMode(display=False) as counter:
        build_model(config)(x, t, cond)
    assert counter.get_total_flops() == forward_flops(config, (8, 12), text_tokens)


@pytest.mark.parametrize(
    ("name", "millions"), [("PixArt-XL/2", 611), ("PixArt-XL/2-1024-MS", 611), ("PixArt-Sigma-XL/2", 611)]
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(sum(count_parameters(network_of(preset(name))).values()) / 1e6) == millions


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 5}, "must divide by model.patch_size"),
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"width": 0}, "model.width=0"),
        ({"width": 50, "num_heads": 2}, "must divide by 4"),
        ({"width": 64}, "must divide by 3"),
        ({"interpolation_scale": 0.0}, "interpolation_scale"),
        ({"null_text_tokens": -1}, "null_text_tokens"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    config = PixArtConfig(
        image_size=(28, 28), in_channels=1, patch_size=4, width=64, depth=2, num_heads=4, text_width=10,
        learn_sigma=False,
    )  # fmt: skip
    model = build_model(config)

    def text(labels):
        return Condition(text_embeds=torch.nn.functional.one_hot(labels, 10).float()[:, None])

    before, after = validation_losses(model, list(model.parameters()), text, learning_rate=4e-3)
    assert before > 1.2
    assert after < 0.6
