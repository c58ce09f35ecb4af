"""Processes and predictions: derivatives, inverses, and the one conversion table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.diffusion import convert_prediction, make_process, process_names
from smalti.diffusion.objective import Objective, loss_weight
from smalti.diffusion.prediction import prediction_types, training_target, x0_from_output
from smalti.diffusion.processes import cosine_betas, linear_betas
from smalti.types import UserError

SMOOTH = ["rectified_flow", "vp_linear", "vp_cosine"]


def inside(process, count=64):
    return torch.linspace(process.t_min, process.t_max, count + 2, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_those_of_alpha_and_sigma(name):
    process = make_process(name)
    t = inside(process).requires_grad_(True)
    for value, derivative in ((process.alpha(t), process.alpha_dot(t)), (process.sigma(t), process.sigma_dot(t))):
        (gradient,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", process_names())
def test_log_snr_falls_and_inverts(name):
    process = make_process(name)
    t = inside(process)
    log_snr = process.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(process.t_of_log_snr(log_snr), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in process_names() if n.startswith("vp")])
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


def test_continuous_betas_follow_the_discrete_ones():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for kind in ("linear", "cosine"):
        gap = make_process(f"vp_{kind}").alpha(t) - make_process(f"vp_{kind}_discrete").alpha(t)
        assert gap.abs().max() < 2e-3


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SMOOTH), kinds=st.permutations(prediction_types()), share=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_pair_of_predictions_converts(name, kinds, share, seed):
    process = make_process(name)
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).unbind(0)
    t = torch.full((3,), process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
    x = process.alpha(t)[:, None] * x0 + process.sigma(t)[:, None] * eps
    source, target = kinds[0], kinds[1]
    output = training_target(source, process, t, x0, eps)
    expected = training_target(target, process, t, x0, eps)
    converted = convert_prediction(source, target, process, t, x, output)
    torch.testing.assert_close(converted, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(x0_from_output(source, process, t, x, output), x0, rtol=1e-7, atol=1e-7)


def test_velocity_and_v_are_different_things():
    process = make_process("vp_cosine")
    t = torch.tensor([0.5], dtype=torch.float64)
    x0, eps = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    assert training_target("v", process, t, x0, eps) != training_target("velocity", process, t, x0, eps)


def test_min_snr_weights_are_those_of_its_paper_for_eps():
    process = make_process("vp_cosine")
    t = inside(process)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    weight = loss_weight(Objective("eps", "min_snr", 5.0), process, t)
    torch.testing.assert_close(weight, torch.clamp(snr, max=5.0) / snr)  # Hang et al. 2023, section 3.4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_process("vp_linaer"), "did you mean 'vp_linear'"),
        (lambda: make_process("vp_linear", beta=3.0), "no such option"),
        (
            lambda: training_target(
                "epsilon", make_process("vp_linear"), torch.ones(1), torch.ones(1, 1), torch.ones(1, 1)
            ),
            "unknown prediction_type 'epsilon'",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, says):
    with pytest.raises(UserError, match=says):
        call()
