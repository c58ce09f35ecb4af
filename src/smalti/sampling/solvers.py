"""Solvers: one short function each, from a process and a time grid to a Plan. Formulas in data prediction.

Notation of a step from s to t: alpha, sigma at each, lambda = ln(alpha / sigma), h = lambda_t - lambda_s > 0.
A grid may begin at pure noise (alpha = 0) and end at data (sigma = 0), where lambda is infinite: the steps there fall
back to first order, whose coefficients stay finite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process, RectifiedFlow
from smalti.sampling.grids import time_grid
from smalti.sampling.plan import Plan, PlanDraft
from smalti.types import UserError, unknown_name


@dataclass(frozen=True)
class Node:
    """One time of the grid with the process's scales at it, in float64."""

    t: float
    alpha: float
    sigma: float
    log_snr: float


def nodes_of(process: Process, times: NDArray[np.float64]) -> list[Node]:
    """alpha, sigma and lambda at each time; the ends are snapped to 0 and 1, where rounding leaves a residue."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = process.alpha(t).tolist(), process.sigma(t).tolist()
    nodes = []
    for time, a, s in zip(times.tolist(), alpha, sigma, strict=True):
        if time == 0.0:
            a, s = 1.0, 0.0
        log_snr = math.inf if s == 0.0 else (-math.inf if a <= 0.0 else math.log(a) - math.log(s))
        nodes.append(Node(time, max(a, 0.0), s, log_snr))
    return nodes


def _ddim_weights(s: Node, t: Node) -> tuple[float, float]:
    """(weight of x, weight of x0) of the exact first-order step. Source: DPM-Solver++ (Lu et al. 2022), eq. 9.

    alpha_t (1 - e^-h) written as alpha_t - sigma_t alpha_s / sigma_s, which is finite also at pure noise and at data.
    """
    ratio = t.sigma / s.sigma
    return ratio, t.alpha - ratio * s.alpha


def _first_order(draft: PlanDraft, s: Node, t: Node) -> NDArray[np.float64]:
    weight_x, weight_x0 = _ddim_weights(s, t)
    x, x0 = draft.symbols("x", "x0")
    return weight_x * x + weight_x0 * x0


def ddim(process: Process, times: NDArray[np.float64], *, eta: float = 0.0) -> Plan:
    """DDIM; eta = 1 adds the noise of the ancestral sampler. Source: Song, Meng, Ermon 2021, eq. 12 and 16."""
    draft = PlanDraft("ddim", process)
    nodes = nodes_of(process, times)
    x, x0, z = draft.symbols("x", "x0", "z")
    for s, t in pairwise(nodes):
        eps = (x - s.alpha * x0) / s.sigma
        # sigma_t^2 / sigma_s^2 (1 - alpha_s^2 sigma_t^2 / (alpha_t^2 sigma_s^2)): eq. 16 for any alpha and sigma.
        remaining = (s.alpha * t.sigma / (t.alpha * s.sigma)) ** 2
        noise = eta * t.sigma * math.sqrt(max(1.0 - remaining, 0.0))
        kept = math.sqrt(max(t.sigma**2 - noise**2, 0.0))
        draft.call(s.t, t.t, 1, x=t.alpha * x0 + kept * eps + noise * z)
    return draft.finish()


def ddpm(process: Process, times: NDArray[np.float64], *, variance: str = "small") -> Plan:
    """Ancestral sampling from the posterior q(x_t | x_s, x0). Source: Ho et al. 2020, eq. 6 and 7.

    variance "small" is the posterior's own (beta tilde), "large" the forward step's (beta), whose last step is
    without noise. For grids of fewer steps alpha_s / alpha_t takes the place of sqrt(1 - beta).
    """
    if variance not in ("small", "large"):
        raise unknown_name("variance", variance, ("small", "large"))
    draft = PlanDraft("ddpm", process)
    nodes = nodes_of(process, times)
    x, x0, z = draft.symbols("x", "x0", "z")
    for s, t in pairwise(nodes):
        step_alpha = s.alpha / t.alpha
        step_variance = s.sigma**2 - (step_alpha * t.sigma) ** 2  # of q(x_s | x_t)
        mean = (step_alpha * t.sigma**2 * x + t.alpha * step_variance * x0) / s.sigma**2
        noise = t.sigma / s.sigma * math.sqrt(step_variance)
        if variance == "large" and t.sigma > 0.0:
            noise = math.sqrt(step_variance)
        draft.call(s.t, t.t, 1, x=mean + noise * z)
    return draft.finish()


def dpmpp_2m(process: Process, times: NDArray[np.float64], *, lower_order_final: bool = True) -> Plan:
    """DPM-Solver++(2M): second order from one call a step. Source: Lu et al. 2022, algorithm 2.

    lower_order_final takes the last step at first order, which few-step sampling wants; a step to sigma = 0 always is.
    """
    draft = PlanDraft("dpmpp_2m", process, ("x", "h1"))
    nodes = nodes_of(process, times)
    x0, previous_x0 = draft.symbols("x0", "h1")
    for i, (s, t) in enumerate(pairwise(nodes)):
        h = t.log_snr - s.log_snr
        last = i == len(nodes) - 2
        usable = i > 0 and math.isfinite(h) and math.isfinite(nodes[i - 1].log_snr)
        row = _first_order(draft, s, t)
        second_order = usable and not (last and lower_order_final)
        if second_order:
            r = (s.log_snr - nodes[i - 1].log_snr) / h
            row = row - 0.5 * t.alpha * math.expm1(-h) * (x0 - previous_x0) / r
        draft.call(s.t, t.t, 2 if second_order else 1, x=row, h1=x0)
    return draft.finish()


def _velocity_weights(process: Process, node: Node) -> tuple[float, float]:
    """(weight of x, weight of x0) of dx/dt = alpha' x0 + sigma' eps at a node."""
    t = torch.tensor(node.t, dtype=torch.float64)
    alpha_dot, sigma_dot = float(process.alpha_dot(t)), float(process.sigma_dot(t))
    return sigma_dot / node.sigma, alpha_dot - sigma_dot * node.alpha / node.sigma


def flow_euler(process: Process, times: NDArray[np.float64]) -> Plan:
    """Euler steps of the probability-flow ODE in t. Source: SiT (Ma et al. 2024), eq. 4; SD3 and FLUX sample so."""
    draft = PlanDraft("flow_euler", process)
    nodes = nodes_of(process, times)
    x, x0 = draft.symbols("x", "x0")
    for s, t in pairwise(nodes):
        weight_x, weight_x0 = _velocity_weights(process, s)
        row = x + (t.t - s.t) * (weight_x * x + weight_x0 * x0)
        # Where sigma reaches 0 along a curved path, dsigma/dt has no bound and Euler would leave noise behind: the
        # exact first-order step goes to the estimate. On the straight path the two are the same.
        draft.call(s.t, t.t, 1, x=_first_order(draft, s, t) if t.sigma == 0.0 else row)
    return draft.finish()


@dataclass(frozen=True)
class SolverEntry:
    """A solver in the registry: its function, order, default spacing and the options that it takes."""

    build: Callable[..., Plan]
    order: int
    spacing: str
    summary: str
    options: tuple[str, ...] = ()
    starts_at_noise: bool = False  # begins at t = 1 where the process allows, rather than at process.t_max


_SOLVERS: dict[str, SolverEntry] = {
    "ddpm": SolverEntry(ddpm, 1, "time", "ancestral sampling, stochastic; wants hundreds of steps", ("variance",)),
    "ddim": SolverEntry(ddim, 1, "time", "deterministic first order; eta=1 is ancestral", ("eta",)),
    "dpmpp_2m": SolverEntry(
        dpmpp_2m, 2, "lambda", "second order at one call a step; the default for few steps", ("lower_order_final",)
    ),
    "flow_euler": SolverEntry(flow_euler, 1, "time", "Euler in t, as SD3 and FLUX sample", (), starts_at_noise=True),
}


def solver_names() -> list[str]:
    """What make_plan takes."""
    return sorted(_SOLVERS)


def solver_entry(name: str) -> SolverEntry:
    """A solver's entry in the registry. Raises UserError with the nearest names."""
    if name not in _SOLVERS:
        raise unknown_name("solver", name, _SOLVERS)
    return _SOLVERS[name]


def make_plan(
    name: str,
    *,
    process: Process,
    num_inference_steps: int,
    spacing: str | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    **options: Any,
) -> Plan:
    """The plan of a solver by name.

    spacing: see grids.time_grid; the default is the solver's own. t_start, t_end: where to begin and end; by default
    from the process's noisiest time to 0, with no residual noise. options: the solver's own, such as eta or
    lower_order_final. Raises UserError for an unknown solver, spacing or option, and for steps < 1.
    """
    entry = solver_entry(name)
    for option in options:
        if option not in entry.options:
            takes = f"it takes {', '.join(entry.options)}" if entry.options else "it takes no options"
            raise UserError(f"option {option!r} has no effect on solver {name!r}: {takes}")
    if t_start is None and entry.starts_at_noise and isinstance(process, RectifiedFlow):
        t_start = 1.0
    times = time_grid(process, num_inference_steps, spacing or entry.spacing, t_start, t_end)
    return entry.build(process, times, **options)
