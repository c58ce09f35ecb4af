"""Guidance and thresholding against diffusers' own functions."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from guidance_examples import PROCESS, SPACES, LabelledDenoiser, dit_inputs, example, random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smalti.diffusion import convert_prediction
from smalti.sampling import AdaptiveProjectedGuidance, DynamicThreshold, RescaledGuidance


@pytest.mark.parametrize("space", ["x0", *SPACES])
def test_rescaled_guidance_is_that_of_diffusers(space):
    """diffusers acts on whatever the network predicts, so its function is applied there and taken to x0."""
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    conditional, unconditional = (
        convert_prediction("x0", space, PROCESS, t, x, denoiser(x, t, c)) for c in (cond, null)
    )
    for phi in (0.0, 0.7, 1.0):
        guided = rescale_noise_cfg(unconditional + 6 * (conditional - unconditional), conditional, phi)
        expected = convert_prediction(space, "x0", PROCESS, t, x, guided)
        process = None if space == "x0" else PROCESS
        rescaled = RescaledGuidance(denoiser, null, 6.0, phi, space, process)(x, t, cond)
        torch.testing.assert_close(rescaled, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(-1, 12), eta=st.floats(0, 1), threshold=st.one_of(st.none(), st.floats(0.1, 20)),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_projected_guidance_is_that_of_diffusers_in_the_papers_form(scale, eta, threshold, seed):
    """The paper adds (w - 1) times the update to the conditional estimate: diffusers' original formulation at w - 1."""
    x, t, cond, null = example(seed=seed)
    denoiser = LabelledDenoiser(seed)
    expected = normalized_guidance(
        denoiser(x, t, cond),
        denoiser(x, t, null),
        scale - 1,
        eta=eta,
        norm_threshold=threshold or 0.0,
        use_original_formulation=True,
    )
    projected = AdaptiveProjectedGuidance(denoiser, null, scale, eta, threshold)(x, t, cond)
    torch.testing.assert_close(projected, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 1, 2)])
def test_identity_attention_is_that_of_diffusers(layers):
    """diffusers replaces scaled_dot_product_attention by its values; smalti calls that from 257 tokens on."""
    model = random_dit(image_size=(36, 36), positions="sincos+rope").double()
    x, t, cond = dit_inputs(model)
    x, t = x.double(), t.double()

    class Skipping(nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn = attn

        def forward(self, *args):
            with AttentionScoreSkipFunctionMode():
                return self.attn(*args)

    view = model.with_identity_attention(layers)(x, t, cond)
    untouched = model(x, t, cond)
    for layer in layers:
        model.blocks[layer].attn = Skipping(model.blocks[layer].attn)
    torch.testing.assert_close(view, model(x, t, cond), rtol=1e-6, atol=1e-6)
    assert (view - untouched).abs().max() > 1e-2


@settings(max_examples=40, deadline=None)
@given(
    spread=st.floats(0.1, 10), quantile=st.sampled_from([0.5, 0.9, 0.995, 1.0]),
    max_value=st.sampled_from([1.0, 1.5, 3.0, 100.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_dynamic_threshold_is_that_of_diffusers(spread, quantile, max_value, seed):
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=max_value)
    x = spread * torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(seed))
    ours = DynamicThreshold(lambda x, t, cond=None: x, quantile, max_value)(x, torch.full((3,), 0.5).double())
    torch.testing.assert_close(ours, scheduler._threshold_sample(x), rtol=1e-6, atol=1e-7)
