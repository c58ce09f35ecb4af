"""Guidance wraps a denoiser and gives a denoiser. It never touches a network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.types import Condition, Denoiser, concat_conditions


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """x0 = x0_null + guidance_scale (x0_cond - x0_null), on all channels, both halves in one forward.

    On x0 estimates it equals guidance on eps or v, since all are affine in each other at a given x. Source: Ho and
    Salimans 2022, eq. 6, with scale = 1 + w. null is the unconditional (or negative) condition, a row a sample.
    """

    denoiser: Denoiser
    null: Condition
    guidance_scale: float | Tensor

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...], t [batch] -> guided x0 estimate."""
        assert cond is not None, "guidance needs a condition"
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), concat_conditions(cond, self.null))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


@dataclass(frozen=True)
class ClippedDenoiser:
    """x0 estimates clamped to [-limit, limit], for data that lives there (pixels). Source: Ho et al. 2020's code."""

    denoiser: Denoiser
    limit: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...], t [batch] -> clipped x0 estimate."""
        return self.denoiser(x, t, cond).clamp(-self.limit, self.limit)
