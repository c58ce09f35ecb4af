"""DPM-Solver-v3 and the statistics it reads, against exact scores, closed forms and the solver it degenerates to."""

import math

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser, MixtureDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import rng
from smalti.diffusion import make_process
from smalti.sampling import make_plan, run_plan
from smalti.sampling.ems import EMS, ems_integrals, estimate_ems, flat_ems, load_ems, save_ems
from smalti.types import UserError

PLANE = torch.tensor([[0.9, 0.2], [-0.5, 0.6], [0.1, -0.8]], dtype=torch.float64)
T_START, T_END = 0.95, 0.05


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Small tensors and many calls: a second thread is only waited for."""
    torch.set_num_threads(1)


def statistics(denoiser, x0, **options):
    options = {"t_start": T_START, "t_end": T_END, "num_nodes": 120, "batch_size": 4096, **options}
    return estimate_ems(lambda rows: denoiser, denoiser.process, x0, **options)


def plan_of(name, process, steps, **options):
    return make_plan(name, process=process, num_inference_steps=steps, t_start=T_START, t_end=T_END, **options)


def slope(errors):
    """Fitted order from errors at steps n, 2n, 4n, ..."""
    return -np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0]


def start(count=16):
    return rng.normal((2,), seed=torch.arange(count), purpose="test", dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture():
    """A mixture, its statistics on a fine grid, starts and the flow's ends."""
    torch.set_num_threads(1)
    process = make_process("vp_linear")
    denoiser = MixtureDenoiser(process, PLANE, 0.4)
    ems = statistics(denoiser, denoiser.sample(0.0, torch.arange(1024)), num_nodes=400)
    x = denoiser.sample(T_START, torch.arange(64) + 10_000)
    truth = run_plan(plan_of("flow_rk4", process, 400, spacing="lambda"), denoiser, x)
    return denoiser, ems, x, truth


def error(mixture, steps, name="dpm_solver_v3", **options):
    denoiser, ems, x, truth = mixture
    if name == "dpm_solver_v3":
        options = {"ems": ems, **options}
    plan = plan_of(name, denoiser.process, steps, **options)
    return float((run_plan(plan, denoiser, x) - truth).square().mean().sqrt())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_halving_the_step_divides_the_error_by_two_to_the_order(mixture, order):
    options = {"order": order, "corrector": False, "lower_order_final": False}
    errors = [error(mixture, steps, **options) for steps in (80, 160, 320)]
    assert abs(slope(errors) - order) < 0.15 * order, (slope(errors), errors)


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_orders_with_statistics_that_have_no_kinks(mixture, order, corrector):
    """Any l, s and b are right in the limit. The corrector's errors fall below what the kinks of statistics that are
    linear between 400 nodes leave (5e-7 at order 3), so its order is seen with constants,
    right at high noise, where the first steps are of lower order."""
    process = mixture[0].process
    values = torch.tensor([[1.0, 0.98], [1.0, 0.8], [0.17, 0.0]], dtype=torch.float64)
    ems = EMS(process.name, flat_ems(process).log_snrs, *(row.expand(2, 2) for row in values))
    options = {"order": order, "corrector": corrector, "lower_order_final": False, "ems": ems}
    errors = [error(mixture, steps, **options) for steps in (80, 160, 320)]
    assert abs(slope(errors) - order) < 0.15 * order, (slope(errors), errors)


def test_fewer_calls_than_2m_need(mixture):
    """What the statistics are for. Measured at 5, 6, 8 steps: 2M 0.133, 0.094, 0.047; v3 0.026, 0.016, 0.007."""
    for steps in (5, 8):
        reference = error(mixture, steps, "dpmpp_2m")
        assert error(mixture, steps, order=2) < 0.3 * reference
        assert error(mixture, steps, order=3) < 0.3 * reference
        assert error(mixture, steps, order=2, corrector=False) < 0.6 * reference


def test_averaged_statistics_do_as_well_where_the_elements_are_alike(mixture):
    denoiser, ems, x, truth = mixture
    plan = plan_of("dpm_solver_v3", denoiser.process, 8, ems=ems.averaged())
    assert not plan.elements
    assert float((run_plan(plan, denoiser, x) - truth).square().mean().sqrt()) < 0.5 * error(mixture, 8, "dpmpp_2m")


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_linear", "edm"])
def test_flat_statistics_give_dpm_solver_pp(process_name):
    """l = 1, s = b = 0. The history holds f = -x0, so those columns change sign."""
    process = make_process(process_name)
    t_start, t_end = process.t_of_log_snr(torch.tensor([-2.5, 2.5], dtype=torch.float64)).tolist()
    common = {"process": process, "num_inference_steps": 8, "spacing": "lambda", "t_start": t_start, "t_end": t_end}
    common["lower_order_final"] = False
    flat = {"ems": flat_ems(process), "corrector": False}
    signs = np.array([1.0, -1.0, -1.0])
    pairs = [
        (1, 0, make_plan("ddim", **{k: v for k, v in common.items() if k != "lower_order_final"})),
        (2, 1, make_plan("dpmpp_2m", solver_type="heun", **common)),
        (3, 2, make_plan("dpmpp_3m", **common)),
    ]
    for order, first, reference in pairs:
        plan = make_plan("dpm_solver_v3", order=order, **flat, **common)
        assert not plan.elements
        assert not plan.offsets
        ours = plan.matrices[first:, 0].copy()
        ours[:, :order] *= signs[:order]
        np.testing.assert_allclose(ours, reference.matrices[first:, 0], rtol=0, atol=1e-11)


def gaussian(process_name):
    mean, variance = torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64)
    return GaussianDenoiser(make_process(process_name), mean, variance)


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_cosine", "edm"])
def test_statistics_of_a_gaussian_are_the_closed_form(process_name):
    """f = -l mean is the same for all samples: l = sigma^2 / (alpha^2 variance + sigma^2), s = 0, b = -l' mean."""
    denoiser = gaussian(process_name)
    process = denoiser.process
    x0 = denoiser.mean + denoiser.variance.sqrt() * start(64)
    t_start, t_end = process.t_of_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    ems = statistics(denoiser, x0, t_start=t_start, t_end=t_end, num_nodes=200)
    expected = 1 / (1 + torch.exp(2 * ems.log_snrs)[:, None] * denoiser.variance)
    torch.testing.assert_close(ems.l, expected, rtol=0, atol=1e-10)
    assert not ems.s.any()
    torch.testing.assert_close(ems.b, 2 * expected * (1 - expected) * denoiser.mean, rtol=0, atol=1e-3)


def test_a_linear_score_is_solved_exactly_at_first_order():
    """The linear part is all there is; left is how far l, known at 200 nodes, is from linear between them."""
    denoiser = gaussian("vp_linear")
    x0 = denoiser.mean + denoiser.variance.sqrt() * start(64)
    ems = statistics(denoiser, x0, num_nodes=200)
    x = denoiser.process.sigma(torch.tensor(T_START, dtype=torch.float64)) * start()
    exact = denoiser.exact_flow(x, T_START, T_END)

    def gap(name, **options):
        return float((run_plan(plan_of(name, denoiser.process, 3, **options), denoiser, x) - exact).abs().max())

    assert gap("dpm_solver_v3", ems=ems, order=1) < 1e-3 * gap("ddim", spacing="lambda")


def test_s_and_b_are_the_line_through_f_and_its_rate():
    """By brute force: f at x and a little later on the flow, and a fitted line, element by element."""
    process = make_process("rectified_flow")
    denoiser = MixtureDenoiser(process, PLANE, 0.4)
    x0 = denoiser.sample(0.0, torch.arange(512))
    ems = statistics(denoiser, x0, num_nodes=200, seed=3)
    node, width = 100, 1e-3
    log_snr = float(ems.log_snrs[node])
    z = rng.normal((2,), seed=3, purpose="ems/noise", index=torch.arange(512), dtype=torch.float64)
    t, before, after = process.t_of_log_snr(torch.tensor([log_snr, log_snr - width, log_snr + width]).double()).tolist()
    at = torch.full((1,), t, dtype=torch.float64)
    x = process.alpha(at) * x0 + process.sigma(at) * z

    def f(t_then):
        moved = x
        if t_then != t:
            # A tenth of lambda's width is far below the fit's own error; either direction of the flow.
            moved = rk4(denoiser, x, log_snr, float(process.log_snr(torch.tensor(t_then, dtype=torch.float64))))
        then = torch.full((len(x),), t_then, dtype=torch.float64)
        l = ems.at(process.log_snr(then[:1]))[0]  # noqa: E741
        return (1 - l) * moved / process.alpha(then)[:, None] - denoiser(moved, then)

    rate = (f(after) - f(before)) / (2 * width)
    for i in range(2):
        slope_i, at_zero = np.polyfit(f(t)[:, i].numpy(), rate[:, i].numpy(), 1)
        assert abs(slope_i - float(ems.s[node, i])) < 2e-3
        assert abs(at_zero - float(ems.b[node, i])) < 2e-3


def rk4(denoiser, x, log_snr, end):
    """One Runge-Kutta step of dy/dlambda = x0 - y from lambda = log_snr to end, x = alpha y."""
    process = denoiser.process

    def at(value):
        return process.t_of_log_snr(torch.full((len(x),), value, dtype=torch.float64))

    def rate(y, value):
        return denoiser(process.alpha(at(value))[:, None] * y, at(value)) - y

    h, y = end - log_snr, x / process.alpha(at(log_snr))[:, None]
    k1 = rate(y, log_snr)
    k2 = rate(y + h / 2 * k1, log_snr + h / 2)
    k3 = rate(y + h / 2 * k2, log_snr + h / 2)
    k4 = rate(y + h * k3, end)
    return process.alpha(at(end))[:, None] * (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


@settings(max_examples=50, deadline=None)
@given(
    l=st.floats(-1, 2), s=st.floats(0.1, 3), b=st.floats(-2, 2), begin=st.floats(-6, 5), length=st.floats(0.01, 4)
)  # fmt: skip
def test_integrals_of_constant_statistics_are_the_closed_forms(l, s, b, begin, length):  # noqa: E741
    constants = [torch.full((5,), value, dtype=torch.float64) for value in (l, s, b)]
    ems = EMS("vp_linear", torch.linspace(-3, 3, 5, dtype=torch.float64), *constants)
    found = ems_integrals(ems, begin, begin + length, 2)
    k = l + s

    def grown(rate):  # the integral of e^(rate u)
        return length if abs(rate) < 1e-12 else math.expm1(rate * length) / rate

    scale = math.exp(max(k, 0) * length)
    assert float(found.L) == pytest.approx(l * length, abs=1e-9)
    assert float(found.S) == pytest.approx(s * length, abs=1e-9)
    assert float(found.B) == pytest.approx(-b * math.expm1(-s * length) / s, abs=1e-8)
    assert float(found.E[0]) == pytest.approx(grown(k), abs=1e-8 * scale)
    if abs(k) > 1e-2:
        weighted = (length * math.exp(k * length) - grown(k)) / k
        assert float(found.E[1]) == pytest.approx(weighted, abs=1e-8 * scale)
    assert float(found.C) == pytest.approx(b / s * (grown(k) - grown(l)), abs=1e-7 * scale)


def test_a_plan_into_data_and_from_pure_noise_ends_on_a_constant_estimate():
    process = make_process("rectified_flow")
    truth = torch.full((2, 3), 0.25, dtype=torch.float64)
    x = rng.normal((3,), seed=torch.arange(2), purpose="x", dtype=torch.float64)
    for order in (1, 2, 3):
        plan = make_plan(
            "dpm_solver_v3", process=process, num_inference_steps=6, t_start=1.0, ems=flat_ems(process), order=order
        )
        assert plan.num_calls == 6
        assert plan.next_times[-1] == 0.0
        torch.testing.assert_close(run_plan(plan, lambda x, t, cond=None: truth, x), truth, rtol=0, atol=1e-9)


def test_statistics_are_read_back_as_written(mixture, tmp_path):
    denoiser, ems, _, _ = mixture
    save_ems(ems, tmp_path / "ems.npz")
    again = load_ems(tmp_path / "ems.npz")
    assert again.process == ems.process
    for name in ("log_snrs", "l", "s", "b"):
        assert torch.equal(getattr(again, name), getattr(ems, name))
    by_path = plan_of("dpm_solver_v3", denoiser.process, 4, ems=str(tmp_path / "ems.npz"))
    assert np.array_equal(by_path.matrices, plan_of("dpm_solver_v3", denoiser.process, 4, ems=ems).matrices)


def test_statistics_do_not_depend_on_the_batch_size():
    denoiser = MixtureDenoiser(make_process("vp_linear"), PLANE, 0.4)
    x0 = denoiser.sample(0.0, torch.arange(50))
    one, other = (statistics(denoiser, x0, num_nodes=6, batch_size=size) for size in (50, 7))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "ems is missing.*smalti ems RUN"),
        ({"ems": "nowhere.npz"}, "nowhere.npz.*smalti ems"),
        ({"ems": flat_ems(make_process("edm"))}, "ems is of process 'edm'"),
        ({"ems": 3}, "ems=3 must be an EMS"),
        ({"ems": flat_ems(make_process("vp_linear")), "order": 4}, "order=4 must be 1, 2 or 3"),
        ({"ems": flat_ems(make_process("vp_linear")), "order": 3}, "num_inference_steps=2.*at least 3"),
        ({"ems": flat_ems(make_process("vp_linear")), "pseudo": 1}, "pseudo=1 must be True or False"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(UserError, match=says):
        make_plan("dpm_solver_v3", process=make_process("vp_linear"), num_inference_steps=2, **options)


def test_a_file_of_something_else_and_samples_of_another_shape_are_refused(mixture, tmp_path):
    denoiser, ems, _, _ = mixture
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not a file of `smalti ems`"):
        load_ems(tmp_path / "other.npz")
    plan = plan_of("dpm_solver_v3", denoiser.process, 4, ems=ems)
    with pytest.raises(UserError, match=r"samples of shape \(3, 2\)"):
        run_plan(plan, lambda x, t, cond=None: x, torch.zeros(1, 3, 2))
