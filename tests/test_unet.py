"""U-Net: its initialisation, its counts, its sizes, and what it does with times and labels."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.config import RunConfig, apply_overrides, from_json, to_json
from smalti.errors import UserError
from smalti.models import UNetConfig, build_model, forward_flops, forward_with_features, network_of, preset
from smalti.recipes import recipe
from smalti.types import Condition

TINY = UNetConfig(
    image_size=(8, 12), in_channels=2, widths=(8, 16), attention_levels=(1,), head_width=8, num_classes=5, norm_groups=4
)
ADM = dataclasses.replace(TINY, resampling="residual", widths=(8, 8, 16), image_size=(8, 12), blocks_per_level=2)

UNTRAINED = build_model(TINY)


def randomised(config, seed=0):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, size=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *(size or config.image_size), generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return x, t, Condition(class_labels=torch.arange(batch) % max(config.num_classes, 1))


@pytest.mark.parametrize("config", [TINY, ADM])
def test_blocks_are_their_shortcuts_at_initialisation(config):
    model = build_model(config)
    x, t, cond = inputs(config)
    rows = model.modulation(torch.nn.functional.silu(model.embed_condition(t, cond)))
    rows = rows.split(model.modulation_rows, dim=1)
    hidden = torch.randn(3, 16, 4, 6)
    middle = [list(config.modulation_rows()).index(f"middle.blocks.{j}") for j in range(2)]
    assert torch.equal(model.middle(hidden, iter([rows[i] for i in middle])), hidden)
    assert torch.equal(model.up[0].attentions[0](hidden), hidden)
    assert torch.equal(model(x, t, cond), torch.zeros_like(x))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_any_size_that_halves_often_enough(rows, columns):
    x, t, cond = inputs(TINY, batch=1, size=(2 * rows, 2 * columns))
    output = UNTRAINED(x, t, cond)
    assert output.shape == x.shape
    assert output.is_contiguous()
    with pytest.raises(UserError, match="must divide by"):
        UNTRAINED(x[..., :-1], t, cond)


@pytest.mark.parametrize("config", [TINY, ADM])
def test_each_sample_has_its_own_time_and_label(config):
    model = randomised(config)
    x, t, cond = inputs(config)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    for changed in (model(x, t + 100, cond), model(x, t, Condition(class_labels=cond.class_labels + 1))):
        assert not torch.allclose(changed, together, rtol=1e-2)


def test_missing_condition_is_the_null_label():
    model = randomised(TINY)
    x, t, _ = inputs(TINY)
    assert model.null_condition(3).class_labels.tolist() == [5, 5, 5]
    assert torch.equal(model(x, t), model(x, t, model.null_condition(3)))


def test_a_table_without_null_label_says_so():
    model = build_model(dataclasses.replace(TINY, null_label=False))
    x, t, _ = inputs(TINY)
    with pytest.raises(UserError, match="null_label=False"):
        model.null_condition(3)
    with pytest.raises(UserError, match="class_labels is missing"):
        model(x, t)


def test_unconditional():
    model = build_model(dataclasses.replace(TINY, num_classes=0))
    assert model.null_condition(3) is None
    assert model(*inputs(TINY)[:2]).shape == (3, 2, 8, 12)


@pytest.mark.parametrize(("name", "millions"), [("DDPM-CIFAR10", 35.7), ("ADM-ImageNet64", 295.9)])
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in network_of(preset(name)).parameters())
    assert round(parameters / 1e6, 1) == millions


def test_default_costs_about_what_the_smallest_transformer_does():
    assert forward_flops(UNetConfig()) == pytest.approx(forward_flops(preset("DiT-Tiny")), rel=0.25)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        ADM,
        dataclasses.replace(TINY, middle="residual", learn_sigma=True, time_modulation="add", blocks_per_level=2),
        dataclasses.replace(ADM, middle="none", attention_levels=(0, 2), num_classes=0, time_width=12),
    ],
)
def test_flops_equal_the_counter(config):
    model = build_model(config)
    for size in (None, (4, 8)):
        x, t, cond = inputs(config, batch=1, size=size)
        with FlopCounterMode(display=False) as counter:
            model(x, t, cond)
        assert counter.get_total_flops() == forward_flops(config, size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": (9, 12)}, "model.image_size"),
        ({"widths": (8, 18)}, "must divide by model.norm_groups"),
        ({"widths": ()}, "model.widths"),
        ({"attention_levels": (2,)}, "model.attention_levels"),
        ({"head_width": 5}, "model.head_width=5"),
        ({"num_classes": -1}, "num_classes"),
        ({"blocks_per_level": 0}, "blocks_per_level"),
        ({"middle_norm_groups": 3}, "middle_norm_groups"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_training_lowers_the_validation_loss():
    model = build_model(UNetConfig(widths=(8, 16), attention_levels=(), norm_groups=4))
    before, after = validation_losses(
        model, list(model.parameters()), lambda labels: Condition(class_labels=labels), steps=100, batch_size=8,
        learning_rate=3e-3,
    )  # fmt: skip
    assert before > 1.2
    assert after < 0.5


def test_recipes_take_it():
    overrides = ["model=unet", "head_width=none", "attention_levels=1", "widths=8,16", "resampling=residual"]
    config = apply_overrides(recipe("mnist"), overrides)
    expected = UNetConfig(attention_levels=(1,), widths=(8, 16), head_width=None, resampling="residual")
    assert config.model == expected
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(UserError, match=r"downsample_padding.*has no effect while resampling=residual"):
        apply_overrides(config, ["downsample_padding=0"])
    with pytest.raises(UserError, match="null_label=False"):
        apply_overrides(config, ["null_label=false"])


def test_features_by_name():
    model = randomised(ADM)
    x, t, cond = inputs(ADM)
    output, features = forward_with_features(model, ["down.0.resample", "middle", "up.2.blocks.0"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["down.0.resample"].shape == (3, 8, 4, 6)
    assert features["middle"].shape == (3, 16, 2, 3)
    assert features["up.2.blocks.0"].shape == (3, 8, 8, 12)
