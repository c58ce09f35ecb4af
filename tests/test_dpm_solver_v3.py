"""DPM-Solver-v3: its orders, the paper's algorithm step by step, the solvers it degenerates to, and what it is for."""

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser, MixtureDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from needed_options import constant_ems
from paper_v3 import paper_v3

from smalti import rng
from smalti.diffusion import make_process
from smalti.errors import UserError
from smalti.sampling import make_plan, run_plan, run_plans
from smalti.sampling.ems import EMS, estimate_ems, save_ems

PLANE = torch.tensor([[0.9, 0.2], [-0.5, 0.6], [0.1, -0.8]], dtype=torch.float64)
PROCESS = make_process("vp_linear")


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Small tensors and many calls: a second thread is only waited for."""
    torch.set_num_threads(1)


def ends(process):
    """t where lambda is -2.5 and 2.5."""
    return process.t_of_log_snr(torch.tensor([-2.5, 2.5], dtype=torch.float64)).tolist()


def plan_of(name, process, steps, **options):
    t_start, t_end = ends(process)
    return make_plan(name, process=process, num_inference_steps=steps, t_start=t_start, t_end=t_end, **options)


def statistics(denoiser, x0, **options):
    t_start, t_end = ends(denoiser.process)
    return estimate_ems(
        lambda rows: denoiser, denoiser.process, x0, t_start=t_start, t_end=t_end, batch_size=4096, **options
    )


def slope(errors):
    """Fitted order from errors at steps n, 2n, 4n, ..."""
    return -np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0]


def noise(count, purpose="test"):
    return rng.normal((2,), seed=torch.arange(count), purpose=purpose, dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture():
    """A mixture, its statistics with the derivative itself, starts and the flow's ends."""
    torch.set_num_threads(1)
    denoiser = MixtureDenoiser(PROCESS, PLANE, 0.4)
    ems = statistics(denoiser, denoiser.sample(0.0, torch.arange(512)), num_nodes=120, secant_width=0)
    x = denoiser.sample(ends(PROCESS)[0], torch.arange(64) + 10_000)
    truth = run_plan(plan_of("flow_rk4", PROCESS, 400, spacing="lambda"), denoiser, x)
    return denoiser, ems, x, truth


def error(mixture, steps, name="dpm_solver_v3", **options):
    denoiser, ems, x, truth = mixture
    if name == "dpm_solver_v3":
        options = {"ems": ems, **options}
    plan = plan_of(name, PROCESS, steps, **options)
    return float((run_plan(plan, denoiser, x) - truth).square().mean().sqrt())


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_orders_with_statistics_measured_on_the_mixture(mixture, order, corrector):
    """tests/test_conformance.py has them with statistics without kinks; order 3 with its corrector needs that, since
    from 50 steps on its error is that of statistics linear between 120 nodes, 2e-6."""
    options = {"order": order, "corrector": corrector, "lower_order_final": False}
    errors = [error(mixture, steps, **options) for steps in (24, 48, 96)]
    assert abs(slope(errors) - (order + corrector)) < 0.15 * (order + corrector), (slope(errors), errors)


def test_fewer_calls_than_2m_need(mixture):
    """What the statistics are for."""
    for steps in (5, 8):
        reference = error(mixture, steps, "dpmpp_2m")
        assert error(mixture, steps, order=2) < 0.3 * reference
        assert error(mixture, steps, order=3) < 0.3 * reference


@pytest.fixture(scope="module")
def arbitrary():
    """Statistics with nothing behind them, of two elements, with kinks between and at the grid's times."""
    values = 0.5 * rng.normal((3, 7, 2), seed=0, purpose="statistics", dtype=torch.float64)[0]
    return EMS(torch.linspace(-3, 3, 7, dtype=torch.float64), *values)


@pytest.mark.parametrize(("pseudo", "lower_order_final"), [(False, False), (True, True)])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_variant_is_the_papers_algorithm(arbitrary, order, corrector, pseudo, lower_order_final):
    """Every point at which the network is called, and the end: the same as from absolute integrals in eps."""
    process = make_process("vp_cosine")
    denoiser = MixtureDenoiser(process, PLANE, 0.4)
    log_snrs = torch.tensor([-2.5, -1.9, -1.0, 0.3, 0.8, 2.0, 2.6], dtype=torch.float64)
    times = process.t_of_log_snr(log_snrs).tolist()
    x = noise(4)
    options = {"order": order, "corrector": corrector, "pseudo": pseudo, "lower_order_final": lower_order_final}
    visited = []

    def watched(x, t, cond=None):
        visited.append(x.clone())
        return denoiser(x, t)

    plan = make_plan("dpm_solver_v3", process=process, times=times, ems=arbitrary, variant="published", **options)
    visited.append(run_plan(plan, watched, x))
    expected = torch.from_numpy(paper_v3(process, denoiser, x, times, arbitrary, **options))
    torch.testing.assert_close(torch.stack(visited), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_linear", "edm"])
def test_statistics_that_know_nothing_give_dpm_solver_pp(process_name):
    """l = 1, s = b = 0. The history holds f = -x0, so those columns change sign."""
    process = make_process(process_name)
    common = {"steps": 8, "spacing": "lambda", "process": process}
    signs = np.array([1.0, -1.0, -1.0])
    pairs = [
        (1, plan_of("ddim", **common)),
        (2, plan_of("dpmpp_2m", solver_type="heun", lower_order_final=False, **common)),
        (3, plan_of("dpmpp_3m", lower_order_final=False, **common)),
    ]
    for order, reference in pairs:
        plan = plan_of(
            "dpm_solver_v3", order=order, ems=constant_ems(), corrector=False, lower_order_final=False, **common
        )
        assert not plan.elements
        assert not plan.offsets
        ours = plan.matrices[order - 1 :, 0].copy()
        ours[:, :order] *= signs[:order]
        np.testing.assert_allclose(ours, reference.matrices[order - 1 :, 0], rtol=0, atol=1e-11)


def test_a_linear_score_is_solved_exactly_at_first_order():
    """The linear part is all there is; left is how far l, known at 120 nodes, is from linear between them."""
    denoiser = GaussianDenoiser(PROCESS, *torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64))
    ems = statistics(denoiser, denoiser.mean + denoiser.variance.sqrt() * noise(64), num_nodes=120)
    x = noise(16)
    exact = denoiser.exact_flow(x, *ends(PROCESS))

    def gap(name, **options):
        plan = plan_of(name, PROCESS, 3, spacing="lambda", **options)
        return float((run_plan(plan, denoiser, x) - exact).abs().max())

    assert gap("dpm_solver_v3", ems=ems, order=1, corrector=False) < 3e-3 * gap("ddim")


def test_statistics_hold_on_every_process_at_equal_log_snr(mixture):
    """In x / alpha and lambda the flow knows no process, and so the solver goes through the same points."""
    _, ems, x, _ = mixture
    log_snrs = torch.linspace(-2.5, 2.5, 6, dtype=torch.float64)
    found = []
    for name in ("vp_linear", "rectified_flow", "edm"):
        process = make_process(name)
        times = process.t_of_log_snr(log_snrs)
        plan = make_plan("dpm_solver_v3", process=process, times=times.tolist(), ems=ems, order=3)
        alpha = process.alpha(times[[0, -1]])
        y = x / PROCESS.alpha(PROCESS.t_of_log_snr(log_snrs[:1]))
        found.append(run_plan(plan, MixtureDenoiser(process, PLANE, 0.4), alpha[0] * y) / alpha[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(
    order=st.integers(1, 3),
    corrector=st.booleans(),
    steps=st.integers(3, 6),
    other_steps=st.integers(3, 6),
    constant=st.booleans(),
)
def test_a_mixed_batch_gives_each_member_what_it_gets_alone(arbitrary, order, corrector, steps, other_steps, constant):
    """Coefficients per element beside others per element, the same for all elements, and another solver."""
    ems = constant_ems(0.9, 0.2, 0.1) if constant else arbitrary
    plans = [
        plan_of("dpm_solver_v3", PROCESS, steps, ems=ems, order=order, corrector=corrector),
        plan_of("unipc_2", PROCESS, other_steps),
        plan_of("dpm_solver_v3", PROCESS, other_steps, ems=arbitrary),
    ]
    denoiser, x = MixtureDenoiser(PROCESS, PLANE, 0.4), noise(6)
    chosen = [plans[i % 3] for i in range(6)]
    together = run_plans(chosen, lambda rows: denoiser, x)
    for i, plan in enumerate(chosen):
        alone = run_plan(plan, denoiser, x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_a_plan_into_data_and_from_pure_noise_ends_on_a_constant_estimate():
    process = make_process("rectified_flow")
    truth = torch.full((2, 3), 0.25, dtype=torch.float64)
    x = rng.normal((3,), seed=torch.arange(2), purpose="x", dtype=torch.float64)
    for order in (1, 2, 3):
        options = {"num_inference_steps": 6, "t_start": 1.0, "ems": constant_ems(), "order": order}
        plan = make_plan("dpm_solver_v3", process=process, **options)
        assert plan.num_calls == 6
        assert plan.next_times[-1] == 0.0
        torch.testing.assert_close(run_plan(plan, lambda x, t, cond=None: truth, x), truth, rtol=0, atol=1e-9)


def test_statistics_may_be_given_as_their_file(arbitrary, tmp_path):
    save_ems(arbitrary, tmp_path / "ems.npz")
    by_path = plan_of("dpm_solver_v3", PROCESS, 4, ems=str(tmp_path / "ems.npz"))
    plan = plan_of("dpm_solver_v3", PROCESS, 4, ems=arbitrary)
    assert np.array_equal(by_path.matrices, plan.matrices)
    assert plan.elements.keys() == by_path.elements.keys()
    assert all(torch.equal(by_path.elements[place], plan.elements[place]) for place in plan.elements)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ems": None}, "ems is missing.*smalti ems RUN"),
        ({"ems": "nowhere.npz"}, "nowhere.npz.*smalti ems"),
        ({"ems": 3}, "ems=3 must be an EMS"),
        ({"order": 4}, "order=4 must be 1, 2 or 3"),
        ({"order": 2.0}, "order=2.0 must be a whole number"),
        ({"order": True}, "order=True must be a whole number"),
        ({"order": 3}, "num_inference_steps=2.*at least 3"),
        ({"pseudo": 1}, "pseudo=1 must be True or False"),
        ({"variant": "publised"}, "did you mean 'published'"),
        ({"ems": constant_ems(s=500.0)}, "ems overflows between lambda=.*s reaches 500"),
        ({"ems": constant_ems(s=-500.0, b=1.0)}, "ems overflows between lambda=.*s reaches 500"),
        ({"ems": constant_ems(b=1e308)}, "ems overflows between lambda="),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(UserError, match=says) as caught:
        make_plan("dpm_solver_v3", process=PROCESS, num_inference_steps=2, **{"ems": constant_ems(), **options})
    assert "\n" not in str(caught.value)


def test_samples_of_another_shape_are_refused(arbitrary):
    plan = plan_of("dpm_solver_v3", PROCESS, 4, ems=arbitrary)
    with pytest.raises(UserError, match=r"samples of shape \(3, 2\).*dpm_solver_v3.*\(2,\)"):
        run_plan(plan, lambda x, t, cond=None: x, torch.zeros(1, 3, 2))
