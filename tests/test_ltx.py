"""LTX-Video: initialisation, counts, refusals, and what it does with time, text and positions."""

import dataclasses

import pytest
import torch
from moving_digits import moving_digits, text_of_labels
from tiny_training import validation_losses
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    LTX,
    LTXConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.models.ltx import fractional_positions, rotary_angles
from smalti.types import Condition

TINY = LTXConfig(
    video_size=(3, 4, 6), in_channels=2, out_channels=2, width=32, depth=2, num_heads=2, text_width=6
)  # fmt: skip
PATCHED = dataclasses.replace(TINY, patch_size=2, patch_frames=3, out_channels=3)


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
    x = torch.randn(batch, config.in_channels, *config.video_size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return x, t, Condition(text_embeds=torch.randn(batch, 4, 6, generator=generator))


def test_positions_are_seconds_and_pixels_of_the_longest_video():
    time, y, x = fractional_positions(LTXConfig(), (3, 2, 65), torch.device("cpu"))
    torch.testing.assert_close(time, torch.tensor([0.0, 8.0, 16.0]) / 25 / 20)
    assert y[1] == 32 / 2048
    assert x[64] == 1.0
    of_0_9_5 = LTXConfig(causal_positions=True, frame_rate=10.0)
    causal, _, _ = fractional_positions(of_0_9_5, (3, 2, 2), torch.device("cpu"))
    torch.testing.assert_close(causal, torch.tensor([0.0, 1.0, 9.0]) / 10 / 20)
    patched = dataclasses.replace(of_0_9_5, patch_frames=3, patch_size=2, video_size=(3, 4, 4))
    causal, y, _ = fractional_positions(patched, (3, 2, 2), torch.device("cpu"))
    torch.testing.assert_close(causal, torch.tensor([0.0, 17.0, 41.0]) / 10 / 20)
    assert y[1] == 64 / 2048


def test_angles_go_frequency_by_frequency_and_leave_the_rest_at_rest():
    config = dataclasses.replace(TINY, width=16, num_heads=2)  # 2 frequencies for 3 axes, in pairs: 12; 4 left over
    cos, sin = rotary_angles(config, (3, 4, 6), torch.device("cpu")).transpose(1, 2).flatten(2)  # NK
    axes = torch.cartesian_prod(*fractional_positions(config, (3, 4, 6), torch.device("cpu")))
    angles = torch.stack([torch.pi / 2 * f * (2 * axes[:, a] - 1) for f in (1, 10000) for a in range(3)], dim=1)
    pairs = angles.repeat_interleave(2, dim=1)
    torch.testing.assert_close(cos[:, 4:], pairs.cos(), rtol=0, atol=3e-3)  # float32 angles up to 15708
    torch.testing.assert_close(sin[:, 4:10], pairs[:, :6].sin(), rtol=1e-5, atol=1e-5)
    assert torch.all(cos[:, :4] == 1)
    assert torch.all(sin[:, :4] == 0)


def test_published_initialisation():
    model = build_model(dataclasses.replace(TINY, width=192))
    for name in ("time_embed.fc1", "text_embed.fc2", "modulation"):
        assert float(model.get_submodule(name).weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        weight = model.get_submodule(name).weight.detach()
        assert float(weight.abs().max()) == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.01)  # xavier's
    for table in (model.blocks[0].table_6D, model.output_table_2D):
        assert float(table.detach().std()) == pytest.approx(192**-0.5, rel=0.15)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("config", [TINY, PATCHED], ids=["tiny", "patched"])
def test_blocks_are_the_identity_at_initialisation(config):
    model = build_model(config)
    x, t, cond = inputs(config)
    output, features = forward_with_features(model, ["patch_embed", "blocks.0", "blocks.1"], x, t, cond)
    assert torch.equal(features["patch_embed"], features["blocks.0"])
    assert torch.equal(features["blocks.0"], features["blocks.1"])
    assert torch.equal(output, torch.zeros(3, config.out_channels, *config.video_size))


@pytest.mark.parametrize("config", [TINY, PATCHED], ids=["tiny", "patched"])
def test_each_sample_has_its_own_time_and_text(config):
    model = randomised(config)
    x, t, cond = inputs(config)
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_masked_text_is_not_seen():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    text = torch.cat([cond.text_embeds, 9 * torch.randn(3, 2, 6)], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    masked = model(x, t, Condition(text_embeds=text, text_mask=mask))
    torch.testing.assert_close(masked, model(x, t, cond), rtol=1e-4, atol=1e-4)
    assert (model(x, t, Condition(text_embeds=text)) - masked).abs().max() > 1e-2


@pytest.mark.parametrize("config", [TINY, PATCHED], ids=["tiny", "patched"])
@pytest.mark.parametrize("size", [None, (3, 2, 8)])
def test_flops_equal_the_counter(config, size):
    model = build_model(config)
    x, t, cond = inputs(config if size is None else dataclasses.replace(config, video_size=size), batch=1)
    with FlopCounterMode(display=False) as counter:
        output = model(x, t, cond)
    assert output.shape[2:] == x.shape[2:]
    assert counter.get_total_flops() == forward_flops(config, size, text_tokens=4)


def test_preset_has_the_published_size():
    with torch.device("meta"):
        parameters = sum(count_parameters(LTX(preset("LTX-Video-2B"))).values())
    assert parameters / 1e6 == pytest.approx(1923.4, abs=0.05)  # as diffusers' class counts them


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "must divide by 2 model.num_heads"),
        ({"width": 0}, "model.width=0"),
        ({"width": 4}, "must be at least 6"),
        ({"frame_rate": 0.0}, "model.frame_rate=0.0"),
        ({"patch_size": 4}, "must divide by the patch"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_inputs_that_do_not_fit_are_refused():
    x, t, cond = inputs(PATCHED)
    for wrong in (None, Condition()):
        with pytest.raises(UserError, match="text_embeds is missing"):
            network_of(PATCHED)(x, t, wrong)
    with pytest.raises(UserError, match="must divide by the patch"):
        network_of(PATCHED)(x[..., :5], t, cond)
    assert network_of(TINY).null_condition(2) is None


def test_training_lowers_the_validation_loss():
    config = LTXConfig(
        video_size=(4, 14, 14), in_channels=1, out_channels=1, patch_size=7, width=64, depth=2, num_heads=4,
        text_width=10, temporal_compression=1, spatial_compression=64,
    )  # fmt: skip
    model = build_model(config)
    before, after = validation_losses(
        model, list(model.parameters()), text_of_labels, to_input=moving_digits, steps=120, batch_size=16,
        learning_rate=1e-2,
    )  # fmt: skip
    assert before > 1.2
    assert after < 0.75


def test_half_precision_turns_queries_in_float32():
    model = randomised(TINY)
    x, t, cond = inputs(TINY)
    expected = model(x, t, cond)
    output = model.bfloat16()(x.bfloat16(), t, cond.map(Tensor.bfloat16))
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()
