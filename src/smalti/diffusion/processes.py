"""The processes by name, and the three whose scales are one line: rectified flow, GVP and EDM."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.interpolants import Interpolant, LinearInterpolant
from smalti.diffusion.masking import Masking, masking_names
from smalti.diffusion.process import Process
from smalti.diffusion.variance_preserving import (
    VPCosine,
    VPDiscrete,
    VPLinear,
    VPZeroSNR,
    cosine_betas,
    linear_betas,
)
from smalti.errors import UserError, unknown_name

__all__ = [
    "EDM",
    "GVP",
    "Interpolant",
    "LinearInterpolant",
    "Masking",
    "Process",
    "RectifiedFlow",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "VPZeroSNR",
    "cosine_betas",
    "linear_betas",
    "make_process",
    "process_names",
]


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


@dataclass(frozen=True)
class GVP(Process):
    """The quarter circle x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps. Source: SiT (Ma et al. 2024), section 3.2."""

    name: str = "gvp"
    t_min: float = 1e-3
    t_max: float = 1.0 - 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """cos(pi t / 2), as the sine that is exactly 0 at t = 1."""
        return torch.sin(math.pi / 2 * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """-pi/2 sigma."""
        return -math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """pi/2 alpha."""
        return math.pi / 2 * self.alpha(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """tan(pi t / 2) = exp(-lambda)."""
        return (2 / math.pi * torch.atan(torch.exp(-log_snr))).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, as for rectified flow."""
        return 1000 * t


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding: x_t = x0 + sigma eps with sigma = sigma_max t^rho, 0 < sigma <= sigma_max.

    A grid even in t between t_min (sigma_min) and 1 is the published ramp. Source: Karras et al. 2022, eq. 5, table 1.
    Raises UserError unless 0 < sigma_min < sigma_max and rho, sigma_data > 0.
    """

    name: str = "edm"
    t_max: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: needed is 0 < sigma_min < sigma_max"
            )
        for name in ("rho", "sigma_data"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """Where sigma is sigma_min."""
        return float((self.sigma_min / self.sigma_max) ** (1 / self.rho))

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_max t^rho."""
        return self.sigma_max * t**self.rho

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """sigma_max rho t^(rho - 1)."""
        return self.sigma_max * self.rho * t ** (self.rho - 1)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """sigma = exp(-lambda)."""
        return torch.exp(-(log_snr + math.log(self.sigma_max)) / self.rho).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        """ln(sigma) / 4. Source: Karras et al. 2022, table 1 (c_noise)."""
        return torch.log(self.sigma(t)) / 4


_PROCESSES: dict[str, Callable[..., Process]] = {
    "rectified_flow": RectifiedFlow,
    "gvp": GVP,
    "interpolant": LinearInterpolant,
    "edm": EDM,
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "vp_linear_discrete": lambda **options: VPDiscrete("vp_linear_discrete", linear_betas, **options),
    "vp_cosine_discrete": lambda **options: VPDiscrete("vp_cosine_discrete", cosine_betas, **options),
    "vp_linear_zero_snr": lambda **options: VPZeroSNR("vp_linear_zero_snr", linear_betas, **options),
    "vp_cosine_zero_snr": lambda **options: VPZeroSNR("vp_cosine_zero_snr", cosine_betas, **options),
}


def process_names() -> list[str]:
    """The processes of pictures and latents; masking_names() are those of tokens."""
    return sorted(_PROCESSES)


def make_process(name: str, **options: float) -> Process:
    """A process by name; options are its dataclass fields. Raises UserError for an unknown name or option."""
    if name in masking_names():
        return Masking(name)
    if name not in _PROCESSES:
        raise unknown_name("process", name, [*_PROCESSES, *masking_names()])
    try:
        return _PROCESSES[name](**options)
    except TypeError as error:
        raise UserError(f"process {name!r} takes no such option: {error}") from None
