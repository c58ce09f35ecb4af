"""Every solver against a mixture of Gaussians with exact score: orders of the deterministic, moments of the others."""

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser, MixtureDenoiser
from needed_options import needed_options

from smalti import rng
from smalti.diffusion import make_process, process_names
from smalti.sampling import make_plan, run_plan, run_plans, solver_names
from smalti.sampling.solvers import solver_entry

PROCESSES = [name for name in ("rectified_flow", "vp_linear", "vp_cosine", "gvp", "edm") if name in process_names()]
PLANE = torch.tensor([[0.9, 0.2], [-0.5, 0.6], [0.1, -0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Small tensors and many calls: a second thread is only waited for."""
    torch.set_num_threads(1)


# (solver, options, order): each solver of kind "ode" by its default, then its variants. The order is the registry's
# unless the variant's is another.
VARIANTS = [
    ("dpm_solver_3", {"solver_type": "taylor"}, 3),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_3s", {"solver_type": "dpmsolver"}, 3),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_3m", {"variant": "published"}, 2),  # its second difference lacks a factor 2
    ("unipc_2", {"bh": "bh1"}, 3),
    ("unipc_3", {"bh": "bh1"}, 4),
    ("unipc_2", {"corrector": False}, 2),
    ("dpm_solver_v3", {"order": 1, "corrector": False}, 1),
    ("dpm_solver_v3", {"order": 2, "corrector": False}, 2),
    ("dpm_solver_v3", {"order": 3, "corrector": False}, 3),
    ("dpm_solver_v3", {"order": 1}, 2),
    ("dpm_solver_v3", {"order": 3}, 4),
]
# Any statistics are right in the limit; these have no kinks, whose errors the higher orders would meet.
STATISTICS = {"l": 0.95, "s": 0.3, "b": 0.1}
DETERMINISTIC = [
    *((name, {}, solver_entry(name).order) for name in solver_names() if solver_entry(name).kind == "ode"),
    *VARIANTS,
]


def mixture(process, dimensions):
    """Three modes in the plane, four in 64 dimensions: apart, but no switch for a solver's step to jump over."""
    if dimensions == 2:
        return MixtureDenoiser(process, PLANE, 0.4)
    means = 0.25 * rng.normal((dimensions,), seed=torch.arange(4), purpose="means", dtype=torch.float64)
    return MixtureDenoiser(process, means, 0.5)


def time_range(process):
    """The same range of log-SNR on every process: lambda from -2.5 to 2.5."""
    return process.t_of_log_snr(torch.tensor([-2.5, 2.5], dtype=torch.float64)).tolist()


def start(dimensions):
    return rng.normal((dimensions,), seed=torch.arange(8), purpose="conformance", dtype=torch.float64)


def scaled_start(process, t, dimensions):
    t = torch.tensor([t], dtype=torch.float64)
    return torch.sqrt(process.alpha(t) ** 2 * 0.3 + process.sigma(t) ** 2) * start(dimensions)


def slope(errors):
    """Fitted order from errors at steps n, 2n, 4n, ..."""
    return -np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0]


def plan_of(name, process, steps, **options):
    t_start, t_end = time_range(process)
    if "lower_order_final" in solver_entry(name).options:
        options["lower_order_final"] = False
    options |= needed_options(name, **STATISTICS)
    return make_plan(name, process=process, num_inference_steps=steps, t_start=t_start, t_end=t_end, **options)


def truth(denoiser, x):
    return run_plan(plan_of("flow_rk4", denoiser.process, 500, spacing="lambda"), denoiser, x)


@pytest.mark.parametrize("process_name", PROCESSES)
def test_truth_is_true(process_name):
    """The fine run that stands for truth, where truth is known: a Gaussian's probability flow has a closed form."""
    process = make_process(process_name)
    mean, variance = torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64)
    denoiser = GaussianDenoiser(process, mean, variance)
    t_start, t_end = time_range(process)
    x = scaled_start(process, t_start, 2)
    exact = denoiser.exact_flow(x, t_start, t_end)
    assert (truth(denoiser, x) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("dimensions", [2, 64])
@pytest.mark.parametrize("process_name", PROCESSES)
def test_halving_the_step_divides_the_error_by_two_to_the_order(process_name, dimensions):
    """All solvers and step counts as one batch of mixed plans: one network call a tick for all of them."""
    process = make_process(process_name)
    denoiser = mixture(process, dimensions)
    x = scaled_start(process, time_range(process)[0], dimensions)
    plans = []
    for name, options, _ in DETERMINISTIC:
        steps = (16, 32, 64) if name == "flow_rk4" else (48, 96, 192)
        plans += [plan_of(name, process, n, **options) for n in steps]
    ends = run_plans([plan for plan in plans for _ in x], lambda rows: denoiser, x.repeat(len(plans), 1))
    gaps = ends.reshape(len(DETERMINISTIC), 3, *x.shape) - truth(denoiser, x)
    wrong = {}
    for (name, options, order), errors in zip(DETERMINISTIC, gaps.square().mean((2, 3)).sqrt(), strict=True):
        measured = slope(errors.numpy())
        if not abs(measured - order) < 0.15 * order:
            wrong[name, *options.values()] = (order, measured, errors.tolist())
    assert not wrong


COUNT = 100_000
# First-order solvers lose some of the variance, in proportion to the step: at 200 steps over lambda -3.4 .. 2.1 (t from
# 0.95 to 0.05) ddpm ends 3 % short, 7 standard errors. They are held to 3 errors over lambda -2.5 .. 0.
NARROW = (-2.5, 0.0)
STOCHASTIC = [
    ("ddpm", {}, "vp_linear", NARROW),
    ("ddpm", {"variance": "large"}, "vp_linear", None),
    ("ddim", {"eta": 1.0}, "vp_linear", NARROW),
    ("dpmpp_sde_1", {}, "vp_linear", NARROW),
    ("dpmpp_sde_2m", {}, "vp_linear", None),
    ("dpmpp_sde_3m", {}, "rectified_flow", None),
    ("sde_euler", {}, "rectified_flow", None),
    ("sde_euler", {"diffusion": "sbdm"}, "vp_cosine", None),
    ("sde_heun", {}, "rectified_flow", None),
]


@pytest.mark.parametrize(("name", "options", "process_name", "log_snrs"), STOCHASTIC)
def test_moments_of_a_hundred_thousand_samples(name, options, process_name, log_snrs):
    process = make_process(process_name)
    denoiser = MixtureDenoiser(process, torch.tensor([[0.9, 0.2], [-0.6, 0.5]], dtype=torch.float64), 0.5)
    t_start, t_end = (0.95, 0.05)
    if log_snrs is not None:
        t_start, t_end = process.t_of_log_snr(torch.tensor(log_snrs, dtype=torch.float64)).tolist()
    plan = make_plan(name, process=process, num_inference_steps=200, t_start=t_start, t_end=t_end, **options)
    # Four points to a row, so that no random words are left over.
    x = denoiser.sample(t_start, torch.arange(COUNT)).reshape(-1, 4, 2)
    flat = run_plan(plan, lambda x, t, cond: denoiser(x.reshape(-1, 2), t[:1]).reshape(x.shape), x).reshape(-1, 2)
    mean, covariance = denoiser.moments(t_end)
    gaps = flat - mean
    products = torch.stack([gaps[:, 0] ** 2, gaps[:, 1] ** 2, gaps[:, 0] * gaps[:, 1]], 1)
    statistics = torch.cat([gaps, products - covariance[[0, 1, 0], [0, 1, 1]]], 1)
    standard_errors = statistics.mean(0) / (statistics.var(0) / COUNT).sqrt()
    assert (standard_errors.abs() < 3).all(), standard_errors
