"""Checkpoint surgery: what a changed network computes, and what it kept."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.errors import UserError
from smalti.interop.load import Weights
from smalti.interop.surgery import adapt, block_sources
from smalti.models import DiTConfig, build_model, network_of
from smalti.models.mmdit import MMDiTConfig
from smalti.models.uvit import UViTConfig
from smalti.types import Condition

DIT = DiTConfig(
    image_size=(8, 8), in_channels=4, patch_size=2, width=64, depth=2, num_heads=1, num_classes=10, learn_sigma=True
)
LEARNED = dataclasses.replace(DIT, positions="learned")
UVIT = UViTConfig(image_size=(8, 8), in_channels=4, patch_size=2, width=64, num_heads=2, depth=4, num_classes=10)
MMDIT = MMDiTConfig(
    image_size=(8, 8), in_channels=4, patch_size=2, width=64, depth=3, num_heads=2, text_width=24, pooled_width=16,
    position_grid=12, qk_norm=True, dual_attention_blocks=(0,),
)  # fmt: skip


def weights_of(config):
    model = build_model(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return Weights(config, dict(model.state_dict()), "smalti")


def condition(config, labels=(0, 9)):
    if config.kind != "mmdit":
        return Condition(class_labels=torch.tensor(labels))
    generator = torch.Generator().manual_seed(1)
    text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((5, config.text_width), (16,)))
    return Condition(text_embeds=text, pooled_embeds=pooled)


def run(weights, x, cond=None):
    model = network_of(weights.config).eval()
    model.load_state_dict(weights.tensors)
    with torch.no_grad():
        return model(x, torch.full((len(x),), 300.0), cond or condition(weights.config))


def latents(*size):
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(2))


DEEPER = [
    *((DIT, depth, depth - 2) for depth in (3, 4, 7)),
    *((UVIT, depth, depth - 4) for depth in (6, 8, 10)),
    (dataclasses.replace(UVIT, long_skips=False), 6, 2),
    *((MMDIT, depth, depth - 3) for depth in (4, 6)),
]


@pytest.mark.parametrize(("config", "depth", "repeated"), DEEPER, ids=lambda value: getattr(value, "kind", str(value)))
def test_a_deeper_network_computes_the_same(config, depth, repeated):
    weights = weights_of(config)
    deeper, report = adapt(weights, depth=depth)
    x = latents(8, 8)
    torch.testing.assert_close(run(deeper, x), run(weights, x), rtol=1e-5, atol=1e-5)
    blocks = {tuple(line.name.split(".")[:2]) for line in report if "switched off" in line.how}
    assert len(blocks) == repeated


@pytest.mark.parametrize(("config", "depth"), [(DIT, 1), (UVIT, 2), (MMDIT, 2), (MMDIT, 1)])
def test_a_shallower_network_keeps_whole_blocks(config, depth):
    weights = weights_of(config)
    shallower, report = adapt(weights, depth=depth)
    assert shallower.config.depth == depth
    assert torch.isfinite(run(shallower, latents(8, 8))).all()
    assert not any("switched off" in line.how for line in report)
    if config is MMDIT:  # the last block, which gives the text nothing, stays the last
        last = {name: tensor for name, tensor in weights.tensors.items() if name.startswith("blocks.2.")}
        for name, tensor in last.items():
            assert torch.equal(shallower.tensors[name.replace("blocks.2.", f"blocks.{depth - 1}.")], tensor)
        assert shallower.config.dual_attention_blocks == ((0,) if depth == 2 else ())


def test_an_mmdit_of_one_block_cannot_be_deepened():
    config = dataclasses.replace(MMDIT, depth=1)
    with pytest.raises(UserError, match="depth=2: a network of one block"):
        adapt(weights_of(config), depth=2)


@pytest.mark.parametrize("config", [DIT, UVIT], ids=lambda config: config.kind)
@pytest.mark.parametrize("classes", [1000, 5])
def test_more_and_fewer_classes_keep_theirs_and_the_null_label(config, classes):
    weights = weights_of(config)
    x = latents(8, 8)
    changed, report = adapt(weights, num_classes=classes)
    expected = run(weights, x, condition(config, (4, 10)))
    torch.testing.assert_close(run(changed, x, condition(config, (4, classes))), expected)
    (line,) = [line for line in report if line.name == "label_embed.weight"]
    assert line.kept == pytest.approx((min(10, classes) + 1) / (classes + 1))
    table, fresh = changed.tensors["label_embed.weight"], build_model(changed.config, 0).state_dict()
    assert torch.equal(table[10:-1], fresh["label_embed.weight"][10:-1])


def test_a_label_table_without_a_null_label_is_all_classes():
    config = dataclasses.replace(UVIT, null_label=False)
    weights = weights_of(config)
    changed, report = adapt(weights, num_classes=12)
    assert torch.equal(changed.tensors["label_embed.weight"][:10], weights.tensors["label_embed.weight"])
    assert changed.tensors["label_embed.weight"].shape[0] == 12
    (line,) = [line for line in report if line.name == "label_embed.weight"]
    assert line.kept == pytest.approx(10 / 12)


def patches_resized(pictures, old, new):
    """Each patch resized by itself."""
    batch, channels, height, width = pictures.shape
    rows, columns = height // old, width // old
    tiles = pictures.unfold(2, old, old).unfold(3, old, old).reshape(-1, 1, old, old)
    resized = torch.nn.functional.interpolate(tiles, (new, new), mode="bilinear", align_corners=False)
    resized = resized.view(batch, channels, rows, columns, new, new).permute(0, 1, 2, 4, 3, 5)
    return resized.reshape(batch, channels, rows * new, columns * new)


@pytest.mark.parametrize(
    "config", [LEARNED, dataclasses.replace(UVIT, final_conv=False), MMDIT], ids=lambda config: config.kind
)
def test_resized_patches_see_resized_pictures_as_before(config):
    weights = weights_of(config)
    finer, _ = adapt(weights, patch_size=4, image_size=(16, 16))
    x = latents(8, 8)
    # The old output's patches, resized, are the new output.
    expected = patches_resized(run(weights, x), 2, 4)
    torch.testing.assert_close(run(finer, patches_resized(x, 2, 4)), expected, rtol=1e-3, atol=1e-4)


def test_smaller_patches_are_the_old_ones_with_antialiasing():
    config = dataclasses.replace(LEARNED, patch_size=4, learn_sigma=False)
    weights = weights_of(config)
    coarser, _ = adapt(weights, patch_size=2, image_size=(4, 4))
    for name in ("output.weight", "output.bias"):
        patches = weights.tensors[name].view(4, 4, 4, -1).permute(3, 2, 0, 1)
        resized = torch.nn.functional.interpolate(patches, (2, 2), mode="bilinear", antialias=True)
        expected = resized.permute(2, 3, 1, 0).reshape(coarser.tensors[name].shape)
        torch.testing.assert_close(coarser.tensors[name], expected, rtol=1e-4, atol=1e-6)


def test_the_old_networks_tensors_and_dtype_are_left_alone():
    for config, changes in (
        (LEARNED, {"patch_size": 4, "image_size": (16, 16), "depth": 3, "num_classes": 12}),
        (LEARNED, {"image_size": (8, 16)}),
        (MMDIT, {"text_width": 32}),
    ):
        weights = weights_of(config)
        weights = dataclasses.replace(
            weights, tensors={name: tensor.bfloat16() for name, tensor in weights.tensors.items()}
        )
        before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
        changed, _ = adapt(weights, **changes)
        assert {tensor.dtype for tensor in changed.tensors.values()} == {torch.bfloat16}
        for tensor in changed.tensors.values():
            tensor.zero_()
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(("config", "extra"), [(LEARNED, 0), (UVIT, 2)], ids=["dit", "uvit"])
def test_learned_positions_are_interpolated(config, extra):
    weights = weights_of(config)
    grid = torch.arange(4.0).repeat(4)[:, None].expand(16, 64)  # the column
    weights.tensors["positions_ND"] = torch.cat([torch.full((extra, 64), 7.0), grid])
    wider, _ = adapt(weights, image_size=(8, 16))
    table = wider.tensors["positions_ND"]
    assert torch.equal(table[:extra], weights.tensors["positions_ND"][:extra])
    columns = table[extra:].view(4, 8, 64)[2, :, 0]
    # At columns 1.25 and 1.75 of the old, whose cubic kernel (a = -0.75) weighs columns 0 .. 3.
    torch.testing.assert_close(columns[3:5], torch.tensor([1.296875, 1.703125]))
    assert (columns.diff() > 0).all()
    assert columns.mean() == pytest.approx(1.5, abs=1e-5)
    assert torch.isfinite(run(wider, latents(8, 16))).all()


@pytest.mark.parametrize(("changes", "side"), [({"image_size": (16, 16)}, 24), ({"patch_size": 4}, 6)])
def test_the_middle_of_an_mmdits_table_says_what_it_said(changes, side):
    """The native crop covers the same positions at every resolution."""
    weights = weights_of(MMDIT)
    grid = torch.arange(12.0).repeat(12)[:, None].expand(144, 64)
    weights.tensors["positions_ND"] = grid.contiguous()
    changed, _ = adapt(weights, **changes)
    assert changed.config.position_grid == side
    network = network_of(changed.config)
    network.load_state_dict(changed.tensors)
    rows, columns = network.config.grid_of(*network.config.image_size)
    crop = network.positions_of(rows, columns).view(rows, columns, 64)[0, :, 0]
    assert crop.mean() == pytest.approx(5.5, abs=1e-4)  # tokens 4 .. 7 of 12, as before
    assert crop.diff().mean() == pytest.approx(4 / columns, rel=0.05)
    assert torch.isfinite(run(changed, latents(*network.config.image_size))).all()


def test_an_mmdits_table_is_square():
    with pytest.raises(UserError, match=r"image_size=\(8, 16\) must scale both sides.* up to 24 a side"):
        adapt(weights_of(MMDIT), image_size=(8, 16))


def test_another_text_width_starts_with_a_fresh_projection():
    weights = weights_of(MMDIT)
    wider, report = adapt(weights, text_width=32, seed=3)
    changed = {line.name for line in report if line.how == "fresh"}
    assert changed == {"text_embed.weight", "text_embed.bias"}
    assert {line.kept for line in report if line.name in changed} == {0.0}
    expected = build_model(wider.config, 3).state_dict()
    for name, tensor in wider.tensors.items():
        assert torch.equal(tensor, expected[name] if name in changed else weights.tensors[name])
    pooled, report = adapt(weights, pooled_width=8)
    assert {line.name for line in report if line.how == "fresh"} == {"pooled_embed.fc1.weight", "pooled_embed.fc1.bias"}
    assert pooled.tensors["pooled_embed.fc1.weight"].shape == (64, 8)


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (DIT, {"width": 32}, "width cannot be changed: of a dit only num_classes"),
        (DIT, {"num_classes": 0}, "stays one"),
        (dataclasses.replace(DIT, num_classes=0), {"num_classes": 5}, "stays one"),
        (UVIT, {"depth": 5}, "must be even"),
        (UVIT, {"text_width": 5}, "text_width cannot be changed"),
        (MMDIT, {"num_classes": 5}, "num_classes cannot be changed: of a mmdit only image_size"),
        (MMDIT, {"patch_size": 0}, "patch_size=0 must be above 0"),
        (MMDIT, {"image_size": (9, 9)}, "image_size"),
        (MMDIT, {"depth": 0}, "depth=0"),
    ],
)
def test_what_cannot_be_changed(config, changes, says):
    with pytest.raises(UserError, match=says):
        adapt(weights_of(config), **changes)


@settings(max_examples=50, deadline=None)
@given(old=st.integers(1, 12), new=st.integers(1, 30))
def test_every_new_block_has_a_source(old, new):
    sources = block_sources(old, new)
    assert len(sources) == new
    order = [source for source, _ in sources]
    assert order == sorted(order)
    assert order[0] == 0
    if new >= old:
        assert sorted({source for source, repeated in sources if not repeated}) == list(range(old))
        assert sum(repeated for _, repeated in sources) == new - old
    elif new > 1:
        assert order[-1] == old - 1
