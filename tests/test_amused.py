"""aMUSEd's token network: its initialisation, its counts, its conditions, and that it trains."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from smalti.data.digits import load_digits
from smalti.errors import UserError
from smalti.models import AmusedConfig, build_model, forward_flops, forward_with_features
from smalti.models.amused import GlobalResponseNorm
from smalti.types import Condition

TINY = AmusedConfig(
    codebook_size=16, vocabulary_size=18, grid_size=6, width=32, depth=2, num_heads=4, mlp_width=40, token_width=12,
    conv_width=24, conv_depth=2, conv_heads=3, text_width=10, pooled_width=10, num_micro_conditions=2,
    micro_condition_width=8,
)  # fmt: skip
HALVED = dataclasses.replace(TINY, downsample=True)
ONE_WIDTH = dataclasses.replace(TINY, conv_width=32, conv_heads=4, conv_depth=1)


def randomised(config, seed=0):
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, text_tokens=5, size=(4, 6)):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, config.vocabulary_size, (batch, *size), generator=generator),
        None,
        Condition(
            text_embeds=torch.randn(batch, text_tokens, config.text_width, generator=generator),
            pooled_embeds=torch.randn(batch, config.pooled_width, generator=generator),
            micro_conditions=torch.rand(batch, config.num_micro_conditions, generator=generator) * 100,
        ),
    )


@pytest.mark.parametrize("config", [TINY, HALVED])
def test_logits_start_at_zero_and_the_pooled_condition_silent(config):
    model = build_model(config)
    x, t, cond = inputs(config)
    assert torch.equal(model(x, t, cond), torch.zeros(3, 16, 4, 6))
    with torch.no_grad():
        model.head_proj.weight.normal_()
    other = dataclasses.replace(cond, pooled_embeds=cond.pooled_embeds + 1, micro_conditions=cond.micro_conditions + 1)
    assert torch.equal(model(x, t, other), model(x, t, cond))


def test_initialisation_is_as_published():
    model = build_model(dataclasses.replace(TINY, codebook_size=200, vocabulary_size=256, width=64, downsample=True))
    assert float(model.token_embed.weight.std()) == pytest.approx(1 / 16, rel=0.1)
    assert torch.equal(model.output.weight, model.token_embed.weight[:200])
    assert float(model.blocks[0].attn1.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.first_convs.conv_blocks[0].depthwise.weight.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.token_proj.weight.abs().max()) == pytest.approx(0.02 * (6 / (12 + 24)) ** 0.5, rel=0.1)
    assert float(model.upsample.weight.abs().max()) == pytest.approx((4 * 24) ** -0.5, rel=0.05)
    assert not model.first_convs.conv_blocks[0].response_norm.gamma.any()
    assert torch.equal(model.blocks[0].norm3_weight, torch.ones(64))


def test_initialisation_is_a_function_of_the_seed_alone():
    a, b, c = build_model(HALVED, 1), build_model(HALVED, 1), build_model(HALVED, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].attn1.qkv.weight, c.blocks[0].attn1.qkv.weight)
    assert not torch.equal(a.upsample.weight, c.upsample.weight)


@pytest.mark.parametrize("config", [TINY, HALVED, ONE_WIDTH])
def test_each_sample_has_its_own_condition(config):
    model = randomised(config)
    x, t, cond = inputs(config)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t, cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["text_embeds", "pooled_embeds", "micro_conditions"])
def test_every_condition_counts_and_is_needed(field):
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    assert not torch.allclose(
        model(x, t, dataclasses.replace(cond, **{field: getattr(cond, field) + 1})), model(x, t, cond)
    )
    with pytest.raises(UserError, match=f"{field} is missing"):
        model(x, t, dataclasses.replace(cond, **{field: None}))


def test_time_is_not_read():
    model = randomised(TINY)
    x, _, cond = inputs(TINY)
    assert torch.equal(model(x, torch.tensor([1.0, 2.0, 3.0]), cond), model(x, None, cond))
    assert model.null_condition(3) is None


@pytest.mark.parametrize("config", [TINY, HALVED])
def test_masked_text_has_no_effect(config):
    model = randomised(config)
    x, t, cond = inputs(config)
    padded = torch.cat([cond.text_embeds, torch.full((3, 4, 10), 7.0)], dim=1)
    mask = torch.arange(9).expand(3, 9) < 5
    masked = model(x, t, dataclasses.replace(cond, text_embeds=padded, text_mask=mask))
    torch.testing.assert_close(masked, model(x, t, cond), rtol=1e-4, atol=1e-4)


def test_an_odd_grid_cannot_be_halved():
    model = randomised(HALVED)
    x, t, cond = inputs(HALVED, size=(4, 5))
    with pytest.raises(UserError, match="4x5 tokens"):
        model(x, t, cond)


@pytest.mark.parametrize("config", [TINY, HALVED, ONE_WIDTH])
def test_flops_equal_the_counter(config):
    model = build_model(config)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch=1, text_tokens=5, size=(4, 6)))
    assert counter.get_total_flops() == forward_flops(config, (4, 6), 5)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch=1, text_tokens=5, size=(6, 6)))
    assert counter.get_total_flops() == forward_flops(config, None, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"conv_heads": 5}, "must divide by model.conv_heads"),
        ({"vocabulary_size": 16}, "its last token is the mask"),
        ({"mlp_width": 0}, "model.mlp_width=0"),
        ({"grid_size": 5, "downsample": True}, "grid_size=5 must be even"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def digit_tokens(images):
    """Digits as 7x7 grids of 16 grey levels: the mean of each 4x4 pixels."""
    return ((F.avg_pool2d(images, 4)[:, 0] + 1) * 8).long().clamp(0, 15)


def test_response_norm_of_nothing_has_a_slope():
    """A channel that is zero on the whole grid: its norm has no slope there, which must not become NaN."""
    norm, x = GlobalResponseNorm(3), torch.zeros(1, 2, 2, 3, requires_grad=True)
    torch.nn.init.ones_(norm.gamma)
    norm(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_training_lowers_the_loss_of_masked_tokens():
    """Half of the tokens are masked. A uniform guess scores ln 16 = 2.77, the grey levels' frequencies alone 1.43."""
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    config = dataclasses.replace(TINY, width=64, conv_depth=1, grid_size=7, num_micro_conditions=1, vocabulary_size=17)
    model = build_model(config)
    training, held_out = load_digits()
    generator = torch.Generator().manual_seed(0)

    def loss(images, labels, generator):
        tokens = digit_tokens(images)
        masked = torch.rand(tokens.shape, generator=generator) < 0.5
        x = torch.where(masked, config.mask_token, tokens)
        one_hot = F.one_hot(labels, 10).float()
        cond = Condition(
            text_embeds=one_hot[:, None], pooled_embeds=one_hot, micro_conditions=torch.zeros(len(images), 1)
        )
        return F.cross_entropy(model(x, None, cond), tokens, reduction="none")[masked].mean()

    def held_out_loss():
        with torch.no_grad():
            return float(loss(*held_out.labelled(torch.arange(128)), torch.Generator().manual_seed(1)))

    before = held_out_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        images, labels = training.labelled(torch.randint(0, 1024, (32,), generator=generator))
        value = loss(images, labels, generator)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert before == pytest.approx(2.7726, abs=1e-4)
    after = held_out_loss()
    assert after < 1.3


def test_features_by_name():
    model = randomised(TINY)
    x, _, cond = inputs(TINY)
    t = torch.zeros(3)
    output, features = forward_with_features(model, ["blocks.1", "first_convs"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["blocks.1"].shape == (3, 24, 32)
    assert features["first_convs"].shape == (3, 4, 6, 24)
