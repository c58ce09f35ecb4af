"""Solvers' tables: finite on every grid, ending on the estimate, the published rows; marginals on a Gaussian."""

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import MEAN, VARIANCE, moments_at_end
from needed_options import needed_options

from smalti import rng
from smalti.diffusion import make_process, process_names
from smalti.errors import UserError
from smalti.sampling import make_plan, run_plan, solver_names
from smalti.sampling.grids import spacings
from smalti.sampling.solvers import solver_entry
from smalti.sampling.solvers.singlestep import step_orders

PROCESSES = ["rectified_flow", "vp_linear", "vp_cosine"]


def start(process, t, count=16, dimensions=2):
    return rng.normal((dimensions,), seed=torch.arange(count), purpose="test", dtype=torch.float64)


NORMAL = np.zeros(2), np.ones(2)  # moments


@pytest.mark.parametrize("process_name", ["vp_linear", "vp_cosine", "rectified_flow"])
@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 1.0})])
def test_stochastic_solvers_keep_the_marginals_to_first_order(solver, options, process_name):
    """From pure noise to data; tests/test_weak_order.py has the orders between."""
    process = make_process(process_name)
    errors = []
    for steps in (250, 500, 1000):
        plan = make_plan(solver, process=process, num_inference_steps=steps, spacing="lambda", **options)
        mean, variance = moments_at_end(plan, NORMAL)
        gaps = np.abs([(mean - MEAN.numpy()) / VARIANCE.sqrt().numpy(), variance / VARIANCE.numpy() - 1])
        errors.append(float(gaps.max()))
    assert errors[-1] < 0.03, errors
    assert errors[0] > 1.5 * errors[1] > 2.2 * errors[2], errors


@pytest.mark.parametrize(
    ("solver", "options"), [("ddpm", {}), ("dpmpp_sde_3m", {}), ("sde_heun", {}), ("edm_heun", {"s_churn": 8.0})]
)
def test_fresh_noise_has_the_variance_that_the_plan_says(solver, options):
    """Samples against the moments of the table."""
    process = make_process("vp_linear")
    denoiser = GaussianDenoiser(process, MEAN, VARIANCE)
    plan = make_plan(solver, process=process, num_inference_steps=20, t_start=0.9, **options)
    count = 20_000
    end = run_plan(plan, denoiser, start(process, 1.0, count=count))
    mean, variance = (torch.from_numpy(moment) for moment in moments_at_end(plan, NORMAL))
    assert ((end.mean(0) - mean).abs() < 4 * (variance / count).sqrt()).all()
    assert ((end.var(0) / variance - 1).abs() < 4 * (2 / count) ** 0.5).all()


@settings(max_examples=300, deadline=None)
@given(
    solver=st.sampled_from(solver_names()),
    process_name=st.sampled_from(process_names()),
    steps=st.integers(1, 12),
    spacing=st.sampled_from([None, *spacings()]),
    lower_order_final=st.booleans(),
    t_start=st.sampled_from([None, 1.0, 0.8]),
)
def test_every_plan_is_finite_and_ends_on_the_estimate(
    solver, process_name, steps, spacing, lower_order_final, t_start
):
    """At sigma = 0 nothing of the noise remains: the last row gives x0 itself (and with a perfect x0, the truth)."""
    process, entry = make_process(process_name), solver_entry(solver)
    steps = max(steps, entry.min_steps)
    options = {"lower_order_final": lower_order_final} if "lower_order_final" in entry.options else {}
    options |= needed_options(solver)
    if "last_step" in entry.options:
        options["last_step"] = "tweedie"  # the default, SiT's, leaves what its drift does not reach
    arguments = {"process": process, "num_inference_steps": steps, "spacing": spacing, "t_start": t_start, **options}
    if entry.in_t and process_name.endswith(("discrete", "zero_snr")):
        with pytest.raises(UserError, match=f"process '{process_name}' is a table of steps"):
            make_plan(solver, **arguments)
        return
    plan = make_plan(solver, **arguments)
    assert steps <= plan.num_calls <= entry.calls_per_step * steps
    assert np.isfinite(plan.matrices).all()
    assert (np.diff(plan.times) <= 0).all()
    assert plan.next_times[-1] == 0.0
    truth = torch.full((2, 3), 0.25, dtype=torch.float64)
    x = rng.normal((3,), seed=torch.arange(2), purpose="x", dtype=torch.float64)
    end = run_plan(plan, lambda x, t, cond=None: truth, x)
    if solver != "lcm":  # whose boundary weights keep some 1e-7 of x
        torch.testing.assert_close(end, truth, rtol=0, atol=1e-9)


def test_dpmpp_2m_row_is_the_published_formula():
    process = make_process("vp_cosine")
    plan = make_plan("dpmpp_2m", process=process, num_inference_steps=8, spacing="time", t_start=0.9, t_end=0.2)
    t = torch.tensor([*plan.times, 0.2], dtype=torch.float64)
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.log_snr(t)
    h, h_last = lam[4] - lam[3], lam[3] - lam[2]
    r = h_last / h
    weight = -alpha[4] * torch.expm1(-h)
    expected = [sigma[4] / sigma[3], -weight / (2 * r), weight * (1 + 1 / (2 * r)), 0.0]  # x, h1, x0, z
    np.testing.assert_allclose(plan.matrices[3, 0], [float(e) for e in expected], rtol=1e-12)


def test_noise_of_a_trajectory_depends_on_its_seed_alone():
    process = make_process("vp_linear")
    denoiser = GaussianDenoiser(process, MEAN, VARIANCE)
    plan = make_plan("ddpm", process=process, num_inference_steps=10)
    seeds = torch.tensor([7, 8, 9])
    x = start(process, 1.0, count=3)
    together = run_plan(plan, denoiser, x, seeds=seeds)
    for i in range(3):
        assert torch.equal(run_plan(plan, denoiser, x[i : i + 1], seeds=seeds[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "dpmpp2m"}, "did you mean 'dpmpp_2m'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"spacing": "lamda"}, "did you mean 'lambda'"),
        ({"eta": 1.0}, "'eta' has no effect on solver 'dpmpp_2m'"),
        ({"t_start": 0.1, "t_end": 0.5}, "t_end < t_start"),
        ({"num_inference_steps": 1}, "num_inference_steps=1: solver 'dpmpp_2m' needs at least 2"),
        ({"lower_order_finale": True}, "did you mean 'lower_order_final'"),
        ({"lower_order_final": 3}, "lower_order_final=3 must be True or False"),
        ({"solver_type": "middle"}, "unknown solver_type 'middle'"),
        ({"solver_type": 3}, "solver_type=3 must be a name"),
        ({"name": "ddim", "eta": "much"}, "eta='much' must be a number"),
        ({"name": "ddim", "eta": True}, "eta=True must be a number"),
        ({"name": "edm_heun", "s_tmax": float("nan")}, "s_tmax=nan must be a number"),
        ({"t_start": "early"}, "t_start='early' must be a number"),
        ({"shift": [3.0]}, r"shift=\[3.0\] must be a number"),
        ({"times": "late"}, "times='late' must be two or more numbers"),
        ({"times": 0.5, "num_inference_steps": None}, "times=0.5 must be two or more numbers"),
        ({"name": 7}, "unknown solver 7"),
        ({"name": "unipc_2", "bh": "bh3"}, "unknown bh 'bh3'"),
        ({"name": "ddpm", "variance": "larg"}, "did you mean 'large'"),
        ({"name": "ddim", "eta": 1.5}, "eta=1.5 must lie in 0 .. 1"),
        ({"name": "edm_heun", "s_churn": -1.0}, "s_churn=-1.0 must be at least 0"),
        ({"name": "edm_heun", "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmax=1.0 must be at least s_tmin=2.0"),
        ({"name": "sde_euler", "diffusion": "sigmas"}, "did you mean 'sigma'"),
        ({"name": "sde_euler", "last_step": "none"}, "unknown last_step 'none'"),
        ({"name": "sde_euler", "last_step_size": 0.0}, "last_step_size=0.0"),
        ({"name": "sde_euler", "diffusion_scale": -1.0}, "diffusion_scale=-1.0"),
        (
            {"name": "sde_euler", "diffusion": "sbdm", "process": make_process("rectified_flow"), "t_start": 1.0},
            "no bound at pure noise: t_start=1.0",
        ),
        ({"name": "flow_heun", "process": make_process("vp_cosine_discrete")}, "process 'vp_cosine_discrete'"),
    ],
)
def test_bad_plans_are_refused(arguments, says):
    arguments = {"name": "dpmpp_2m", "num_inference_steps": 5, "process": make_process("vp_linear"), **arguments}
    with pytest.raises(UserError, match=says):
        make_plan(arguments.pop("name"), **arguments)


def test_wrong_seeds_are_refused():
    process = make_process("vp_linear")
    plan = make_plan("ddim", process=process, num_inference_steps=2)
    with pytest.raises(UserError, match="one seed a sample"):
        run_plan(plan, lambda x, t, cond=None: x, torch.zeros(2, 2), seeds=torch.arange(3))


def test_singlestep_calls_are_shared_out_as_in_the_official_code():
    assert [step_orders(n, 3, True) for n in (3, 4, 5, 9)] == [[2, 1], [3, 1], [3, 2], [3, 3, 2, 1]]
    assert [step_orders(n, 2, True) for n in (2, 3)] == [[2], [2, 1]]
    assert [step_orders(n, 3, False) for n in (5, 6)] == [[2, 3], [3, 3]]


DETERMINISTIC = [name for name in solver_names() if solver_entry(name).kind == "ode"]


@pytest.mark.parametrize("solver", [name for name in DETERMINISTIC if solver_entry(name).order > 1])
def test_every_higher_order_solver_can_end_at_lower_order(solver):
    common = {"process": make_process("vp_cosine"), "num_inference_steps": 6, "t_end": 0.1, **needed_options(solver)}
    plans = [make_plan(solver, lower_order_final=lower, **common) for lower in (False, True)]
    full, lowered = (plan.orders[-1] for plan in plans)
    assert lowered < full or solver in ("dpm_solver_2", "dpmpp_2s")  # 6 calls are 3 whole steps of order 2
    assert full >= 2
