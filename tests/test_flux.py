"""FLUX.1: its initialisation, its counts, and what it does with sizes, times, guidance, texts and masks."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    FluxConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.nn.positions import rope_angles
from smalti.types import Condition

TINY = FluxConfig(
    image_size=(8, 12), in_channels=2, out_channels=3, width=32, depth=2, single_depth=2, num_heads=2, text_width=6,
    pooled_width=5, rope_widths=(4, 6, 6),
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
    t = torch.rand(batch, generator=generator)
    text = torch.randn(batch, text_tokens, config.text_width, generator=generator)
    pooled = torch.randn(batch, config.pooled_width, generator=generator)
    guidance = torch.linspace(1, 7, batch) if config.guidance else None
    return x, t, Condition(text_embeds=text, pooled_embeds=pooled, guidance=guidance)


def test_blocks_are_the_identity_at_initialisation():
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    tokens, text, c = torch.randn(3, 24, 32), torch.randn(3, 5, 32), torch.randn(3, 32)
    rope = model.rope_of(5, 4, 6, x.device)
    for block in model.double_blocks:
        image_out, text_out = block(tokens, text, c, rope)
        assert torch.equal(image_out, tokens)
        assert torch.equal(text_out, text)
    for block in model.single_blocks:
        assert torch.equal(block(tokens, c, rope[:, 5:]), tokens)
    assert torch.equal(model(x, t, cond), torch.zeros(3, 3, 8, 12))


@pytest.mark.parametrize("stack", ["double", "single"])
def test_float16_past_its_range_stays_at_the_largest_number(stack):
    """Two blocks each add 60,000: without the clip the second sum is infinite, and what follows nan."""
    model = build_model(TINY)
    with torch.no_grad():
        if stack == "double":
            for block in model.double_blocks:
                block.text_mlp.fc2.bias.fill_(60_000.0)
                block.text_modulation.bias[-32:] = 1.0  # the feed-forward's gate
        else:
            for block in model.single_blocks:
                block.out.bias.fill_(60_000.0)
                block.modulation.bias[-32:] = 1.0
        model.output.weight.fill_(0.01)
    x, t, cond = inputs(TINY)
    with torch.no_grad():
        output = model.half()(x.half(), t, cond.map(lambda value: value.half()))
    assert torch.isfinite(output).all()


def test_each_sample_has_its_own_time_and_text():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    for name in ("text_embeds", "pooled_embeds", "guidance"):
        change = {name: getattr(cond, name).flip(0)}
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


def test_angles_of_text_and_image():
    model = build_model(TINY)
    rope = model.rope_of(5, 4, 6, torch.device("cpu"))
    ids = torch.zeros(29, 3)
    ids[5:, 1], ids[5:, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    assert torch.equal(rope, rope_angles(ids, (4, 6, 6), 10000.0))


def test_any_even_size():
    assert randomised(TINY)(*inputs(TINY, size=(16, 2))).shape == (3, 3, 16, 2)


@pytest.mark.parametrize("size", [(8, 11), (7, 4)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} does not fit: multiples of 2 do"):
        randomised(TINY)(*inputs(TINY, size=size))


@pytest.mark.parametrize("field", ["text_embeds", "pooled_embeds", "guidance"])
def test_missing_condition_is_named(field):
    model = build_model(TINY)
    x, t, cond = inputs(TINY)
    with pytest.raises(UserError, match=f"condition.{field} is missing"):
        model(x, t, dataclasses.replace(cond, **{field: None}))
    with pytest.raises(UserError, match=r"condition\.text_embeds is missing"):
        model(x, t)
    assert model.null_condition(3) is None


@pytest.mark.parametrize(("name", "parameters"), [("FLUX.1-dev", 11_901_408_320), ("FLUX.1-schnell", 11_891_178_560)])
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(count_parameters(network_of(preset(name))).values()) == parameters


@pytest.mark.parametrize(("size", "text_tokens"), [(None, 0), ((4, 16), 7)])
@pytest.mark.parametrize("change", [{}, {"guidance": False, "single_depth": 0}])
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
        ({"depth": -1}, "model.depth=-1"),
        ({"out_channels": 0}, "model.out_channels=0"),
        ({"rope_widths": (4, 6, 4)}, "must be even and sum to model.width/num_heads=16"),
        ({"rope_widths": (4, 7, 5)}, "must be even and sum to model.width/num_heads=16"),
        ({"image_size": (8, 9)}, "model.image_size=.* multiples of 2"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    config = FluxConfig(
        image_size=(14, 14), in_channels=1, width=64, depth=1, single_depth=1, num_heads=4, text_width=10,
        pooled_width=10, guidance=False, rope_widths=(4, 6, 6),
    )  # fmt: skip
    model = build_model(config)

    def condition(labels):
        one_hot = F.one_hot(labels, 10).float()
        return Condition(text_embeds=one_hot[:, None], pooled_embeds=one_hot)

    before, after = validation_losses(
        lambda x, t, cond: model(x, t / 1000, cond), list(model.parameters()), condition,
        to_input=lambda images: F.avg_pool2d(images, 2),
    )  # fmt: skip
    assert before > 1.8
    assert after < 0.75


def test_features_by_name():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    output, features = forward_with_features(
        model, ["double_blocks.1", "double_blocks.0.attn", "single_blocks.1"], x, t, cond
    )
    assert torch.equal(output, model(x, t, cond))
    assert features["double_blocks.1"].shape == features["double_blocks.0.attn"].shape == (3, 24, 32)
    assert features["single_blocks.1"].shape == (3, 29, 32)
