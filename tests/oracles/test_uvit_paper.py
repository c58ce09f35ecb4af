"""U-ViT against a functional reference on the original repository's tensors, written from the paper's section 3.

No library has a class for it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles.parity import assert_same_function, randomised
from safetensors.torch import save_file

import smalti
from smalti.errors import UserError
from smalti.interop.uvit import UVIT
from smalti.models import UViTConfig, build_model
from smalti.types import Condition

CASES = {
    "classes": UViTConfig(image_size=(8, 12), in_channels=3, patch_size=2, width=32, depth=4, num_heads=4),
    "unconditional": UViTConfig(image_size=(12, 8), in_channels=2, patch_size=4, width=64, depth=2, num_heads=1,
                                num_classes=0, mlp_ratio=2.0),
    "time MLP, qkv bias, no convolution": UViTConfig(image_size=(6, 6), in_channels=4, patch_size=1, width=24,
                                                     depth=6, num_heads=2, time_mlp=True, qkv_bias=True,
                                                     final_conv=False),
    "no null label": UViTConfig(image_size=(4, 10), in_channels=1, patch_size=2, width=32, depth=2, num_heads=2,
                                null_label=False),
    "no long skips": UViTConfig(image_size=(8, 8), in_channels=2, patch_size=2, width=32, depth=4, num_heads=2,
                                long_skips=False),
}  # fmt: skip
(ORIGINAL,) = UVIT.originals


def block(tensors, name, x, heads, skip=None):
    def linear(layer, z):
        return F.linear(z, tensors[f"{name}.{layer}.weight"], tensors.get(f"{name}.{layer}.bias"))

    def norm(layer, z):
        return F.layer_norm(z, z.shape[-1:], tensors[f"{name}.{layer}.weight"], tensors[f"{name}.{layer}.bias"], 1e-5)

    if skip is not None and f"{name}.skip_linear.weight" in tensors:
        x = linear("skip_linear", torch.cat([x, skip], dim=2))
    qkv = linear("attn.qkv", norm("norm1", x))
    q, k, v = qkv.chunk(3, dim=2)
    width = q.shape[2] // heads
    attended = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)).softmax(dim=2)
        attended.append(weights @ v[..., part])
    x = x + linear("attn.proj", torch.cat(attended, dim=2))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def reference(tensors, config, x, t, labels):
    """The network of figure 1, a ViT on [class, time, patches] tokens with long skip connections."""
    patch, heads = config.patch_size, config.num_heads
    patches = F.conv2d(x, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=patch)
    batch, width, rows, columns = patches.shape
    angles = t[:, None] * torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / (width // 2)))
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    if "time_embed.0.weight" in tensors:
        time = F.silu(F.linear(time, tensors["time_embed.0.weight"], tensors["time_embed.0.bias"]))
        time = F.linear(time, tensors["time_embed.2.weight"], tensors["time_embed.2.bias"])
    tokens = [time[:, None], patches.flatten(2).transpose(1, 2)]
    if labels is not None:
        tokens.insert(0, tensors["label_emb.weight"][labels][:, None])
    h = torch.cat(tokens, dim=1) + tensors["pos_embed"]
    skips = []
    for i in range(config.depth // 2):
        h = block(tensors, f"in_blocks.{i}", h, heads)
        skips.append(h)
    h = block(tensors, "mid_block", h, heads)
    for i in range(config.depth // 2):
        h = block(tensors, f"out_blocks.{i}", h, heads, skips[-1 - i])
    h = F.layer_norm(h, (width,), tensors["norm.weight"], tensors["norm.bias"], 1e-5)
    h = F.linear(h, tensors["decoder_pred.weight"], tensors["decoder_pred.bias"])[:, len(tokens) - 1 :]
    # A token's values are (row, column, channel) of its patch.
    pictures = torch.empty(batch, config.in_channels, rows * patch, columns * patch)
    for row in range(rows):
        for column in range(columns):
            square = h[:, row * columns + column].view(batch, patch, patch, config.in_channels)
            at = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
            pictures[:, :, at[0], at[1]] = square.permute(0, 3, 1, 2)
    if "final_layer.weight" in tensors:
        pictures = F.conv2d(pictures, tensors["final_layer.weight"], tensors["final_layer.bias"], padding=1)
    return pictures


def documented_names(config):
    """The original repository's tensors, as its libs/uvit.py declares them."""
    layers = ["patch_embed.proj", "norm", "decoder_pred"]
    layers += ["final_layer"] if config.final_conv else []
    layers += ["time_embed.0", "time_embed.2"] if config.time_mlp else []
    names = {"pos_embed", *(["label_emb.weight"] if config.num_classes else [])}
    half = range(config.depth // 2)
    blocks = [f"in_blocks.{i}" for i in half] + ["mid_block"] + [f"out_blocks.{i}" for i in half]
    for name in blocks:
        layers += [f"{name}.{part}" for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
        layers += [f"{name}.skip_linear"] if name.startswith("out") and config.long_skips else []
        names |= {f"{name}.attn.qkv.weight"} | ({f"{name}.attn.qkv.bias"} if config.qkv_bias else set())
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_input_gradients_are_equal(name):
    config = CASES[name]
    ours = randomised(build_model(config))
    tensors = ORIGINAL.layout(config).to_theirs(ours.state_dict())
    x = torch.randn(3, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 417.5, 999.0])
    labels = torch.tensor([0, 3, 10 if config.null_label else 9]) if config.num_classes else None
    assert_same_function(
        lambda x: ours(x, t, Condition(class_labels=labels)),
        lambda x: reference(tensors, config, x, t, labels),
        x,
    )


@pytest.mark.parametrize("name", CASES)
def test_original_layout(name):
    config = CASES[name]
    ours = randomised(build_model(config)).state_dict()
    layout = ORIGINAL.layout(config)
    stored = layout.to_theirs(ours)
    assert set(stored) == documented_names(config)
    again = layout.to_ours(stored)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize(
    "config",
    [
        UViTConfig(image_size=(8, 8), in_channels=3, patch_size=2, width=64, depth=4, num_heads=1),
        UViTConfig(image_size=(8, 8), patch_size=4, width=64, depth=2, num_heads=1, num_classes=1000,
                   null_label=False, time_mlp=True),
        UViTConfig(image_size=(8, 8), in_channels=4, patch_size=1, width=512, depth=2, num_heads=8, num_classes=0,
                   mlp_ratio=0.5, qkv_bias=True, final_conv=False),
        UViTConfig(image_size=(8, 8), in_channels=3, patch_size=2, width=64, depth=6, num_heads=1, long_skips=False),
    ],
)  # fmt: skip
def test_an_original_file_is_recognised(tmp_path, config):
    ours = build_model(config).eval()
    save_file(ORIGINAL.layout(config).to_theirs(ours.state_dict()), tmp_path / "uvit.safetensors")
    loaded = smalti.load_backbone(tmp_path / "uvit.safetensors")
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in ours.state_dict().items())


def test_diffusers_has_no_class_for_it():
    with pytest.raises(UserError, match="diffusers has no class for U-ViT"):
        UVIT.write_config(CASES["classes"])
