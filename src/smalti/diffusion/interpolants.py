"""Stochastic interpolants x_t = alpha x0 + beta x1 + gamma z with Gaussian x1 and z.

x1 and z are independent and both standard normal, so at each t the mixture of the two is one noise of scale
sigma = sqrt(beta^2 + gamma^2), and solvers, predictions and losses need nothing of their own. Source: Albergo,
Boffi, Vanden-Eijnden 2023 ("Stochastic interpolants"), definition 2.1 and section 3.2, with time reversed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.diffusion.process import Process
from smalti.errors import UserError
from smalti.rng import widest_float

_BISECTIONS = 64  # halvings of [0, 1] down to float64's precision


@dataclass(frozen=True)
class LinearInterpolant(Process):
    """alpha = 1 - t, beta = t, gamma = sqrt(gamma_scale t (1 - t)). gamma_scale = 0 is rectified flow.

    Raises UserError for gamma_scale below 0.
    """

    name: str = "interpolant"
    t_min: float = 1e-3
    t_max: float = 1.0 - 1e-3
    gamma_scale: float = 0.0

    def __post_init__(self) -> None:
        if not self.gamma_scale >= 0:
            raise UserError(f"gamma_scale={self.gamma_scale} must be at least 0")

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(t^2 + gamma_scale t (1 - t)), the common factor t taken out of the root."""
        return torch.sqrt(t) * torch.sqrt(t + self.gamma_scale * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """(2 t + gamma_scale (1 - 2 t)) / (2 sigma); without bound at t = 0 where gamma is there."""
        t = t.clamp(min=1e-30)  # 0 / 0 otherwise
        return (2 * t + self.gamma_scale * (1 - 2 * t)) / (2 * self.sigma(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """With u = t / (1 - t): exp(-2 lambda) = u^2 + gamma_scale u, a quadratic whose root does not cancel so."""
        ratio = torch.exp(-log_snr.clamp(min=-40.0))  # at -40 t is 1 to the last bit; its square stays finite
        u = 2 * ratio**2 / (self.gamma_scale + torch.sqrt(self.gamma_scale**2 + 4 * ratio**2))
        return torch.where(ratio > 0, u / (1 + u), 0.0)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, as for rectified flow."""
        return 1000 * t


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / d t of an element-wise function, also inside torch.inference_mode()."""
    with torch.inference_mode(False), torch.enable_grad():
        point = t.detach().clone().requires_grad_(True)  # a clone, since an inference tensor can carry no gradient
        value = function(point)
        if not value.requires_grad:  # a constant
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), point, allow_unused=True, materialize_grads=True)
    return slope


class Interpolant(Process):
    """x_t = alpha x0 + beta x1 + gamma z for any alpha, beta, gamma; t = 0 is data, t = 1 the Gaussian x1.

    alpha, beta, gamma: element-wise functions of tensors of any shape, differentiable by autograd (gamma None: no z).
    alpha(0) = 1, beta and gamma are 0 at t = 0 and nowhere below, and lambda falls over [t_min, t_max]. Raises
    UserError naming the one of these that fails. Immutable.
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        beta: Callable[[Tensor], Tensor],
        gamma: Callable[[Tensor], Tensor] | None = None,
        *,
        name: str = "interpolant",
        t_min: float = 1e-3,
        t_max: float = 1.0 - 1e-3,
    ) -> None:
        self._alpha, self._beta, self._gamma = alpha, beta, gamma
        self.name, self.t_min, self.t_max = name, t_min, t_max
        self._check()

    def _check(self) -> None:
        if not 0 < self.t_min < self.t_max <= 1:
            raise UserError(f"t_min={self.t_min}, t_max={self.t_max}: needed is 0 < t_min < t_max <= 1")
        zero = torch.zeros((), dtype=torch.float64)
        if not abs(float(self.alpha(zero)) - 1) < 1e-3:
            raise UserError(f"alpha(0)={float(self.alpha(zero)):.6g} must be 1: t = 0 is the data")
        if not abs(float(self.sigma(zero))) < 1e-3:
            raise UserError(f"sqrt(beta(0)^2 + gamma(0)^2)={float(self.sigma(zero)):.6g} must be 0: t = 0 is the data")
        t = torch.linspace(self.t_min, self.t_max, 513, dtype=torch.float64)
        for name, function in (("alpha", self._alpha), ("beta", self._beta), ("gamma", self._gamma)):
            wrong = t[~(function(t) >= 0)] if function is not None else t[:0]
            if len(wrong):
                raise UserError(f"{name}({float(wrong[0]):.4g}) must be at least 0 and finite")
        rising = t[1:][~(self.log_snr(t).diff() < 0)]
        if len(rising):
            raise UserError(
                f"alpha, beta: ln(alpha / sigma) must fall in t, and does not near t={float(rising[0]):.4g}"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """As given."""
        return self._alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(beta^2 + gamma^2)."""
        return self._beta(t) if self._gamma is None else torch.hypot(self._beta(t), self._gamma(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """By automatic differentiation."""
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """By automatic differentiation.

        The usual gamma = sqrt(c t (1 - t)) has no derivative at the ends: where the result is not finite, that from
        just inside is taken.
        """
        slope = _derivative(self.sigma, t)
        inside = _derivative(
            self.sigma, t.clamp(1e-9, 1 - 1e-9) if t.dtype == torch.float64 else t.clamp(1e-6, 1 - 1e-6)
        )
        return torch.where(torch.isfinite(slope), slope, inside)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By bisection, in float64 where the device has it."""
        target = log_snr.to(widest_float(log_snr.device))
        low, high = torch.zeros_like(target), torch.ones_like(target)
        at_data, at_noise = target >= self.log_snr(low), target <= self.log_snr(high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_clean = self.log_snr(middle) > target
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        inside = (low + high) / 2
        return torch.where(at_data, 0.0, torch.where(at_noise, 1.0, inside)).to(log_snr.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, as for rectified flow."""
        return 1000 * t
