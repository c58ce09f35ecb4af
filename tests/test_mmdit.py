"""MM-DiT: its initialisation, its counts, and what it does with sizes, times, texts and masks."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    MMDiTConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.types import Condition

TINY = MMDiTConfig(
    image_size=(8, 12), in_channels=2, out_channels=3, width=32, depth=3, num_heads=4, text_width=6, pooled_width=5,
    position_grid=8, qk_norm=True, dual_attention_blocks=(0,),
)  # fmt: skip


def randomised(config, seed=0):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, text_tokens=5, size=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, *(size or config.image_size), generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, text_tokens, config.text_width, generator=generator)
    pooled = torch.randn(batch, config.pooled_width, generator=generator)
    return x, t, Condition(text_embeds=text, pooled_embeds=pooled)


def test_blocks_are_the_identity_at_initialisation():
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    tokens, text, c = torch.randn(3, 24, 32), torch.randn(3, 5, 32), torch.randn(3, 32)
    for block in model.blocks:
        image_out, text_out = block(tokens, text, c)
        assert torch.equal(image_out, tokens)
        assert torch.equal(text_out, text)
    assert torch.equal(model(x, t, cond), torch.zeros(3, 3, 8, 12))


def test_each_sample_has_its_own_time_and_text():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    for change in ({"text_embeds": cond.text_embeds.flip(0)}, {"pooled_embeds": cond.pooled_embeds.flip(0)}):
        assert not torch.allclose(model(x, t, dataclasses.replace(cond, **change))[0], together[0], atol=1e-2)
    assert not torch.allclose(model(x, t.flip(0), cond)[0], together[0], atol=1e-2)


def test_masked_text_does_not_matter():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    padded = F.pad(cond.text_embeds, (0, 0, 0, 3), value=2.0)
    mask = torch.arange(8).expand(3, 8) < 5
    masked = model(x, t, dataclasses.replace(cond, text_embeds=padded, text_mask=mask))
    torch.testing.assert_close(masked, model(x, t, cond), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x, t, dataclasses.replace(cond, text_embeds=padded)), masked, atol=1e-2)


def test_text_has_no_order():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    turned = dataclasses.replace(cond, text_embeds=cond.text_embeds.roll(2, dims=1))
    torch.testing.assert_close(model(x, t, turned), model(x, t, cond), rtol=1e-4, atol=1e-4)


def test_a_size_takes_the_middle_of_the_position_table():
    model = randomised(TINY)
    table = model.positions_ND.view(8, 8, 32)
    assert torch.equal(model.positions_of(3, 6), table[2:5, 1:7].reshape(18, 32))
    assert model(*inputs(TINY, size=(16, 2))).shape == (3, 3, 16, 2)


def test_the_position_table_counts_native_tokens():
    """8 rows and columns for 4 x 6 native tokens: row i counts as i 4 / 8, column j as j 6 / 8; columns come first."""
    table = randomised(TINY).positions_ND.view(8, 8, 32)
    index = torch.arange(8.0)
    torch.testing.assert_close(table[3, :, 0], torch.sin(index * 6 / 8))
    torch.testing.assert_close(table[:, 5, 16], torch.sin(index * 4 / 8))


@pytest.mark.parametrize("size", [(8, 11), (18, 4), (4, 18)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} does not fit: multiples of 2 up to 16"):
        randomised(TINY)(*inputs(TINY, size=size))


@pytest.mark.parametrize("field", ["text_embeds", "pooled_embeds"])
def test_missing_condition_is_named(field):
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    with pytest.raises(UserError, match=f"condition.{field} is missing"):
        model(x, t, dataclasses.replace(cond, **{field: None}))
    with pytest.raises(UserError, match=r"condition\.text_embeds is missing"):
        model(x, t)
    assert model.null_condition(3) is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("SD3-medium", 2_028_328_000), ("SD3.5-medium", 2_243_171_520), ("SD3.5-large", 8_056_627_520)],
)
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(count_parameters(network_of(preset(name))).values()) == parameters


@pytest.mark.parametrize(("size", "text_tokens"), [(None, 0), ((4, 16), 7)])
@pytest.mark.parametrize("change", [{}, {"dual_attention_blocks": (1, 2)}])
def test_flops_equal_the_counter(size, text_tokens, change):
    config = dataclasses.replace(TINY, **change)
    model = build_model(config)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch=1, text_tokens=text_tokens, size=size))
    assert counter.get_total_flops() == forward_flops(config, size, text_tokens)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"width": 30, "num_heads": 5}, "and by 4"),
        ({"depth": 0}, "model.depth=0"),
        ({"out_channels": 0}, "model.out_channels=0"),
        ({"dual_attention_blocks": (3,)}, "must be different ones of 0 .. 2"),
        ({"dual_attention_blocks": (1, 1)}, "must be different ones of 0 .. 2"),
        ({"image_size": (8, 18)}, "model.image_size=.* multiples of 2 up to 16"),
        ({"image_size": (8, 9)}, "model.image_size=.* multiples of 2 up to 16"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    config = MMDiTConfig(
        image_size=(28, 28), in_channels=1, patch_size=4, width=64, depth=2, num_heads=4, text_width=10,
        pooled_width=10, position_grid=8, qk_norm=True, dual_attention_blocks=(0,),
    )  # fmt: skip
    model = build_model(config)

    def condition(labels):
        one_hot = F.one_hot(labels, 10).float()
        return Condition(text_embeds=one_hot[:, None], pooled_embeds=one_hot)

    before, after = validation_losses(model, list(model.parameters()), condition)
    assert before > 1.8
    assert after < 0.7


def test_features_by_name():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    output, features = forward_with_features(model, ["blocks.1", "blocks.0.attn", "blocks.0.text_mlp"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["blocks.1"].shape == features["blocks.0.attn"].shape == (3, 24, 32)
    assert features["blocks.0.text_mlp"].shape == (3, 5, 32)
