"""Training densities of t: uniform random numbers in, timesteps out, so that randomness stays addressed.

Each density is called as density(u, process) with u in (0, 1) and gives t in [process.t_min, process.t_max]. Those with
a shift move t towards the noise as flow models of larger pictures are trained (SD3, section 5.3.2).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti.diffusion.process import Process
from smalti.diffusion.processes import GVP, Interpolant, LinearInterpolant, RectifiedFlow
from smalti.errors import UserError

Times = TypeVar("Times", float, Tensor, NDArray[np.float64])


def shift_timesteps(t: Times, shift: float) -> Times:
    """shift t / (1 + (shift - 1) t) for t in [0, 1]: under rectified flow lambda falls by ln(shift) at every t.

    Source: SD3 (Esser et al. 2024), eq. 23. Raises UserError for shift <= 0.
    """
    _check_shift(shift)
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(base_pixels: int, target_pixels: int) -> float:
    """sqrt(target / base), the shift that keeps a picture of more pixels as uncertain. Source: SD3, section 5.3.2.

    Raises UserError for counts below 1.
    """
    if min(base_pixels, target_pixels) < 1:
        raise UserError(f"base_pixels={base_pixels}, target_pixels={target_pixels} must be at least 1")
    return math.sqrt(target_pixels / base_pixels)


def flux_mu(sequence_length: int) -> float:
    """ln(shift) of FLUX.1 for a number of image tokens: linear, 0.5 at 256 and 1.15 at 4096.

    Source: black-forest-labs/flux, sampling.py. Raises UserError for a length below 1.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length={sequence_length} must be at least 1")
    return 0.5 + (1.15 - 0.5) * (sequence_length - 256) / (4096 - 256)


def trained_span(share: Tensor, process: Process) -> Tensor:
    """[0, 1] to the span of t that the process is trained on."""
    return process.t_min + (process.t_max - process.t_min) * share


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise UserError(f"shift={shift} must be above 0")


def _shifted_span(share: Tensor, shift: float, process: Process) -> Tensor:
    """The shift, then the span. A shift of 1 changes no bit."""
    return trained_span(share if shift == 1.0 else shift_timesteps(share, shift), process)


@dataclass(frozen=True)
class UniformTimesteps:
    """Every t alike."""

    kind: ClassVar[str] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """u in (0, 1) to t."""
        return _shifted_span(u, self.shift, process)


@dataclass(frozen=True)
class LogitNormalTimesteps:
    """t = sigmoid(mean + std z): the middle of the path more often. Source: SD3 (Esser et al. 2024), eq. 19."""

    kind: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"timesteps.std={self.std} must be above 0")
        _check_shift(self.shift)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """u in (0, 1) to t, by the normal's inverse distribution function."""
        # torch.sigmoid rounds the last places of a tensor another way than the rest: t would depend on its batch.
        share = 1 / (1 + torch.exp(-(self.mean + self.std * torch.special.ndtri(u))))
        return _shifted_span(share, self.shift, process)


@dataclass(frozen=True)
class ModeTimesteps:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u): more of the middle for scale > 0, more of the ends below 0.

    Source: SD3 (Esser et al. 2024), eq. 20; 1.29 is the best of its table. Raises UserError for a scale outside
    [-1, 2 / (pi - 2)], where t would not fall in u.
    """

    kind: ClassVar[str] = "mode"
    scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"timesteps.scale={self.scale} must lie in [-1, {2 / (math.pi - 2):.4f}]")
        _check_shift(self.shift)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """u in (0, 1) to t."""
        # SD3, eq. 20.
        share = 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return _shifted_span(share, self.shift, process)


@dataclass(frozen=True)
class CosMapTimesteps:
    """t = 1 - 1 / (tan(pi u / 2) + 1), density 2 / (pi (1 - 2 t + 2 t^2)): the log-SNR of the cosine schedule.

    Source: SD3 (Esser et al. 2024), eq. 21.
    """

    kind: ClassVar[str] = "cosmap"
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """u in (0, 1) to t."""
        # SD3, eq. 21.
        share = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
        return _shifted_span(share, self.shift, process)


@dataclass(frozen=True)
class EDMLogNormalTimesteps:
    """ln(sigma / alpha) = p_mean + p_std z, under any process. Source: Karras et al. 2022, table 1.

    What falls outside the process's span is held at its ends: 2 in 100,000 draws of the defaults under "edm".
    """

    kind: ClassVar[str] = "edm_log_normal"
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        if self.p_std <= 0:
            raise UserError(f"timesteps.p_std={self.p_std} must be above 0")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """u in (0, 1) to t, by the normal's inverse distribution function."""
        log_ratio = self.p_mean + self.p_std * torch.special.ndtri(u)
        return process.t_of_log_snr(-log_ratio).clamp(process.t_min, process.t_max)


TimestepDensity = UniformTimesteps | LogitNormalTimesteps | ModeTimesteps | CosMapTimesteps | EDMLogNormalTimesteps


def check_density(density: TimestepDensity, process: Process) -> None:
    """Raise UserError for a shift under a process of no flow: the formula of shift_timesteps is about their t."""
    shift = 1.0 if isinstance(density, EDMLogNormalTimesteps) else density.shift
    if shift != 1.0 and not isinstance(process, RectifiedFlow | GVP | LinearInterpolant | Interpolant):
        raise UserError(
            f"timesteps.shift={shift} is for rectified_flow, gvp and interpolant; the process is {process.name!r}: "
            "leave it at 1"
        )


def stratify(u: Tensor, slots: Tensor, batch_size: int) -> Tensor:
    """Spread a batch evenly over (0, 1): slot j of batch_size takes (j + u_j) / batch_size.

    Lowers the variance of a batch's loss; each t keeps its uniform marginal when slots are filled in random order.
    """
    return (slots + u) / batch_size
