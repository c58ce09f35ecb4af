"""Samplers of distilled models: each call jumps to an estimate of the data, then noise is put back."""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.sampling.plan import Plan, PlanDraft
from smalti.sampling.solvers.nodes import nodes_of


def lcm(process: Process, times: NDArray[np.float64]) -> Plan:
    """Latent consistency models. Source: Luo et al. 2023, algorithm 3, with its code's boundary weights.

    c_skip and c_out are of q = 10 (1000 t - 1), DDPM's step number times 10, and sigma_data = 0.5.
    """
    draft = PlanDraft("lcm", process)
    x, x0, z = draft.symbols("x", "x0", "z")
    for s, t in pairwise(nodes_of(process, times)):
        scaled = 10.0 * (1000.0 * s.t - 1.0)
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        estimate = c_skip * x + c_out * x0
        draft.call(s.t, t.t, 1, x=t.alpha * estimate + t.sigma * z)
    return draft.finish()


def consistency(process: Process, times: NDArray[np.float64]) -> Plan:
    """Multistep consistency sampling, in x / alpha. Source: Song et al. 2023, algorithm 1.

    The denoiser is the consistency function itself. Noise of sqrt(s^2 - s_min^2) is put back, s = sigma / alpha and
    s_min that of process.t_min.
    """
    draft = PlanDraft("consistency", process)
    x0, z = draft.symbols("x0", "z")
    (least,) = nodes_of(process, np.array([process.t_min]))
    for s, t in pairwise(nodes_of(process, times)):
        noise = math.sqrt(max(t.s**2 - least.s**2, 0.0))
        draft.call(s.t, t.t, 1, x=t.alpha * (x0 + noise * z))
    return draft.finish()
