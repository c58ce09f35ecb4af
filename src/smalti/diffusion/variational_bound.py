"""The variational bound of a network that learns the variance of its steps.

The step from t to s = t - 1 / T of a table of T steps is q(x_s | x_t, x0) in truth, a Gaussian around a point between
x_t and x0, and p(x_s | x_t) as the network has it: the same with its estimate of x0, and a variance between beta tilde
and beta per element. Source: Nichol and Dhariwal 2021 ("Improved denoising diffusion probabilistic models"), 3.1.
"""

import math

import torch
from torch import Tensor

from smalti.diffusion.prediction import per_sample
from smalti.diffusion.variance_preserving import VPDiscrete

_HALF_LEVEL = 1 / 255  # half the distance of two neighbouring bytes in [-1, 1]
_LEAST_PROBABILITY = 1e-12


def _step(process: VPDiscrete, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of x0 in the mean of q(x_s | x_t, x0), beta tilde, beta) of the step from t to s = t - 1 / T, or to 0.

    Source: Ho et al. 2020, eq. 7, for any alpha and sigma.
    """
    s = (t - 1 / process.steps).clamp(min=0)
    alpha_s, sigma_s, sigma_t = process.alpha(s), process.sigma(s), process.sigma(t)
    step_alpha = process.alpha(t) / alpha_s
    beta = sigma_t**2 - (step_alpha * sigma_s) ** 2
    return alpha_s * beta / sigma_t**2, beta * (sigma_s / sigma_t) ** 2, beta


def _log_probability_of_bytes(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of what a Gaussian gives the interval around each value of x0, one of 256 in [-1, 1]; the outer two are open.

    Source: Ho et al. 2020, eq. 13.
    """
    std = torch.exp(0.5 * log_variance)
    below = torch.special.ndtr((x0 + _HALF_LEVEL - mean) / std)
    above = torch.special.ndtr((mean - x0 + _HALF_LEVEL) / std)
    # below + above - 1 is the interval's own probability; an open interval has one side only.
    inner = below + above - 1
    outer = torch.where(x0 < 0, below, above)
    edge = 1 - _HALF_LEVEL
    return torch.where(x0.abs() > edge, outer, inner).clamp(min=_LEAST_PROBABILITY).log()


def variational_bound(process: VPDiscrete, t: Tensor, x0: Tensor, estimate: Tensor, logits: Tensor) -> Tensor:
    """The bound's term of the step at t, T times over: its mean over t is L_vlb, in bits per dimension, [batch].

    t: [batch] in [1 / T, 1]. x0, estimate, logits: [batch, ...]; -1 .. 1 of the logits is beta tilde .. beta. A t
    below 2 / T is the last step, from which x0 itself is read: there the term is -ln p(x0 | x_t) of bytes in [-1, 1],
    and the published code's beta tilde, that of the step before. Source: Nichol and Dhariwal 2021, eq. 4 to 7 and 15.
    """
    last = t < 2 / process.steps - 1e-9
    t = torch.where(last, 1 / process.steps, t)
    x0_weight, small, large = _step(process, t)
    _, least, _ = _step(process, torch.full_like(t, 2 / process.steps))
    small = torch.where(last, least, small)
    weight, log_small, log_ratio = (per_sample(v, x0) for v in (x0_weight, small.log(), (large / small).log()))
    # Nichol and Dhariwal 2021, eq. 15, with v = (logits + 1) / 2.
    above_small = (logits + 1) / 2 * log_ratio
    squared_gap = (weight * (x0 - estimate)).square()  # of the two means: both hold x_t alike
    # Of two Gaussians of variances beta tilde and e^above_small beta tilde.
    divergence = 0.5 * (above_small - 1 + torch.exp(-above_small) + squared_gap * torch.exp(-above_small - log_small))
    decoded = -_log_probability_of_bytes(x0, estimate, log_small + above_small)
    nats = torch.where(per_sample(last, x0).bool(), decoded, divergence).flatten(1).mean(1)
    return nats * (process.steps / math.log(2))
