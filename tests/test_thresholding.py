"""Clipping and dynamic thresholding of the x0 estimate."""

import math

import pytest
import torch

from smalti.errors import UserError
from smalti.sampling import ClippedDenoiser, DynamicThreshold

T = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)


def same(x, t, cond=None):
    return x


def test_clipping_acts_on_the_estimate():
    clipped = ClippedDenoiser(lambda x, t, cond=None: 3 * x)
    assert torch.equal(clipped(torch.tensor([[-1.0, 0.2]]), torch.tensor([0.5])), torch.tensor([[-1.0, 3 * 0.2]]))
    assert float(ClippedDenoiser(same, 2.0)(torch.tensor([[5.0]]), torch.tensor([0.5]))) == 2.0


def test_without_a_cap_it_is_imagens_rule():
    x = torch.stack([torch.linspace(-1, 1, 101), torch.linspace(-4, 4, 101), torch.linspace(0, 2, 101)]).double()
    thresholded = DynamicThreshold(same, quantile=0.9)(x, T)
    for row, expected in zip(x, thresholded, strict=True):
        s = max(1.0, float(torch.quantile(row.abs(), 0.9)))  # DPM-Solver: max(quantile, max_val) at max_val = 1
        torch.testing.assert_close(expected, row.clamp(-s, s) / s, rtol=1e-12, atol=1e-12)
    assert torch.equal(thresholded[0], x[0])  # what is in range stays


def test_half_precision_stays_half():
    x = 3 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    thresholded = DynamicThreshold(same)(x, T)
    assert thresholded.dtype == torch.bfloat16
    assert thresholded.abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ClippedDenoiser(same, 0.0), "limit=0.0"),
        (lambda: DynamicThreshold(same, quantile=0.0), "quantile=0.0"),
        (lambda: DynamicThreshold(same, quantile=1.5), "quantile=1.5"),
        (lambda: DynamicThreshold(same, max_value=0.5), "max_value=0.5"),
        (lambda: DynamicThreshold(same, max_value=math.nan), "max_value=nan"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
