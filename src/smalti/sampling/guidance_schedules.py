"""Guidance scales: a number, one a sample, or a schedule, which is any callable t [batch] -> scale [batch]."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.prediction import per_sample
from smalti.diffusion.processes import Process
from smalti.errors import UserError

GuidanceSchedule = Callable[[Tensor], Tensor]
GuidanceScale = float | Tensor | GuidanceSchedule


def is_off(scale: GuidanceScale, off: float) -> bool:
    """Whether a scale is the plain number at which guidance does nothing. Tensors are never looked into."""
    return isinstance(scale, int | float) and scale == off


def name_scale(scale: GuidanceScale) -> str:
    """A scale as an error message says it, in one line."""
    return f"tensor of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else str(scale)


def check_scale(field: str, scale: GuidanceScale) -> None:
    """Raises UserError for a number that is not finite and for a tensor that is not [batch]."""
    if isinstance(scale, int | float) and not math.isfinite(scale):
        raise UserError(f"{field}={scale} must be finite")
    if isinstance(scale, Tensor) and scale.ndim != 1:
        raise UserError(f"{field} has shape {tuple(scale.shape)}: a number or one scale a sample, [batch], is needed")


def scale_at(field: str, scale: GuidanceScale, t: Tensor, like: Tensor) -> float | Tensor:
    """The scale at t [batch], as a number or as [batch, 1, ..., 1] in the dtype of like.

    Raises UserError naming field where the scale is not one a sample.
    """
    if isinstance(scale, int | float):
        return scale
    rows = scale if isinstance(scale, Tensor) else scale(t)
    if rows.shape != t.shape:
        raise UserError(f"{field} has shape {tuple(rows.shape)}, one scale a sample is needed: {tuple(t.shape)}")
    return per_sample(rows, like)


@dataclass(frozen=True)
class IntervalScale:
    """scale for t in [t_low, t_high], `outside` elsewhere. Source: Kynkäänniemi et al. 2024.

    scale: a number or one a sample. outside: what switches guidance off, 1 (0 for pag_scale). The paper's ends are
    noise levels: `noise_level_interval` makes the schedule from those. Raises UserError for ends out of order.
    """

    scale: float | Tensor
    t_low: float
    t_high: float
    outside: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_low < self.t_high <= 1.0:
            raise UserError(f"t_low={self.t_low}, t_high={self.t_high}: needed is 0 <= t_low < t_high <= 1")

    def __call__(self, t: Tensor) -> Tensor:
        """t [batch] -> scale [batch]."""
        inside = (t >= self.t_low) & (t <= self.t_high)
        scale = self.scale if isinstance(self.scale, Tensor) else torch.full_like(t, self.scale)
        return torch.where(inside, scale.to(t.dtype), self.outside)


def noise_level_interval(process: Process, scale: float | Tensor, low: float, high: float) -> IntervalScale:
    """The guidance interval low <= sigma / alpha <= high of a process; 0 and infinity leave an end open.

    Raises UserError for levels out of order.
    """
    if not 0.0 <= low < high:
        raise UserError(f"low={low}, high={high}: needed is 0 <= low < high, as sigma / alpha")

    def t_at(level: float) -> float:
        log_snr = torch.tensor(-math.log(level), dtype=torch.float64)
        return min(max(float(process.t_of_log_snr(log_snr)), 0.0), 1.0)

    return IntervalScale(scale, 0.0 if low == 0 else t_at(low), 1.0 if math.isinf(high) else t_at(high))


@dataclass(frozen=True)
class LinearScale:
    """From start at t = 1 (noise) to end at t = 0 (data), evenly in t.

    LinearScale(0, 2 w) is the linear schedule of Wang et al. 2024, "Analysis of classifier-free guidance weight
    schedulers": rising towards the data, with mean w.
    """

    start: float
    end: float | Tensor

    def __call__(self, t: Tensor) -> Tensor:
        """t [batch] -> scale [batch]."""
        return self.end + (self.start - self.end) * t


@dataclass(frozen=True)
class CosineScale:
    """From start at t = 1 to end at t = 0 along (1 - cos(pi (1 - t)^power)) / 2.

    CosineScale(0, 2 w) is the cosine schedule of Wang et al. 2024, with mean w; CosineScale(0, w, power) is their
    powered cosine. Raises UserError for a power that is not above 0.
    """

    start: float
    end: float | Tensor
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(f"power={self.power} must be above 0")

    def __call__(self, t: Tensor) -> Tensor:
        """t [batch] -> scale [batch]."""
        share = (1 - torch.cos(math.pi * (1 - t) ** self.power)) / 2
        return self.start + (self.end - self.start) * share
