"""Averages of the weights over training, from which samples are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from smalti.errors import UserError

# Each kind has `averages`: what the run keeps, the first of which validates and draws samples.


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

    @property
    def averages(self) -> tuple[Self]:
        """This one."""
        return (self,)

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

    @property
    def averages(self) -> tuple[Self]:
        """This one."""
        return (self,)

    def decay(self, step: int) -> float:
        """Share of the old average kept at the update after step (1, 2, ...)."""
        return min(self.max_decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class PostHocEma:
    """Two PowerEmas and snapshots of both, from which `smalti ema` makes the average of any width afterwards.

    The first width's average validates and draws samples. Snapshots are taken `snapshots` times, evenly over the run's
    budget, or each snapshot_every steps. Source: EDM2 (Karras et al. 2024), section 3.2.
    """

    kind: ClassVar[str] = "post_hoc"
    relative_std: float = 0.05
    second_relative_std: float = 0.10
    snapshots: int = field(default=16, metadata={"only_if": ("snapshot_every", (None,))})
    snapshot_every: int | None = None  # steps

    def __post_init__(self) -> None:
        for name in ("relative_std", "second_relative_std"):
            if not 0 < getattr(self, name) < 0.28:
                raise UserError(f"ema.{name}={getattr(self, name)} must lie in (0, 0.28)")
        if self.relative_std == self.second_relative_std:
            raise UserError(f"ema.second_relative_std={self.second_relative_std} must differ from ema.relative_std")
        for name in ("snapshots", "snapshot_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"ema.{name}={getattr(self, name)} must be at least 1")

    @property
    def averages(self) -> tuple[PowerEma, PowerEma]:
        """Both."""
        return PowerEma(self.relative_std), PowerEma(self.second_relative_std)

    def snapshot_due(self, step: int, before: float, progress: float) -> bool:
        """Whether step ends with a snapshot; before, progress: shares of the budget spent before and after it."""
        if self.snapshot_every is not None:
            return step % self.snapshot_every == 0
        # Rounding must not make 1/22 of a run of 22 steps, times 22, less than 1.
        return int(before * self.snapshots + 1e-9) < int(progress * self.snapshots + 1e-9)


@dataclass(frozen=True)
class OptimizerAverage:
    """The average that the optimiser itself keeps: optimizer=schedule_free."""

    kind: ClassVar[str] = "by_optimizer"

    @property
    def averages(self) -> tuple[()]:
        """None beside the optimiser's."""
        return ()


EmaConfig = PowerEma | ExponentialEma | PostHocEma | OptimizerAverage


@torch.no_grad()
def update_ema(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """averages <- decay averages + (1 - decay) weights, in place."""
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
