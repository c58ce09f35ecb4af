"""Training densities of t: uniform random numbers in, timesteps out, so that randomness stays addressed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smalti.types import UserError


@dataclass(frozen=True)
class UniformTimesteps:
    """Every t alike."""

    kind: ClassVar[str] = "uniform"

    def __call__(self, u: Tensor) -> Tensor:
        """u in (0, 1) to t in (0, 1)."""
        return u


@dataclass(frozen=True)
class LogitNormalTimesteps:
    """t = sigmoid(mean + std z): the middle of the path more often. Source: SD3 (Esser et al. 2024), eq. 19."""

    kind: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"timesteps.std={self.std} must be above 0")

    def __call__(self, u: Tensor) -> Tensor:
        """u in (0, 1) to t in (0, 1), by the normal's inverse distribution function."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


TimestepDensity = UniformTimesteps | LogitNormalTimesteps


def stratify(u: Tensor, slots: Tensor, batch_size: int) -> Tensor:
    """Spread a batch evenly over (0, 1): slot j of batch_size takes (j + u_j) / batch_size.

    Lowers the variance of a batch's loss; each t keeps its uniform marginal when slots are filled in random order.
    """
    return (slots + u) / batch_size
