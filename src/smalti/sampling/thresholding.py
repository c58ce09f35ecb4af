"""Bounds on the x0 estimate, for data that lives in [-1, 1] (pixels, not latents)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.prediction import per_sample
from smalti.errors import UserError
from smalti.sampling.wrapped import Estimate, Estimator, WrappedDenoiser
from smalti.types import Condition, Denoiser


@dataclass(frozen=True)
class ClippedDenoiser(WrappedDenoiser):
    """x0 estimates clamped to [-limit, limit]. Source: Ho et al. 2020's code."""

    denoiser: Denoiser
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UserError(f"limit={self.limit} must be above 0")

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The wrapped estimate, clamped."""
        x0, logits = inner(self.denoiser, x, t, cond)
        return x0.clamp(-self.limit, self.limit), logits


def dynamic_threshold(x0: Tensor, quantile: float, max_value: float) -> Tensor:
    """clamp(x0, -s, s) / s with s a quantile of |x0| of each sample, held in [1, max_value].

    x0: [batch, ...], in the range [-1, 1] when it is right. Source: Imagen (Saharia et al. 2022), section 2.3.
    """
    magnitude = x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32))  # no quantiles in half precision
    s = per_sample(torch.quantile(magnitude, quantile, dim=1).clamp(1.0, max_value), x0)
    return torch.clamp(x0, -s, s) / s


@dataclass(frozen=True)
class DynamicThreshold(WrappedDenoiser):
    """Dynamic thresholding: what exceeds 1 pulls the whole sample inwards instead of being cut off.

    max_value caps the threshold, as sample_max_value does in diffusers; without it this is Imagen's rule and that of
    DPM-Solver's code at its max_val = 1. At max_value = 1, diffusers' default, it is a plain clip to [-1, 1].
    Raises UserError for a quantile outside (0, 1] and a max_value below 1.
    """

    denoiser: Denoiser
    quantile: float = 0.995
    max_value: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise UserError(f"quantile={self.quantile} must lie in (0, 1]")
        if not self.max_value >= 1:
            raise UserError(f"max_value={self.max_value} must be at least 1")

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The wrapped estimate, thresholded."""
        x0, logits = inner(self.denoiser, x, t, cond)
        return dynamic_threshold(x0, self.quantile, self.max_value), logits
