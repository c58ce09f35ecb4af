"""Whole estimates (network, prediction, guidance) under torch.compile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.sampling.wrapped import Estimate, Estimator, WrappedDenoiser
from smalti.types import Condition, Denoiser

CompiledEstimate = Callable[[Denoiser, Tensor, Tensor, Condition | None], Tensor]


def _x0(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
    return denoiser(x, t, cond)


def compiled_estimate() -> CompiledEstimate:
    """(denoiser, x, t, cond) -> x0, compiled; it holds a graph for each shape and kind of denoiser that it has met."""
    return torch.compile(_x0, dynamic=False)


@dataclass(frozen=True)
class CompiledDenoiser(WrappedDenoiser):
    """A denoiser whose estimates run compiled; estimates with variance logits run as they are."""

    denoiser: Denoiser
    compiled: CompiledEstimate

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...], t [batch] -> x0 estimate."""
        return self.compiled(self.denoiser, x, t, cond)

    def estimate(self, inner: Estimator, x: Tensor, t: Tensor, cond: Condition | None) -> Estimate:
        """The wrapped estimate."""
        return inner(self.denoiser, x, t, cond)
