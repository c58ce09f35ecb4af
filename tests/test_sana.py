"""Sana: linear attention by its sum, its initialisation, its counts, what it does with texts, and that it learns."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    SanaConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.models.sana import LinearAttention, MixFeedForward
from smalti.types import Condition

TINY = SanaConfig(
    image_size=(4, 4), in_channels=2, out_channels=3, width=32, depth=2, num_heads=4, num_cross_heads=2,
    text_width=12, guidance_embeds=True, qk_norm=True,
)  # fmt: skip


def randomised(config, seed=0):
    """A network whose every weight is random."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, size=(4, 6), batch=3, tokens=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return (
        x,
        t,
        Condition(
            text_embeds=torch.randn(batch, tokens, config.text_width, generator=generator),
            text_mask=torch.arange(tokens) < torch.arange(1, batch + 1)[:, None],
            guidance=torch.rand(batch, generator=generator) if config.guidance_embeds else None,
        ),
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_linear_attention_is_the_sum_of_its_definition(qk_norm):
    torch.manual_seed(0)
    part = LinearAttention(12, 3, qk_norm=qk_norm, bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = part.qkv(x).chunk(3, dim=-1)
    if qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() for z in (q, k))
    q, k, v = (z.view(2, 7, 3, 4) for z in (q.relu(), k.relu(), v))
    weights = torch.einsum("bnhk,bmhk->bhnm", q, k)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-15)
    expected = part.out(torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2))
    torch.testing.assert_close(part(x), expected, rtol=1e-5, atol=1e-6)  # the sums are float32


def test_mix_feed_forward_sees_the_eight_neighbours_alone():
    torch.manual_seed(0)
    part = MixFeedForward(8, 12)
    x = torch.randn(1, 35, 8, requires_grad=True)
    part(x, 5, 7)[0, 2 * 7 + 3].sum().backward()
    seen = x.grad[0].abs().sum(-1).view(5, 7) > 0
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen, expected)


def test_published_initialisation():
    model = build_model(dataclasses.replace(TINY, width=192))
    assert torch.equal(model.text_norm.weight, torch.full((192,), 0.01))
    assert torch.equal(model.guidance_embed.fc2.weight, torch.zeros(192, 192))
    assert float(model.modulation_rows.detach().std()) == pytest.approx(192**-0.5, rel=0.1)
    assert float(model.modulation.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.blocks[1].mlp.depthwise.weight.detach().abs().max()) == pytest.approx(1 / 3, rel=0.01)
    assert float(model.blocks[0].mlp.fc1.weight.detach().abs().max()) == pytest.approx(192**-0.5, rel=0.01)
    assert float(model.output.weight.detach().abs().max()) > 0.1


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), batch=st.integers(1, 4))
def test_each_sample_has_its_own_time_text_and_guidance(rows, columns, batch):
    model = randomised(TINY)
    x, t, cond = inputs(TINY, (rows, columns), batch)
    with torch.inference_mode():
        together = model(x, t, cond)
        assert together.shape == (batch, 3, rows, columns)
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


def test_guidance_counts():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    with torch.inference_mode():
        other = model(x, t, dataclasses.replace(cond, guidance=cond.guidance + 1))
        assert not torch.allclose(other, model(x, t, cond), atol=1e-3)


def test_null_text():
    x, t, _ = inputs(TINY)
    assert build_model(TINY).null_condition(3) is None
    model = randomised(dataclasses.replace(TINY, null_text_tokens=4, guidance_embeds=False))
    null = model.null_condition(3)
    assert null.text_embeds.shape == (3, 4, 12)
    assert torch.equal(model(x, t), model(x, t, null))


@pytest.mark.parametrize("field", ["text_embeds", "guidance"])
def test_missing_conditions_are_named(field):
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    with pytest.raises(UserError, match=f"{field} is missing"):
        model(x, t, dataclasses.replace(cond, **{field: None}))
    with pytest.raises(UserError, match="text_embeds is missing"):
        model(x, t)


def test_sizes_that_no_patch_divides_are_refused():
    config = dataclasses.replace(TINY, patch_size=2)
    x, t, cond = inputs(config, (4, 5))
    with pytest.raises(UserError, match="4x5"):
        build_model(config)(x, t, cond)


@pytest.mark.parametrize(
    "change", [{}, {"guidance_embeds": False, "qk_norm": False, "attention_bias": True}, {"interpolation_scale": 2.0}]
)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_flops_equal_the_counter(change, patch_size):
    config = dataclasses.replace(TINY, patch_size=patch_size, mlp_ratio=1.3, **change)
    x, t, cond = inputs(config, batch=1, tokens=7)
    with FlopCounterMode(display=False) as counter:
        build_model(config)(x, t, dataclasses.replace(cond, text_mask=None))
    assert counter.get_total_flops() == forward_flops(config, (4, 6), 7)


def test_cost_grows_with_the_tokens_and_not_with_their_square():
    config = preset("Sana-1.6B")
    at = [forward_flops(config, (side, side), 300) for side in (32, 64, 128)]
    assert (at[2] - at[1]) == 4 * (at[1] - at[0])  # linear: four times the tokens, four times the increase


@pytest.mark.parametrize(("name", "millions"), [("Sana-0.6B", 592), ("Sana-1.6B", 1604)])
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(sum(count_parameters(network_of(preset(name))).values()) / 1e6) == millions


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 3}, "must divide by model.patch_size"),
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"num_cross_heads": 5}, "must divide by model.num_cross_heads"),
        ({"out_channels": 0}, "model.out_channels=0"),
        ({"interpolation_scale": 0.0}, "interpolation_scale"),
        ({"width": 30, "num_heads": 2, "interpolation_scale": 1.0}, "must divide by 4"),
        ({"null_text_tokens": -1}, "null_text_tokens"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    config = SanaConfig(
        image_size=(28, 28), in_channels=1, out_channels=1, patch_size=4, width=64, depth=2, num_heads=4,
        num_cross_heads=4, text_width=10, mlp_ratio=2.0,
    )  # fmt: skip
    model = build_model(config)

    def text(labels):
        return Condition(text_embeds=torch.nn.functional.one_hot(labels, 10).float()[:, None])

    # Its random output costs it 2 at the start, and text comes in at 0.01: 60 steps need the higher rate.
    before, after = validation_losses(model, list(model.parameters()), text, learning_rate=4e-3)
    assert before > 1.2
    assert after < 0.6


def test_features_by_name():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    output, features = forward_with_features(model, ["blocks.1", "blocks.0.attn"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["blocks.1"].shape == features["blocks.0.attn"].shape == (3, 24, 32)
