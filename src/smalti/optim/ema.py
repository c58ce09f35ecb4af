"""Averages of the weights over training, from which samples are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smalti.types import UserError


@dataclass(frozen=True)
class PowerEma:
    """An average whose length is a fixed share of the training so far, so it fits a run of any length.

    relative_std is the profile's standard deviation over the length of training. Source: EDM2 (Karras et al. 2024),
    eq. 9 and appendix C.
    """

    kind: ClassVar[str] = "power"
    relative_std: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.relative_std < 0.28:
            raise UserError(f"ema.relative_std={self.relative_std} must lie in (0, 0.28)")

    def decay(self, step: int) -> float:
        """Share of the old average kept at the update after step (1, 2, ...)."""
        return float((1 - 1 / step) ** (self.gamma + 1))

    @property
    def gamma(self) -> float:
        """The exponent: the root above 0 of std^2 (g + 2)^2 (g + 3) = g + 1 (EDM2, algorithm 2)."""
        low, high = 0.0, 1e4
        for _ in range(100):
            middle = (low + high) / 2
            std = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5
            low, high = (middle, high) if std > self.relative_std else (low, middle)
        return low


@dataclass(frozen=True)
class ExponentialEma:
    """The usual exponential average, its decay ramped up over the first steps: min(decay, (1 + n) / (10 + n))."""

    kind: ClassVar[str] = "exponential"
    max_decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.max_decay < 1:
            raise UserError(f"ema.max_decay={self.max_decay} must lie in (0, 1)")

    def decay(self, step: int) -> float:
        """Share of the old average kept at the update after step (1, 2, ...)."""
        return min(self.max_decay, (1 + step) / (10 + step))


EmaConfig = PowerEma | ExponentialEma


@torch.no_grad()
def update_ema(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """averages <- decay averages + (1 - decay) weights, in place."""
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
