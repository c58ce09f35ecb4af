"""Processes: scales against their closed forms and the published tables, derivatives, inverses, the ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.diffusion import make_process, process_names
from smalti.diffusion.processes import EDM, GVP, Interpolant, LinearInterpolant, cosine_betas, linear_betas
from smalti.errors import UserError

QUARTER_CIRCLE = Interpolant(lambda t: torch.cos(math.pi / 2 * t), lambda t: torch.sin(math.pi / 2 * t))
WITH_GAMMA = Interpolant(lambda t: 1 - t, lambda t: t, lambda t: torch.sqrt(0.5 * t * (1 - t)))
PROCESSES = {
    **{name: make_process(name) for name in process_names()},
    "interpolant, gamma": make_process("interpolant", gamma_scale=0.5),
    "own interpolant": QUARTER_CIRCLE,
    "own interpolant, gamma": WITH_GAMMA,
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def inside(process, count=64):
    return torch.linspace(process.t_min, process.t_max, count + 2, dtype=torch.float64)[1:-1]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@every_process
def test_derivatives_are_those_of_alpha_and_sigma(process):
    t = inside(process)
    step = 1e-6  # far below a table's 1e-3, and no node of a table lies within it
    for value, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        slope = (value(t + step) - value(t - step)) / (2 * step)
        torch.testing.assert_close(derivative(t), slope, rtol=1e-5, atol=1e-7)


@every_process
def test_log_snr_falls_and_inverts(process):
    t = inside(process)
    log_snr = process.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(process.t_of_log_snr(log_snr), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.t_of_log_snr(log_snr.float()), t.float(), rtol=2e-3, atol=1e-5)


@every_process
def test_log_snr_beyond_the_ends_gives_the_ends(process):
    t = process.t_of_log_snr(float64(math.inf, -math.inf, 50.0, -50.0))
    assert ((t >= 0) & (t <= 1)).all()
    torch.testing.assert_close(t[:2], float64(0.0, 1.0), rtol=0, atol=1e-12)


@every_process
def test_the_data_end_is_clean_and_dtypes_are_kept(process):
    t = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(process.alpha(t), torch.ones_like(t))
    assert torch.equal(process.sigma(t), t)
    assert process.log_snr(t).isposinf().all()
    for dtype in (torch.float32, torch.float64):
        t = inside(process).to(dtype)
        methods = (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot, process.log_snr)
        for method in (*methods, process.network_time, process.t_of_log_snr):
            assert method(t).dtype == dtype
            assert method(t).isfinite().all()


@every_process
def test_scales_are_finite_at_pure_noise(process):
    t = float64(1.0)
    for method in (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot, process.network_time):
        assert method(t).isfinite().all(), method


def test_which_processes_reach_pure_noise():
    exact = {name for name in process_names() if float(make_process(name).alpha(float64(1.0))) == 0.0}
    assert exact == {"rectified_flow", "gvp", "interpolant", "vp_linear_zero_snr", "vp_cosine_zero_snr"}
    assert {n for n in process_names() if make_process(n).discrete} == {n for n in process_names() if n.count("_") > 1}


@pytest.mark.parametrize("name", [n for n in process_names() if n.startswith("vp") or n == "gvp"])
def test_variance_is_preserved(name):
    process = make_process(name)
    t = inside(process)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize(("name", "betas"), [("linear", linear_betas()), ("cosine", cosine_betas())])
def test_discrete_process_holds_the_published_table(name, betas):
    process = make_process(f"vp_{name}_discrete")
    steps = torch.arange(1000, dtype=torch.float64)
    t = (steps + 1) / 1000
    alpha_bar = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(process.alpha(t) ** 2, alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(process.network_time(t), steps, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "betas"), [("linear", linear_betas()), ("cosine", cosine_betas())])
def test_zero_snr_table_is_diffusers_own(name, betas):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    process = make_process(f"vp_{name}_zero_snr")
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha_bar = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(process.alpha(t) ** 2, alpha_bar, rtol=1e-8, atol=1e-20)
    assert float(process.alpha(t)[-1]) == 0.0
    assert float(process.sigma(t)[-1]) == 1.0
    assert process.log_snr(t)[-1].isneginf()


@pytest.mark.parametrize("name", ["vp_linear_zero_snr", "vp_cosine_zero_snr"])
def test_zero_snr_falls_straight_to_zero_in_its_last_segment(name):
    process = make_process(name)
    t = torch.linspace(0.999, 1.0, 9, dtype=torch.float64)
    expected = process.alpha(t[0]) * torch.linspace(1, 0, 9, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t), expected, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(process.t_of_log_snr(process.log_snr(t)), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.alpha_dot(t[1:]), (-1000 * expected[0]).expand(8), rtol=1e-9, atol=0)


def test_continuous_betas_follow_the_discrete_ones():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for kind in ("linear", "cosine"):
        gap = make_process(f"vp_{kind}").alpha(t) - make_process(f"vp_{kind}_discrete").alpha(t)
        assert gap.abs().max() < 2e-3


def test_an_even_grid_of_edm_is_the_published_ramp():
    process = EDM()
    count = 18
    i = torch.arange(count, dtype=torch.float64)
    # Karras et al. 2022, eq. 5.
    published = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = torch.linspace(1.0, process.t_min, count, dtype=torch.float64)
    torch.testing.assert_close(process.sigma(t), published, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.network_time(t), published.log() / 4, rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(gamma_scale=st.floats(0.0, 4.0), t=st.floats(1e-3, 0.999))
def test_linear_interpolant_has_the_variance_of_its_three_parts(gamma_scale, t):
    process, t = LinearInterpolant(gamma_scale=gamma_scale), float64(t)
    torch.testing.assert_close(process.sigma(t) ** 2, t**2 + gamma_scale * t * (1 - t))
    torch.testing.assert_close(process.t_of_log_snr(process.log_snr(t)), t, rtol=1e-10, atol=0)


def test_linear_interpolant_without_gamma_is_rectified_flow():
    flow, process, t = make_process("rectified_flow"), make_process("interpolant"), torch.linspace(0, 1, 33).double()
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr", "network_time"):
        torch.testing.assert_close(getattr(process, name)(t), getattr(flow, name)(t), rtol=1e-14, atol=1e-15)
    log_snr = torch.linspace(-20, 20, 33, dtype=torch.float64)
    torch.testing.assert_close(process.t_of_log_snr(log_snr), flow.t_of_log_snr(log_snr), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("own", "closed"), [(QUARTER_CIRCLE, GVP()), (WITH_GAMMA, LinearInterpolant(gamma_scale=0.5))], ids=["gvp", "gamma"]
)
def test_own_interpolant_equals_the_closed_form_also_in_inference_mode(own, closed):
    with torch.inference_mode():
        t = torch.linspace(0.01, 1.0, 34, dtype=torch.float64)
        torch.testing.assert_close(own.alpha_dot(t), closed.alpha_dot(t), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(own.sigma_dot(t), closed.sigma_dot(t), rtol=1e-7, atol=1e-8)
        log_snr = torch.linspace(-8, 8, 33, dtype=torch.float64)
        torch.testing.assert_close(own.t_of_log_snr(log_snr), closed.t_of_log_snr(log_snr), rtol=1e-10, atol=1e-15)


def test_own_interpolant_takes_constants():
    exploding = Interpolant(lambda t: torch.ones_like(t), lambda t: 80 * t**7, t_min=0.2, t_max=1.0)
    t = inside(exploding)
    assert torch.equal(exploding.alpha_dot(t), torch.zeros_like(t))
    torch.testing.assert_close(exploding.sigma_dot(t), EDM().sigma_dot(t))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_process("vp_linaer"), "did you mean 'vp_linear'"),
        (lambda: make_process("vp_linear", beta=3.0), "no such option"),
        (lambda: make_process("edm", sigma_min=100.0), "sigma_min=100.0, sigma_max=80.0"),
        (lambda: make_process("edm", rho=0.0), "rho=0.0 must be above 0"),
        (lambda: make_process("interpolant", gamma_scale=-1.0), "gamma_scale=-1.0"),
        (lambda: Interpolant(lambda t: t, lambda t: 1 - t), r"alpha\(0\)=0 must be 1"),
        (lambda: Interpolant(lambda t: 1 - t, lambda t: 1 - t), r"must be 0: t = 0 is the data"),
        (lambda: Interpolant(torch.ones_like, lambda t: torch.sin(math.pi * t)), "must fall in t"),
        (lambda: Interpolant(lambda t: 1 - t, lambda t: -t), "beta.*must be at least 0"),
        (lambda: Interpolant(lambda t: 1 - t, lambda t: t, t_min=0.0), "t_min=0.0"),
    ],
)
def test_errors_name_what_is_wrong(call, says):
    with pytest.raises(UserError, match=says):
        call()
