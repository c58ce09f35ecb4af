"""Variance-preserving processes, alpha^2 + sigma^2 = 1: continuous betas, tables of betas, zero terminal SNR."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from smalti.diffusion.process import Process
from smalti.rng import widest_float


class _VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, given by log alpha and its derivative."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """ln alpha(t)."""

    @abstractmethod
    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """d ln alpha / d t."""

    def alpha(self, t: Tensor) -> Tensor:
        """exp(log alpha)."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), by expm1 so that small t keeps its digits."""
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """alpha (ln alpha)'."""
        return self.alpha(t) * self.log_alpha_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-alpha alpha' / sigma."""
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t - 1: a network trained on steps 0..999 meets t = (step + 1) / 1000. Source: DPM-Solver, app. D.2."""
        return 1000 * t - 1


def _log_alpha_of(log_snr: Tensor) -> Tensor:
    """ln alpha of a variance-preserving process at lambda: alpha^2 = sigmoid(2 lambda)."""
    return -0.5 * torch.nn.functional.softplus(-2 * log_snr)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """Betas that grow linearly, in continuous time: ln alpha = -t^2 (b1 - b0) / 4 - t b0 / 2.

    Source: Song et al. 2021, eq. 33 (b0 = 0.1, b1 = 20 is DDPM's 1e-4 .. 0.02 over 1000 steps).
    """

    name: str = "vp_linear"
    t_min: float = 1e-3
    t_max: float = 1.0
    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        """A quadratic in t."""
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """-beta(t) / 2."""
        return -t * (self.beta_max - self.beta_min) / 2 - self.beta_min / 2

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The quadratic's root, in the form that does not cancel. Source: DPM-Solver (Lu et al. 2022), app. D.4."""
        log_alpha = _log_alpha_of(log_snr.clamp(min=-300.0))  # inf / inf otherwise; far past the end all the same
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 - 4 * slope * log_alpha)
        return (-4 * log_alpha / (root + self.beta_min)).clamp(0, 1)


@dataclass(frozen=True)
class VPCosine(_VariancePreserving):
    """alpha = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)). Source: Nichol and Dhariwal 2021, eq. 17.

    t_max = 0.9946 keeps the last noise step's beta below 0.999, as that paper clips it and DPM-Solver starts there.
    """

    name: str = "vp_cosine"
    t_min: float = 1e-3
    t_max: float = 0.9946
    s: float = 0.008

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1 + self.s) * (math.pi / 2)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Difference of log-cosines, held at 0 where rounding at t = 0 leaves it above and sigma would be nan."""
        at_data = math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))
        return (torch.log(torch.cos(self._angle(t))) - at_data).clamp(max=0.0)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """Minus a tangent."""
        return -torch.tan(self._angle(t)) * (math.pi / 2) / (1 + self.s)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By the arc cosine."""
        cosine = torch.exp(_log_alpha_of(log_snr) + math.log(math.cos(self.s / (1 + self.s) * math.pi / 2)))
        return (2 * (1 + self.s) / math.pi * torch.acos(cosine) - self.s).clamp(0, 1)


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's betas, float64 [steps]. Source: Ho et al. 2020, section 4."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Tensor:
    """Betas of the cosine alpha-bar, clipped, float64 [steps]. Source: Nichol and Dhariwal 2021, eq. 17."""
    nodes = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((nodes + s) / (1 + s) * (math.pi / 2)) ** 2
    return torch.clamp(1 - alpha_bar[1:] / alpha_bar[:-1], max=largest)


@dataclass(frozen=True)
class VPDiscrete(_VariancePreserving):
    """A table of betas, step i at t = (i + 1) / steps, ln alpha piecewise linear between.

    Source: DPM-Solver, app. D.2."""

    discrete: ClassVar[bool] = True

    name: str
    betas: Callable[[], Tensor]
    t_max: float = 1.0

    @cached_property
    def _log_alphas(self) -> Tensor:
        betas = self.betas()
        return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.cumsum(torch.log1p(-betas), 0)])

    @property
    def steps(self) -> int:
        """Length of the table."""
        return len(self._log_alphas) - 1

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The first step."""
        return 1.0 / self.steps

    def _table_for(self, like: Tensor) -> Tensor:
        """ln alpha of each step, on the device of like."""
        return self._log_alphas.to(like.device, widest_float(like.device))

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The node to the left of t, and the position past it in steps."""
        position = t.to(widest_float(t.device)) * self.steps
        left = position.floor().clamp(0, self.steps - 1).long()
        return left, position - left

    def log_alpha(self, t: Tensor) -> Tensor:
        """Interpolated in the table."""
        table = self._table_for(t)
        left, past = self._segment(t)
        return (table[left] + (table[left + 1] - table[left]) * past).to(t.dtype)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """Slope of the segment."""
        table = self._table_for(t)
        left, _ = self._segment(t)
        return ((table[left + 1] - table[left]) * self.steps).to(t.dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By bisection in the table."""
        table = self._table_for(log_snr)
        log_alpha = _log_alpha_of(log_snr.to(table))
        right = torch.searchsorted(-table, -log_alpha).clamp(1, self.steps)
        fraction = (log_alpha - table[right - 1]) / (table[right] - table[right - 1])
        return ((right - 1 + fraction) / self.steps).clamp(0, 1).to(log_snr.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """The step's number, 0 .. steps - 1."""
        return self.steps * t - 1


@dataclass(frozen=True)
class VPZeroSNR(VPDiscrete):
    """A table of betas rescaled so that the last step is pure noise: alpha(1) = 0, lambda(1) = -inf.

    betas: the table before the rescaling. In the last segment ln alpha has no lower end, so alpha itself is linear
    there. Source: Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed"), algorithm 1.
    """

    @cached_property
    def _log_alphas(self) -> Tensor:
        alphas = torch.exp(0.5 * torch.cumsum(torch.log1p(-self.betas()), 0))
        # Lin et al. 2023, algorithm 1: shift so that the last is zero, scale so that the first is what it was.
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        return torch.log(torch.cat([torch.ones(1, dtype=torch.float64), alphas]))

    def log_alpha(self, t: Tensor) -> Tensor:
        """Interpolated in the table; the logarithm of a linear alpha in the last segment."""
        table = self._table_for(t)
        left, past = self._segment(t)
        falling = table[left] + torch.log1p(-past)
        return torch.where(left == self.steps - 1, falling.to(t.dtype), super().log_alpha(t))

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """Slope of the segment; -1 / (1 - t) in the last one."""
        left, past = self._segment(t)
        falling = -self.steps / (1 - past)
        return torch.where(left == self.steps - 1, falling.to(t.dtype), super().log_alpha_dot(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """alpha (ln alpha)'; constant in the last segment, where that is 0 times infinity at t = 1."""
        last = float(-self.steps * torch.exp(self._log_alphas[-2]))
        left, _ = self._segment(t)
        return torch.where(left == self.steps - 1, torch.full_like(t, last), super().alpha_dot(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By bisection in the table; by alpha in the last segment."""
        before_last = self._table_for(log_snr)[-2]
        log_alpha = _log_alpha_of(log_snr.to(before_last))
        past = -torch.expm1(log_alpha - before_last)
        falling = ((self.steps - 1 + past) / self.steps).to(log_snr.dtype)
        return torch.where(log_alpha < before_last, falling, super().t_of_log_snr(log_snr))
