"""Orders of convergence, measured: the error over halved steps on a mixture of Gaussians with its exact score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gaussian import MixtureDenoiser
from torch import Tensor

from smalti import rng
from smalti.diffusion import Process
from smalti.sampling import Plan, make_plan, run_plan, run_plans, solver_names
from smalti.sampling.solvers import solver_entry

PLANE = torch.tensor([[0.9, 0.2], [-0.5, 0.6], [0.1, -0.8]], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A solver with options and the order that it should have; noise is left out of solvers that draw it."""

    solver: str
    order: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def draws_noise(self) -> bool:
        return solver_entry(self.solver).kind == "sde"

    @property
    def steps(self) -> tuple[int, ...]:
        return (16, 32, 64) if self.solver == "flow_rk4" else (48, 96, 192)

    def __str__(self) -> str:
        return " ".join([self.solver, *(f"{name}={str(v).lower()}" for name, v in self.options.items())])


# Each solver by its default and the registry's order, then its variants. Samplers of distilled models solve nothing.
CASES = [
    *(Case(name, solver_entry(name).order) for name in solver_names() if name not in ("lcm", "consistency")),
    Case("dpm_solver_3", 3, {"solver_type": "taylor"}),
    Case("dpmpp_2s", 2, {"solver_type": "heun"}),
    Case("dpmpp_3s", 3, {"solver_type": "dpmsolver"}),
    Case("dpmpp_2m", 2, {"solver_type": "heun"}),
    Case("dpmpp_3m", 2, {"variant": "published"}),  # its second difference lacks a factor 2
    Case("unipc_2", 3, {"bh": "bh1"}),
    Case("unipc_3", 4, {"bh": "bh1"}),
    Case("unipc_2", 2, {"corrector": False}),
]


def mixture(process: Process, dimensions: int) -> MixtureDenoiser:
    """Three modes in the plane, four in 64 dimensions: apart, but no switch for a solver's step to jump over."""
    if dimensions == 2:
        return MixtureDenoiser(process, PLANE, 0.4)
    means = 0.25 * rng.normal((dimensions,), seed=torch.arange(4), purpose="means", dtype=torch.float64)
    return MixtureDenoiser(process, means, 0.5)


@dataclass(frozen=True)
class DriftDenoiser:
    """The estimate whose probability flow is the drift v + D eps / sigma of an SDE, noise left out.

    That flow is dx/dt = weight_x x + weight_x0 x0. D: the reverse SDE's, -weight_x0 sigma^2 / alpha, or SiT's sigma.
    """

    denoiser: MixtureDenoiser
    reverse_sde: bool

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def __call__(self, x, t, cond=None):
        process, x0 = self.process, self.denoiser(x, t)
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        if self.reverse_sde:
            return 2 * x0 - x / alpha
        weight_x0 = process.alpha_dot(t)[:, None] - process.sigma_dot(t)[:, None] * alpha / sigma
        return x0 + (x - alpha * x0) / (sigma * weight_x0)


def time_range(process: Process) -> list[float]:
    """The same range of log-SNR on every process: lambda from -2.5 to 2.5."""
    return process.t_of_log_snr(torch.tensor([-2.5, 2.5], dtype=torch.float64)).tolist()


def scaled_start(process: Process, dimensions: int) -> Tensor:
    """Eight points of about the right size at the range's noisy end."""
    t = torch.tensor(time_range(process)[:1], dtype=torch.float64)
    points = rng.normal((dimensions,), seed=torch.arange(8), purpose="conformance", dtype=torch.float64)
    return torch.sqrt(process.alpha(t) ** 2 * 0.3 + process.sigma(t) ** 2) * points


def plan_of(name: str, process: Process, steps: int, **options: Any) -> Plan:
    """A solver over the range, of full order to its end."""
    t_start, t_end = time_range(process)
    if "lower_order_final" in solver_entry(name).options:
        options["lower_order_final"] = False
    return make_plan(name, process=process, num_inference_steps=steps, t_start=t_start, t_end=t_end, **options)


def without_noise(plan: Plan) -> Plan:
    """The plan with z's column and start set to 0."""
    matrices = plan.matrices.copy()
    matrices[..., -1] = 0.0
    return replace(plan, matrices=matrices, start_row=None)


def truth(denoiser: Callable[..., Tensor], process: Process, x: Tensor) -> Tensor:
    """The flow's end, by a fine Runge-Kutta run."""
    return run_plan(plan_of("flow_rk4", process, 500, spacing="lambda"), denoiser, x)


def fitted_order(errors: Sequence[float]) -> float:
    """From errors at steps n, 2n, 4n, ..."""
    return float(-np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def measured_orders(
    process: Process, dimensions: int, cases: Sequence[Case] = CASES
) -> list[tuple[float, list[float]]]:
    """(fitted order, the root mean square errors it is fitted to) of each case.

    All solvers and step counts run as one batch of mixed plans: one network call a tick for all of them.
    """
    denoiser, x = mixture(process, dimensions), scaled_start(process, dimensions)
    plans = [plan_of(case.solver, process, steps, **case.options) for case in cases for steps in case.steps]
    quiet = [without_noise(plan) for plan in plans]
    ends = run_plans([plan for plan in quiet for _ in x], lambda rows: denoiser, x.repeat(len(plans), 1))
    flow = truth(denoiser, process, x)
    drifts = {reverse: truth(DriftDenoiser(denoiser, reverse), process, x) for reverse in (True, False)}
    measured = []
    for case, end in zip(cases, ends.reshape(len(cases), 3, *x.shape), strict=True):
        exact = drifts[not solver_entry(case.solver).in_t] if case.draws_noise else flow
        errors = (end - exact).square().mean((1, 2)).sqrt().tolist()
        measured.append((fitted_order(errors), errors))
    return measured
