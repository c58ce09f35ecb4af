"""DiT against diffusers' DiTTransformer2DModel with the same random weights."""

import diffusers
import pytest
import torch
from oracles.parity import assert_parity, assert_round_trip, randomised

from smalti.types import Condition

CASES = [  # side, patch, heads, head width, layers, channels, learned sigma
    (8, 2, 2, 8, 2, 4, True), (28, 4, 4, 32, 4, 1, False), (12, 4, 3, 16, 1, 3, True),
]  # fmt: skip


def reference(sample_size, patch_size, heads, head_width, layers, channels, learn_sigma, classes=10):
    """diffusers' network with random weights, its per-block copies of the embedders made equal as in checkpoints."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=channels,
        out_channels=channels * (2 if learn_sigma else 1),
        num_layers=layers,
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=classes,
    )
    randomised(model)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_equal(case):
    theirs = reference(*case)
    x = torch.randn(3, case[5], case[0], case[0], generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 417, 999]), torch.tensor([0, 3, 10])
    assert_parity(
        theirs,
        lambda x, t: theirs(x, timestep=t.long(), class_labels=labels).sample,
        x,
        t.float(),
        Condition(class_labels=labels),
    )


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    assert_round_trip(reference(*case))
