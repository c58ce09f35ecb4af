"""Z-Image: its initialisation, its counts, and what it does with times, captions and their padding."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import ZImageConfig, build_model, forward_flops, forward_with_features
from smalti.models.zimage import caption_positions, padded_length
from smalti.types import Condition

TINY = ZImageConfig(
    in_channels=2, width=24, depth=2, refiner_depth=1, num_heads=2, text_width=6, rope_widths=(4, 4, 4)
)  # fmt: skip


def randomised(config, seed=0):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, tokens=5, size=(8, 12), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    text = torch.randn(batch, tokens, config.text_width, generator=generator)
    return x, torch.rand(batch, generator=generator), text


def test_blocks_that_know_the_time_are_the_identity_at_initialisation():
    model = build_model(TINY)
    x, t, text = inputs(TINY)
    output, features = forward_with_features(
        model, ["blocks.0", "blocks.1", "noise_refiner.0", "context_refiner.0"], x, t, Condition(text_embeds=text)
    )
    joined = torch.cat([features["noise_refiner.0"], features["context_refiner.0"]], dim=1)
    assert joined.shape == (3, 64, 24)
    assert torch.equal(features["blocks.0"], joined)
    assert torch.equal(features["blocks.1"], joined)
    assert torch.equal(output, torch.zeros_like(x))


def test_each_sample_has_its_own_time_and_caption():
    model = randomised(TINY)
    x, t, text = inputs(TINY, tokens=40)
    cond = Condition(text_embeds=text, text_mask=torch.arange(40) < torch.tensor([[3], [32], [35]]))
    together = model(x, t, cond)
    for i, length in enumerate((3, 32, 35)):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
        cut = model(x[i : i + 1], t[i : i + 1], Condition(text_embeds=text[i : i + 1, :length]))
        torch.testing.assert_close(cut, together[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x, t / 2, cond), together, rtol=1e-2)
    assert not torch.allclose(model(x, t, Condition(text_embeds=text)), together, rtol=1e-2)


def test_masked_text_does_not_change_the_result():
    model = randomised(TINY)
    x, t, text = inputs(TINY, tokens=40)
    mask = torch.arange(40) < torch.tensor([[3], [0], [35]])
    changed = torch.where(mask[..., None], text, torch.randn_like(text))
    assert not torch.equal(changed, text)
    a, b = (model(x, t, Condition(text_embeds=v, text_mask=mask)) for v in (text, changed))
    assert a.isfinite().all()
    assert torch.equal(a, b)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.booleans(), min_size=64, max_size=64), min_size=1, max_size=3))
def test_caption_tokens_are_counted_in_order(rows):
    positions, lengths = caption_positions(torch.tensor(rows))
    for row, places, length in zip(rows, positions.tolist(), lengths.tolist(), strict=True):
        assert sorted(places) == list(range(1, 65))
        assert [p for p, real in zip(places, row, strict=True) if real] == list(range(1, sum(row) + 1))
        assert length == padded_length(sum(row))


def test_an_empty_caption_is_no_trouble():
    """Nor to its neighbour in the batch, nor to the gradients."""
    model = randomised(TINY)
    x, t, text = inputs(TINY)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[1] = False
    output = model(x, t, Condition(text_embeds=text, text_mask=mask))
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = model(x[:1], t[:1], Condition(text_embeds=text[:1], text_mask=mask[:1]))
    torch.testing.assert_close(output[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_forward_with_gradients_computes_what_one_without_does():
    """Without them the gate is multiplied in place."""
    model = randomised(TINY)
    x, t, text = inputs(TINY, size=(4, 14))
    cond = Condition(text_embeds=text)
    with torch.inference_mode():
        expected = model(x, t, cond)
    output = model(x, t, cond)
    output.sum().backward()
    # Close and not equal: where gradients are wanted, attention is another kernel.
    torch.testing.assert_close(output.detach(), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32():
    model = build_model(dataclasses.replace(TINY, width=96, rope_widths=(16, 16, 16)))
    with torch.no_grad():
        torch.nn.init.normal_(model.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x, t, text = inputs(TINY)
    with torch.no_grad():
        expected = model(x, t, Condition(text_embeds=text))
        output = model.bfloat16()(x.bfloat16(), t, Condition(text_embeds=text.bfloat16()))
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).abs().max() / expected.abs().max()) < 0.03


def test_missing_and_impossible_inputs_are_refused():
    model = build_model(dataclasses.replace(TINY, rope_lengths=(70, 8, 8)))
    x, t, text = inputs(TINY)
    assert model.null_condition(3) is None
    for cond in (None, Condition(class_labels=torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(UserError, match="text_embeds is missing"):
            model(x, t, cond)
    with pytest.raises(UserError, match="must divide by"):
        model(x[..., :-1], t, Condition(text_embeds=text))
    with pytest.raises(UserError, match="rope_lengths"):
        model(x.repeat(1, 1, 1, 2), t, Condition(text_embeds=text))
    with pytest.raises(UserError, match="rope_lengths"):
        model(x, t, Condition(text_embeds=text.repeat(1, 13, 1)))


def test_the_first_axis_counts_the_caption_and_the_picture_behind_it():
    """Places 1 .. 32 for a caption filled up to 32, place 33 for the picture: 34 with place 0."""
    x, t, text = inputs(TINY)
    build_model(dataclasses.replace(TINY, rope_lengths=(34, 8, 8)))(x, t, Condition(text_embeds=text))
    with pytest.raises(UserError, match="rope_lengths"):
        build_model(dataclasses.replace(TINY, rope_lengths=(33, 8, 8)))(x, t, Condition(text_embeds=text))


@pytest.mark.parametrize("tokens", [5, 64])
@pytest.mark.parametrize("size", [(8, 12), (16, 8)])
def test_flops_equal_the_counter(size, tokens):
    model = build_model(TINY)
    x, t, text = inputs(TINY, batch=1, tokens=tokens, size=size)
    with FlopCounterMode(display=False) as counter:
        model(x, t, Condition(text_embeds=text))
    assert counter.get_total_flops() == forward_flops(TINY, size, tokens)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"width": 0}, "model.width=0"),
        ({"rope_widths": (4, 4, 2)}, "model.rope_widths"),
        ({"rope_widths": (6, 3, 3)}, "model.rope_widths"),
        ({"rope_lengths": (4, 4)}, "model.rope_lengths"),
        ({"refiner_depth": -1}, "refiner_depth"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    config = ZImageConfig(
        in_channels=1, patch_size=4, width=48, depth=2, refiner_depth=1, num_heads=2, text_width=10,
        rope_widths=(8, 8, 8),
    )  # fmt: skip
    model = build_model(config)

    def condition(labels):
        return Condition(text_embeds=torch.nn.functional.one_hot(labels, 10)[:, None].float())

    before, after = validation_losses(
        lambda x, t, cond: model(x, 1 - t / 1000, cond), list(model.parameters()), condition, steps=40,
        learning_rate=5e-3,
    )  # fmt: skip
    assert before > 1.2
    assert after < 0.7
