"""Video DiT: initialisation, counts, refusals, and what it does with time, text, positions and factorised attention."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moving_digits import moving_digits, text_of_labels
from tiny_training import validation_losses
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from smalti.errors import UserError
from smalti.models import (
    VideoDiT,
    VideoDiTConfig,
    build_model,
    count_parameters,
    forward_flops,
    forward_with_features,
    network_of,
    preset,
)
from smalti.models.video_dit import rotary_axes
from smalti.nn.embeddings import patchify_video, unpatchify_video
from smalti.nn.positions import grid_positions, rope_angles, rope_angles_grid
from smalti.types import Condition

TINY = VideoDiTConfig(
    video_size=(3, 8, 12), in_channels=2, out_channels=2, width=32, depth=2, num_heads=2, text_width=6, text_tokens=4,
    time_width=16,
)  # fmt: skip
ROPE = dataclasses.replace(TINY, positions="rope")
FACTORISED = dataclasses.replace(ROPE, attention="factorised")
PATCHED = dataclasses.replace(ROPE, patch_frames=2, video_size=(4, 8, 12), ofs_width=16)
LEARNED = dataclasses.replace(TINY, positions="rope+learned")
ALL = {"sincos": TINY, "rope": ROPE, "factorised": FACTORISED, "patched": PATCHED, "learned": LEARNED}


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


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(st.sampled_from([1, 2]), *[st.sampled_from([1, 2, 3])] * 2),
)
def test_patchify_video_is_a_patch_convolution_and_has_an_inverse(sizes, patch):
    frames, height, width = (n * p for n, p in zip(sizes, patch, strict=True))
    x, kernel = torch.randn(2, 3, frames, height, width), torch.randn(5, 3, *patch)
    tokens = patchify_video(x, patch)
    assert torch.equal(unpatchify_video(tokens, patch, frames, height, width), x)
    convolved = torch.nn.functional.conv3d(x, kernel, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens @ kernel.flatten(1).T, convolved, rtol=1e-4, atol=1e-4)


def test_angles_of_a_grid_are_those_of_its_points():
    axes = (torch.arange(2.0), torch.linspace(0, 5, 3), torch.arange(4.0))
    points = torch.cartesian_prod(*axes)
    assert torch.equal(torch.cartesian_prod(*[torch.arange(n) for n in (2, 3, 4)]).double(), grid_positions(2, 3, 4))
    torch.testing.assert_close(rope_angles_grid(axes, (4, 6, 6), 100.0), rope_angles(points, (4, 6, 6), 100.0))


def test_rotary_positions_at_the_trained_size_are_whole_numbers():
    for config in (ROPE, PATCHED):
        axes = rotary_axes(config, config.training_grid, torch.device("cpu"))
        for positions, size in zip(axes, config.training_grid, strict=True):
            assert torch.equal(positions, torch.arange(size, dtype=torch.float64))


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_the_identity_at_initialisation(name):
    config = ALL[name]
    model = build_model(config)
    x, t, cond = inputs(config)
    _, features = forward_with_features(model, ["patch_embed", "blocks.0", "blocks.1"], x, t, cond)
    assert torch.equal(features["blocks.0"], features["blocks.1"])
    if config.positions == "rope":
        assert torch.equal(features["patch_embed"], features["blocks.1"])
    text = torch.randn(3, 4, 32)
    rows = model.modulation(torch.nn.functional.silu(model.embed_time(t, cond))).view(3, -1, 32)
    video_out, text_out = model.blocks[1](features["blocks.0"], text, rows[:, 12:24], None, None, 3)
    assert torch.equal(text_out, text)
    assert torch.equal(video_out, features["blocks.0"])


def test_published_initialisation():
    config = dataclasses.replace(LEARNED, width=192, depth=2, num_heads=12)
    model = build_model(config)

    def std(name):
        return float(model.get_submodule(name).weight.detach().std())

    assert std("blocks.0.attn.qkv") == pytest.approx(0.02, rel=0.05)
    assert std("blocks.1.mlp.fc1") == pytest.approx(0.02, rel=0.05)
    assert std("blocks.0.attn.out") == pytest.approx(0.02 / 2, rel=0.05)
    assert std("blocks.1.mlp.fc2") == pytest.approx(0.02 / 2, rel=0.05)
    for name in ("text_embed", "time_embed.fc1"):  # PyTorch's default
        layer = model.get_submodule(name)
        assert float(layer.weight.detach().abs().max()) == pytest.approx(layer.in_features**-0.5, rel=0.01)
        assert layer.bias.any()
    for layer in (model.patch_embed, model.output):  # xavier's
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert not layer.bias.any()
    assert not any(parameter.any() for name, parameter in model.blocks.named_parameters() if ".attn.qkv.bias" in name)
    assert not model.positions_SD.any()
    assert model.modulation.bias[-2 * 192 :].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_each_sample_has_its_own_time_and_text(name, masked):
    model = randomised(ALL[name])
    x, t, cond = inputs(ALL[name])
    if masked:
        cond = dataclasses.replace(cond, text_mask=torch.arange(4) < torch.tensor([[4], [2], [1]]))
    together = model(x, t, cond)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sincos", "rope", "factorised"])
def test_masked_text_is_not_seen(name):
    model = randomised(ALL[name])
    x, t, cond = inputs(ALL[name])
    text = torch.cat([cond.text_embeds, 9 * torch.randn(3, 2, 6)], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    masked = model(x, t, Condition(text_embeds=text, text_mask=mask))
    torch.testing.assert_close(masked, model(x, t, cond), rtol=1e-4, atol=1e-4)
    assert (model(x, t, Condition(text_embeds=text)) - masked).abs().max() > 2e-3


@pytest.mark.parametrize(("layers", "reaches"), [(1, "its frame"), (2, "all")])
def test_factorised_attention_reaches_a_frame_in_one_block_and_the_video_in_two(layers, reaches):
    model = randomised(dataclasses.replace(FACTORISED, depth=layers)).double()
    x, t, cond = inputs(FACTORISED, batch=1)
    x, cond = x.double(), cond.map(Tensor.double)
    changed = x.clone()
    changed[:, :, 1, 4, 6] += 1.0
    difference = (model(changed, t, cond) - model(x, t, cond)).abs().amax(dim=(0, 1)).flatten(1)  # [frames, places]
    reached = [False, True, False] if reaches == "its frame" else [True] * 3
    assert (difference.amin(dim=1) > 0).tolist() == (difference.amax(dim=1) > 0).tolist() == reached


def test_factorised_attention_of_one_frame_is_full_attention_but_for_what_text_sees():
    full, parts = (randomised(dataclasses.replace(ROPE, depth=1, attention=a)) for a in ("full", "factorised"))
    parts.load_state_dict(full.state_dict())
    x, t, cond = inputs(dataclasses.replace(ROPE, video_size=(1, 8, 12)))
    torch.testing.assert_close(parts(x, t, cond), full(x, t, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sincos", "rope", "factorised", "patched"])
@pytest.mark.parametrize("size", [(2, 4, 10), (4, 12, 6)])
def test_any_size_works(name, size):
    model = randomised(ALL[name])
    x, t, cond = inputs(dataclasses.replace(ALL[name], video_size=size))
    assert model(x, t, cond).shape == x.shape


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [None, (2, 8, 12)])
def test_flops_equal_the_counter(name, size, depth):
    config = dataclasses.replace(ALL[name], out_channels=3, depth=depth)
    model = build_model(config)
    x, t, cond = inputs(config if size is None else dataclasses.replace(config, video_size=size), batch=1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, cond)
    assert counter.get_total_flops() == forward_flops(config, size, text_tokens=4)


# As diffusers' class counts them (tests/oracles would take minutes on such a network: computed once).
@pytest.mark.parametrize(("name", "millions"), [("CogVideoX-2B", 1693.8), ("CogVideoX-5B", 5570.3)])
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        parameters = sum(count_parameters(VideoDiT(preset(name))).values())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"width": 0}, "model.width=0"),
        ({"num_heads": 4, "positions": "rope"}, "must divide by 16"),
        ({"width": 40}, "must divide by 16 for positions='sincos'"),
        ({"video_size": (3, 9, 12)}, "must divide by the patch"),
        ({"video_size": (0, 8, 12)}, "must have a frame"),
        ({"patch_frames": 0}, "patch_frames=0"),
        ({"ofs_width": 8}, "ofs_width=8"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_inputs_that_do_not_fit_are_refused():
    x, t, cond = inputs(TINY)
    for wrong in (None, Condition()):
        with pytest.raises(UserError, match="text_embeds is missing"):
            network_of(TINY)(x, t, wrong)
    with pytest.raises(UserError, match="must divide by the patch"):
        network_of(TINY)(x[..., :11], t, cond)
    with pytest.raises(UserError, match="must divide by the patch"):
        network_of(PATCHED)(x, t, cond)
    learned = network_of(LEARNED)
    with pytest.raises(UserError, match="with up to 3 frames"):
        learned(torch.cat([x, x], dim=2), t, cond)
    assert learned(x[:, :, :2], t, cond).shape == (3, 2, 2, 8, 12)
    for wrong_x, wrong_cond in ((x[..., :10], cond), (x, cond.map(lambda v: v[:, :3]))):
        with pytest.raises(UserError, match="take 4 text tokens"):
            learned(wrong_x, t, wrong_cond)


def test_a_shorter_video_takes_the_first_positions():
    model = randomised(LEARNED)
    x, t, cond = inputs(LEARNED)
    expected = model(x[:, :, :2], t, cond)
    with torch.no_grad():
        model.positions_SD[4 + 2 * 4 * 6 :] += 1  # the third frame's
    assert torch.equal(model(x[:, :, :2], t, cond), expected)
    with torch.no_grad():
        model.positions_SD[4] += 1
    assert not torch.equal(model(x[:, :, :2], t, cond), expected)


def test_a_training_video_is_filled_up_to_whole_patches():
    assert dataclasses.replace(PATCHED, video_size=(5, 8, 12)).training_grid == (3, 4, 6)


def test_the_text_encoder_alone_knows_the_null_condition():
    assert network_of(TINY).null_condition(2) is None


@pytest.mark.parametrize("attention", ["full", "factorised"])
def test_training_lowers_the_validation_loss(attention):
    config = VideoDiTConfig(
        video_size=(4, 14, 14), in_channels=1, out_channels=1, patch_size=7, width=64, depth=2, num_heads=4,
        text_width=10, text_tokens=1, time_width=64, positions="rope", attention=attention,
    )  # fmt: skip
    model = build_model(config)
    before, after = validation_losses(
        model, list(model.parameters()), text_of_labels, to_input=moving_digits, steps=120, batch_size=16,
        learning_rate=1e-2,
    )  # fmt: skip
    assert before > 1.2
    assert after < 0.75


@pytest.mark.parametrize("name", ALL)
def test_half_precision_turns_queries_in_float32(name):
    model = randomised(ALL[name])
    x, t, cond = inputs(ALL[name])
    expected = model(x, t, cond)
    output = model.bfloat16()(x.bfloat16(), t, cond.map(Tensor.bfloat16))
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()


COMPILED = """
import torch
from test_ltx import TINY as LTX
from test_video_dit import ALL, inputs, randomised

for config in (*ALL.values(), LTX):
    model = randomised(config)
    x, t, cond = inputs(config)
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="eager")(x, t, cond)
        torch.testing.assert_close(output, model(x, t, cond))
"""


@pytest.mark.slow
def test_video_networks_are_traced_without_graph_breaks():
    """In a process of its own, without the run-time check of shapes that no compiler can trace."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parent)
