"""Mean and variance at the end of a plan, exactly: on a Gaussian the denoiser is affine, so every call maps moments."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from convergence import fitted_order, time_range
from gaussian import GaussianDenoiser
from numpy.typing import NDArray

from smalti.diffusion import Process
from smalti.sampling import Plan, make_plan
from smalti.sampling.solvers import solver_entry

# What solvers that draw noise reach on a Gaussian: the order of the error of mean and variance.
WEAK_CASES: list[tuple[str, dict[str, Any], int]] = [
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "large"}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("dpmpp_sde_1", {}, 1),
    ("dpmpp_sde_2m", {}, 2),
    ("dpmpp_sde_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_sde_3m", {}, 2),
    ("dpmpp_sde_3m", {"variant": "published"}, 2),
    ("sde_euler", {}, 1),
    ("sde_euler", {"diffusion": "sbdm"}, 1),
    ("sde_heun", {}, 1),
    ("sde_heun", {"diffusion": "sbdm"}, 1),
    ("edm_euler", {"s_churn": 10.0}, 1),
    ("edm_heun", {"s_churn": 10.0}, 2),
]

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and variance, one a dimension

MEAN = torch.tensor([0.7, -0.3], dtype=torch.float64)
VARIANCE = torch.tensor([0.09, 0.5], dtype=torch.float64)


def marginal(process: Process, t: float) -> Moments:
    """Of x_t for x0 ~ N(MEAN, diag(VARIANCE))."""
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (process.alpha, process.sigma))
    return alpha * MEAN.numpy(), alpha**2 * VARIANCE.numpy() + sigma**2


def moments_at_end(plan: Plan, start: Moments) -> Moments:
    """Of a plan that begins at independent dimensions with these moments; of all its registers, and then of x."""
    denoiser = GaussianDenoiser(plan.process, MEAN, VARIANCE)
    count, registers = len(MEAN), len(plan.registers)
    mean, covariance = np.zeros((count, registers)), np.zeros((count, registers, registers))
    mean[:, 0], covariance[:, 0, 0] = start
    if plan.start_row is not None:
        weight_x, weight_z = plan.start_row
        mean[:, 0], covariance[:, 0, 0] = weight_x * mean[:, 0], weight_x**2 * covariance[:, 0, 0] + weight_z**2
    for time, matrix in zip(plan.times, plan.matrices, strict=True):
        t = torch.full((2,), time, dtype=torch.float64)
        at_zero, at_one = denoiser(torch.tensor([[0.0] * count, [1.0] * count], dtype=torch.float64), t).numpy()
        of_registers, of_x0, of_noise = matrix[:, :-2], matrix[:, -2], matrix[:, -1]
        step = np.repeat(of_registers[None], count, 0)
        step[:, :, 0] += np.outer(at_one - at_zero, of_x0)  # x0 = at_zero + (at_one - at_zero) x
        mean = np.einsum("dij,dj->di", step, mean) + np.outer(at_zero, of_x0)
        covariance = step @ covariance @ step.transpose(0, 2, 1) + np.outer(of_noise, of_noise)
    return mean[:, 0], covariance[:, 0, 0]


def weak_errors(solver: str, process: Process, steps: Sequence[int], **options: Any) -> list[float]:
    """The largest error of mean and variance, in units of the truth's, for each number of steps over lambda +-2.5."""
    t_start, t_end = time_range(process)
    if "lower_order_final" in solver_entry(solver).options:
        options["lower_order_final"] = False
    mean, variance = marginal(process, t_end)
    options = {"spacing": "lambda", "t_start": t_start, "t_end": t_end, **options}
    errors = []
    for count in steps:
        plan = make_plan(solver, process=process, num_inference_steps=count, **options)
        end_mean, end_variance = moments_at_end(plan, marginal(process, t_start))
        errors.append(float(np.abs([(end_mean - mean) / np.sqrt(variance), end_variance / variance - 1]).max()))
    return errors


def weak_order(solver: str, process: Process, steps: Sequence[int] = (200, 400, 800), **options: Any) -> float:
    """Fitted slope of weak_errors."""
    return fitted_order(weak_errors(solver, process, steps, **options))
