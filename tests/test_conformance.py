"""Every solver against a mixture of Gaussians with exact score: orders of the deterministic, moments of the others."""

import pytest
import torch
from convergence import CASES, DriftDenoiser, measured_orders, mixture, scaled_start, time_range, truth
from gaussian import GaussianDenoiser, MixtureDenoiser

from smalti.diffusion import make_process
from smalti.sampling import make_plan, run_plan

PROCESSES = ["rectified_flow", "vp_linear", "vp_cosine", "gvp", "edm"]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Small tensors and many calls: a second thread is only waited for."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("process_name", PROCESSES)
def test_truth_is_true(process_name):
    """The fine run that stands for truth, where truth is known: a Gaussian's probability flow has a closed form."""
    process = make_process(process_name)
    mean, variance = torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64)
    denoiser = GaussianDenoiser(process, mean, variance)
    t_start, t_end = time_range(process)
    x = scaled_start(process, 2)
    exact = denoiser.exact_flow(x, t_start, t_end)
    assert (truth(denoiser, process, x) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_linear", "edm"])
@pytest.mark.parametrize("form", ["sbdm", "sigma"])
def test_drift_is_the_flow_and_half_the_diffusion_times_the_score(process_name, form):
    """The denoiser whose flow is an SDE's drift, against SiT's drift written out: -v + D score, backwards in t."""
    process = make_process(process_name)
    denoiser = mixture(process, 2)
    t = torch.full((8,), 0.4, dtype=torch.float64)
    x = scaled_start(process, 2)
    alpha, sigma, alpha_dot, sigma_dot = (
        f(t[:1]) for f in (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot)
    )
    x0 = denoiser(x, t)
    eps = (x - alpha * x0) / sigma
    diffusion = sigma * sigma_dot - alpha_dot / alpha * sigma**2 if form == "sbdm" else sigma
    expected = alpha_dot * x0 + sigma_dot * eps + diffusion / sigma * eps
    estimate = DriftDenoiser(denoiser, form == "sbdm")(x, t)
    flow = alpha_dot * estimate + sigma_dot * (x - alpha * estimate) / sigma
    torch.testing.assert_close(flow, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dimensions", [2, 64])
@pytest.mark.parametrize("process_name", PROCESSES)
def test_halving_the_step_divides_the_error_by_two_to_the_order(process_name, dimensions):
    """Of solvers that draw noise the drift, against its own flow."""
    wrong = {}
    for case, (measured, errors) in zip(CASES, measured_orders(make_process(process_name), dimensions), strict=True):
        if not abs(measured - case.order) < 0.15 * case.order:
            wrong[str(case)] = (case.order, measured, errors)
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
