"""U-ViT: its initialisation, its counts, its tokens, and that it trains."""

import dataclasses

import pytest
import torch
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.config import apply_overrides, from_json, to_json
from smalti.errors import UserError
from smalti.models import UViTConfig, build_model, forward_flops, forward_with_features, network_of, preset
from smalti.recipes import recipe
from smalti.types import Condition

TINY = UViTConfig(image_size=(8, 12), in_channels=2, patch_size=2, width=32, depth=4, num_heads=4)
OPTIONS = dataclasses.replace(TINY, time_mlp=True, qkv_bias=True, final_conv=False, num_classes=0)
PLAIN = dataclasses.replace(TINY, long_skips=False)


def randomised(config):
    """A network whose every weight is random: at initialisation time and label say little."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.image_size, generator=generator)
    t = torch.rand(batch, generator=generator) * 999
    return x, t, Condition(class_labels=torch.arange(batch)) if config.num_classes else None


def test_initialisation_is_as_published():
    model = build_model(dataclasses.replace(TINY, width=64, num_classes=100, time_mlp=True))
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
        assert float(block.mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.05)
        assert float(block.mlp.fc1.bias.abs().max()) == 0.0
        assert torch.equal(block.norm1.weight, torch.ones(64))
    assert float(model.out_blocks[0].skip_linear.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.positions_ND.std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.label_embed.weight.std()) == pytest.approx(1.0, rel=0.05)
    assert float(model.patch_embed.weight.abs().max()) == pytest.approx(8**-0.5, rel=0.05)  # 2 channels of 2x2
    assert float(model.final_conv.weight.abs().max()) == pytest.approx(18**-0.5, rel=0.1)


def test_initialisation_is_a_function_of_the_seed_alone():
    a, b, c = build_model(TINY, 1), build_model(TINY, 1), build_model(TINY, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(
        torch.equal(p, q)
        for p, q in zip(a.parameters(), c.parameters(), strict=True)
        if bool(p.any()) and not bool((p == 1).all())
    )


@pytest.mark.parametrize("config", [TINY, OPTIONS, PLAIN])
def test_each_sample_has_its_own_time_and_label(config):
    model = randomised(config)
    x, t, cond = inputs(config)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond and cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x, t + 100, cond), together, atol=1e-3)
    if cond is not None:
        assert not torch.allclose(model(x, t, Condition(class_labels=cond.class_labels + 1)), together, atol=1e-3)


def test_long_skips_join_the_first_block_to_the_last():
    model = build_model(TINY).eval()
    x, t, cond = inputs(TINY)
    with torch.no_grad():  # the last block sees of its inputs the skip alone: what lies between has no effect
        model.out_blocks[-1].skip_linear.weight[:, :32] = 0
        output = model(x, t, cond)
        model.mid_block.mlp.fc2.bias += 1.0
        assert torch.equal(model(x, t, cond), output)
        model.in_blocks[0].mlp.fc2.bias += 1.0
        assert not torch.allclose(model(x, t, cond), output, atol=1e-3)


def test_missing_condition_is_the_null_label():
    model = build_model(TINY).eval()
    x, t, _ = inputs(TINY)
    assert torch.equal(model(x, t), model(x, t, model.null_condition(3)))
    assert build_model(OPTIONS).null_condition(3) is None


def test_without_a_null_label_a_label_is_needed():
    model = build_model(dataclasses.replace(TINY, null_label=False)).eval()
    x, t, cond = inputs(TINY)
    assert model.null_condition(3) is None
    assert model(x, t, cond).shape == x.shape
    with pytest.raises(UserError, match="class_labels is missing"):
        model(x, t)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("U-ViT-S/2", 44), ("U-ViT-S/4", 44), ("U-ViT-M/2", 131), ("U-ViT-M/4", 131), ("U-ViT-L/2", 287),
     ("U-ViT-L/4", 287), ("U-ViT-H/2", 501), ("U-ViT-H/4", 501)],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in network_of(preset(name)).parameters()) / 1e6) == millions


@pytest.mark.parametrize("config", [TINY, OPTIONS, PLAIN])
def test_flops_equal_the_counter(config):
    model = build_model(config)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch=1))
    assert counter.get_total_flops() == forward_flops(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 5}, "must divide by model.patch_size"),
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"depth": 3}, "model.depth=3 must be even"),
        ({"width": 0}, "model.width=0"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_a_recipe_can_train_it():
    config = apply_overrides(recipe("mnist"), ["model=uvit", "model.width=64", "time_mlp=true"])
    assert config.model == UViTConfig(width=64, time_mlp=True)
    assert from_json(type(config), to_json(config)) == config
    with pytest.raises(UserError, match="null_label=False"):
        apply_overrides(config, ["null_label=false"])


def test_training_lowers_the_validation_loss():
    model = build_model(UViTConfig(width=64, depth=2))
    before, after = validation_losses(
        model,
        list(model.parameters()),
        lambda labels: Condition(class_labels=labels),
        steps=120,
        batch_size=16,
        learning_rate=3e-3,
    )
    assert before > 1.2
    assert after < 0.85


@pytest.mark.parametrize("config", [TINY, OPTIONS, PLAIN])
def test_residual_stream_stays_float32_where_products_are_bfloat16(config):
    model = randomised(config)
    dtypes = {}
    for name, part in (("block", model.out_blocks[-1]), ("product", model.out_blocks[-1].mlp.fc1)):
        part.register_forward_hook(lambda part, inputs, output, name=name: dtypes.update({name: output.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs(config))
    assert dtypes == {"block": torch.float32, "product": torch.bfloat16}


def test_features_by_name():
    model = build_model(TINY).eval()
    x, t, cond = inputs(TINY)
    output, features = forward_with_features(model, ["in_blocks.0", "out_blocks.1"], x, t, cond)
    assert torch.equal(output, model(x, t, cond))
    assert features["in_blocks.0"].shape == features["out_blocks.1"].shape == (3, 26, 32)
