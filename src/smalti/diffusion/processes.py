"""Processes: what noise means. x_t = alpha(t) x0 + sigma(t) eps, t = 0 is data, t = 1 is noise.

A process owns alpha, sigma, their derivatives, the half-log-SNR lambda = ln(alpha / sigma) with its inverse, and the
one map from t to the time that a network is fed. Everything takes and gives tensors of any shape; the tables of solvers
are computed from them in float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smalti.types import UserError, unknown_name


class Process(ABC):
    """A noise process with alpha(0) = 1, sigma(0) = 0 (or nearly), and lambda falling in t."""

    name: str
    t_min: float  # the smallest and the largest t at which lambda is finite and a network is trained
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at t in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at t in [0, 1]."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / d t."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / d t."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is fed for t."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t at which lambda = log_snr."""

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = ln(alpha / sigma), the half-log-SNR of DPM-Solver; infinite where sigma or alpha is 0."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) x0 + t eps. Source: Liu et al. 2022; SD3 (Esser et al. 2024), eq. 13."""

    name: str = "rectified_flow"
    t_min: float = 1e-3
    t_max: float = 1.0 - 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's share is t itself."""
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """alpha = sigmoid(lambda), so t = sigmoid(-lambda)."""
        return torch.sigmoid(-log_snr)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, as SD3 and FLUX feed it."""
        return 1000 * t


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
        """-alpha^2 (ln alpha)' / sigma."""
        return -(self.alpha(t) ** 2) * self.log_alpha_dot(t) / self.sigma(t)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t - 1: a network trained on steps 0..999 meets t = (step + 1) / 1000. Source: DPM-Solver, app. D.2."""
        return 1000 * t - 1


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
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * log_snr)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 - 4 * slope * log_alpha)
        return -4 * log_alpha / (root + self.beta_min)


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
        """Difference of log-cosines."""
        return torch.log(torch.cos(self._angle(t))) - math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """Minus a tangent."""
        return -torch.tan(self._angle(t)) * (math.pi / 2) / (1 + self.s)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By the arc cosine."""
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * log_snr)
        cosine = torch.exp(log_alpha + math.log(math.cos(self.s / (1 + self.s) * math.pi / 2)))
        return 2 * (1 + self.s) / math.pi * torch.acos(cosine) - self.s


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

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log alpha at the left node, its slope a step, and the position past the node in steps."""
        table = self._log_alphas.to(t.device)
        position = t.double() * self.steps
        left = position.floor().clamp(0, self.steps - 1).long()
        return table[left], table[left + 1] - table[left], position - left

    def log_alpha(self, t: Tensor) -> Tensor:
        """Interpolated in the table."""
        start, slope, past = self._segment(t)
        return (start + slope * past).to(t.dtype)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """Slope of the segment."""
        return (self._segment(t)[1] * self.steps).to(t.dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By bisection in the table."""
        table = self._log_alphas.to(log_snr.device)
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * log_snr.double())
        right = torch.searchsorted(-table, -log_alpha).clamp(1, self.steps)
        fraction = (log_alpha - table[right - 1]) / (table[right] - table[right - 1])
        return ((right - 1 + fraction) / self.steps).to(log_snr.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """The step's number, 0 .. steps - 1."""
        return self.steps * t - 1


_PROCESSES: dict[str, Callable[..., Process]] = {
    "rectified_flow": RectifiedFlow,
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "vp_linear_discrete": lambda **options: VPDiscrete("vp_linear_discrete", linear_betas, **options),
    "vp_cosine_discrete": lambda **options: VPDiscrete("vp_cosine_discrete", cosine_betas, **options),
}


def process_names() -> list[str]:
    """What make_process takes."""
    return sorted(_PROCESSES)


def make_process(name: str, **options: float) -> Process:
    """A process by name; options are its dataclass fields. Raises UserError for an unknown name or option."""
    if name not in _PROCESSES:
        raise unknown_name("process", name, _PROCESSES)
    try:
        return _PROCESSES[name](**options)
    except TypeError as error:
        raise UserError(f"process {name!r} takes no such option: {error}") from None
