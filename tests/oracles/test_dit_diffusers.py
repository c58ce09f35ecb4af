"""DiT against diffusers' DiTTransformer2DModel with the same random weights."""

import diffusers
import pytest
import torch

from smalti.models import DiTConfig, build_model
from smalti.types import Condition


def reference(sample_size, patch_size, heads, head_width, layers, channels, learn_sigma, classes):
    """diffusers' network with random weights, its per-block copies of the embedders made equal as in checkpoints."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=channels,
        out_channels=channels * (2 if learn_sigma else 1),
        num_layers=layers,
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=classes,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return model


def ours_with_weights_of(model, config):
    """The same weights in smalti's layout (the full two-way map is interop's; this one is for the test)."""
    theirs = model.state_dict()

    def both(ours, name):
        return {f"{ours}.weight": theirs[f"{name}.weight"], f"{ours}.bias": theirs[f"{name}.bias"]}

    weights = both("patch_embed", "pos_embed.proj")
    weights["patch_embed.weight"] = weights["patch_embed.weight"].flatten(1)
    embedder = "transformer_blocks.0.norm1.emb"
    weights |= both("time_embed.fc1", f"{embedder}.timestep_embedder.linear_1")
    weights |= both("time_embed.fc2", f"{embedder}.timestep_embedder.linear_2")
    weights["label_embed.weight"] = theirs[f"{embedder}.class_embedder.embedding_table.weight"]
    for kind in ("weight", "bias"):
        weights[f"modulation.{kind}"] = torch.cat(
            [theirs[f"transformer_blocks.{i}.norm1.linear.{kind}"] for i in range(config.depth)]
            + [theirs[f"proj_out_1.{kind}"]]
        )
        for i in range(config.depth):
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            )
    for i in range(config.depth):
        weights |= both(f"blocks.{i}.attn.out", f"transformer_blocks.{i}.attn1.to_out.0")
        weights |= both(f"blocks.{i}.mlp.fc1", f"transformer_blocks.{i}.ff.net.0.proj")
        weights |= both(f"blocks.{i}.mlp.fc2", f"transformer_blocks.{i}.ff.net.2")
    weights |= both("output", "proj_out_2")
    ours = build_model(config).eval()
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize(
    ("sample_size", "patch_size", "heads", "head_width", "layers", "channels", "learn_sigma"),
    [(8, 2, 2, 8, 2, 4, True), (28, 4, 4, 32, 4, 1, False), (12, 4, 3, 16, 1, 3, True)],
)
def test_outputs_and_input_gradients_are_equal(
    sample_size, patch_size, heads, head_width, layers, channels, learn_sigma
):
    theirs = reference(sample_size, patch_size, heads, head_width, layers, channels, learn_sigma, classes=10)
    config = DiTConfig(
        image_size=(sample_size, sample_size),
        in_channels=channels,
        patch_size=patch_size,
        width=heads * head_width,
        depth=layers,
        num_heads=heads,
        learn_sigma=learn_sigma,
        frequency_shift=1.0,  # diffusers' sinusoid
        mlp_norm_eps=1e-5,  # and its second LayerNorm
    )
    ours = ours_with_weights_of(theirs, config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, sample_size, sample_size, generator=generator, requires_grad=True)
    t, labels = torch.tensor([0, 417, 999]), torch.tensor([0, 3, 10])
    expected = theirs(x, timestep=t, class_labels=labels).sample
    output = ours(x, t.float(), Condition(class_labels=labels))
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    weight = torch.randn(output.shape, generator=generator)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    (gradient,) = torch.autograd.grad((output * weight).sum(), x)
    assert (gradient - expected_gradient).abs().max() <= 1e-5 * expected_gradient.abs().max()
