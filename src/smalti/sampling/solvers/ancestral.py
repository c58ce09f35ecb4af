"""DDPM and DDIM."""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import UserError, unknown_name
from smalti.sampling.plan import Plan, PlanDraft
from smalti.sampling.solvers.nodes import implied_noise, nodes_of


def ddim(process: Process, times: NDArray[np.float64], *, eta: float = 0.0) -> Plan:
    """DDIM; eta = 1 adds the noise of the ancestral sampler. Source: Song, Meng, Ermon 2021, eq. 12 and 16."""
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta={eta} must lie in 0 .. 1")
    draft = PlanDraft("ddim", process)
    x0, z = draft.symbols("x0", "z")
    for s, t in pairwise(nodes_of(process, times)):
        # sigma_t^2 / sigma_s^2 (1 - alpha_s^2 sigma_t^2 / (alpha_t^2 sigma_s^2)): eq. 16 for any alpha and sigma.
        remaining = (s.alpha * t.sigma / (t.alpha * s.sigma)) ** 2
        noise = eta * t.sigma * math.sqrt(max(1.0 - remaining, 0.0))
        kept = math.sqrt(max(t.sigma**2 - noise**2, 0.0))
        draft.call(s.t, t.t, 1, x=t.alpha * x0 + kept * implied_noise(draft, s) + noise * z)
    return draft.finish()


def ddpm(process: Process, times: NDArray[np.float64], *, variance: str = "small") -> Plan:
    """Ancestral sampling from the posterior q(x_t | x_s, x0). Source: Ho et al. 2020, eq. 6 and 7.

    variance "small" is the posterior's own (beta tilde), "large" the forward step's (beta), whose last step is
    without noise. For grids of fewer steps alpha_s / alpha_t takes the place of sqrt(1 - beta). "learned" reads from
    the network, per element, where between the two the variance lies (Nichol and Dhariwal 2021, eq. 15).
    """
    kinds = ("small", "large", "learned")
    if variance not in kinds:
        raise unknown_name("variance", variance, kinds)
    draft = PlanDraft("ddpm", process)
    x, x0, z = draft.symbols("x", "x0", "z")
    for s, t in pairwise(nodes_of(process, times)):
        step_alpha = s.alpha / t.alpha
        step_variance = s.sigma**2 - (step_alpha * t.sigma) ** 2  # of q(x_s | x_t)
        mean = (step_alpha * t.sigma**2 * x + t.alpha * step_variance * x0) / s.sigma**2
        noise = t.sigma / s.sigma * math.sqrt(step_variance)
        if variance == "large" and t.sigma > 0.0:
            noise = math.sqrt(step_variance)
        draft.call(s.t, t.t, 1, x=mean + noise * z)
        if variance == "learned":
            draft.learn_noise(2 * math.log(s.sigma / t.sigma) if t.sigma > 0.0 else 0.0)  # ln(beta / beta tilde)
    return draft.finish()
