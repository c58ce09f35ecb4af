"""Weak orders of the solvers that draw noise: mean and variance on a Gaussian, by the plans' matrices, no sampling."""

import pytest
import torch
from moments import WEAK_CASES, marginal, moments_at_end, weak_errors, weak_order

from smalti.diffusion import make_process
from smalti.sampling import make_plan
from smalti.sampling.solvers import solver_entry


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Two numbers a call: a second thread is only waited for."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_cosine"])
@pytest.mark.parametrize(("solver", "options", "order"), WEAK_CASES)
def test_halving_the_step_divides_the_error_of_the_moments(solver, options, order, process_name):
    measured = weak_order(solver, make_process(process_name), (100, 200, 400), **options)
    assert abs(measured - order) < 0.15 * order


def test_every_solver_that_draws_noise_has_a_weak_order():
    stochastic = {case[0] for case in WEAK_CASES}
    for name in ("ddpm", "dpmpp_sde_1", "dpmpp_sde_2m", "dpmpp_sde_3m", "sde_euler", "sde_heun"):
        assert solver_entry(name).kind == "sde"
        assert name in stochastic


@pytest.mark.parametrize("process_name", ["rectified_flow", "edm"])
def test_moments_of_a_deterministic_solver_are_those_of_its_order(process_name):
    """The propagation itself: of 2M, a plan of two registers, mean and variance converge at the order of its ODE."""
    process = make_process(process_name)
    assert weak_order("dpmpp_2m", process) == pytest.approx(2, abs=0.1)
    assert weak_errors("dpmpp_2m", process, (800,))[0] < 1e-5


def test_one_step_to_data_is_the_estimate():
    """From t to 0 in one step of ddpm the end is x0's estimate, whose variance is gain^2 times that of x_t."""
    process = make_process("rectified_flow")
    plan = make_plan("ddpm", process=process, num_inference_steps=1, t_start=0.5)
    mean, variance = marginal(process, 0.5)
    end_mean, end_variance = moments_at_end(plan, (mean, variance))
    prior = 4 * (variance - 0.25)
    gain = 0.5 * prior / variance
    assert end_mean == pytest.approx(2 * mean)
    assert end_variance == pytest.approx(gain**2 * variance)
