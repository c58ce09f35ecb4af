"""The loop that runs plans: mixed batches, per-element and learned coefficients, noise before the first call."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import rng
from smalti.diffusion import make_process
from smalti.errors import UserError
from smalti.sampling import PlanDraft, make_plan, run_plan, run_plans
from smalti.sampling.explain import plan_table
from smalti.types import Condition

PROCESS = make_process("vp_linear")
DENOISER = GaussianDenoiser(PROCESS, torch.tensor([0.7, -0.3]).double(), torch.tensor([0.09, 0.5]).double())
FLOW = make_process("rectified_flow")
PLANS = [
    make_plan("ddim", process=PROCESS, num_inference_steps=3),
    make_plan("dpmpp_2m", process=PROCESS, num_inference_steps=7),
    make_plan("ddpm", process=PROCESS, num_inference_steps=5),
    make_plan("edm_heun", process=PROCESS, num_inference_steps=4, s_churn=3.0, t_start=0.8),
    make_plan("unipc_3", process=PROCESS, num_inference_steps=6),
    make_plan("dpmpp_3s", process=PROCESS, num_inference_steps=8),
]
LEARNED = make_plan("ddpm", process=PROCESS, num_inference_steps=6, variance="learned")


def noise(rows, purpose="test"):
    return rng.normal((2,), seed=torch.arange(rows), purpose=purpose, dtype=torch.float64)


class Labelled:
    """A denoiser whose estimate depends on the row's label; remembers the rows it was asked for."""

    def __init__(self):
        self.asked = []
        self.calls = 0

    def for_rows(self, rows):
        self.asked.append(rows.tolist())
        return lambda x, t, cond: self(x, t, cond)

    def __call__(self, x, t, cond):
        self.calls += 1
        return DENOISER(x, t) + cond.class_labels[:, None]


@settings(max_examples=25, deadline=None)
@given(choice=st.lists(st.integers(0, len(PLANS) - 1), min_size=1, max_size=9), seed=st.integers(0, 100))
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(choice, seed):
    rows = len(choice)
    x, seeds = noise(rows), torch.arange(rows) + seed
    labels = torch.arange(rows) % 3
    denoiser, done = Labelled(), []
    plans = [PLANS[i] for i in choice]
    cond = Condition(class_labels=labels)
    together = run_plans(plans, denoiser.for_rows, x, cond, seeds, lambda *tick: done.append(tick))
    longest = max(plan.num_calls for plan in plans)
    assert denoiser.calls == longest  # one network call a tick for all rows
    assert done == [(tick + 1, longest) for tick in range(longest)]
    assert sorted(denoiser.asked[0]) == list(range(rows))
    for i, plan in enumerate(plans):
        one = slice(i, i + 1)
        alone = run_plan(plan, Labelled(), x[one], Condition(class_labels=labels[one]), seeds[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_per_element_coefficients_are_added_to_the_table():
    draft = PlanDraft("test", PROCESS, ("x", "h1"))
    x, x0, h1 = draft.symbols("x", "x0", "h1")
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    draft.call(0.5, 0.4, 1, x=0.5 * x, h1=x0)
    draft.add_element("x", "x0", weights)
    draft.call(0.4, 0.0, 1, x=x + h1)
    draft.add_element("x", "h1", weights)
    plan, start = draft.finish(), noise(3)
    middle = 0.5 * start + weights * start.cos()
    expected = middle + (1 + weights) * start.cos()
    end = run_plan(plan, lambda x, t, cond: start.cos() if t[0] == 0.5 else x, start)
    torch.testing.assert_close(end, expected)
    assert "+c x0" in _printed(plan)


class Learned:
    def __init__(self, logit):
        self.logit = logit

    def __call__(self, x, t, cond=None):
        return DENOISER(x, t)

    def with_variance(self, x, t, cond=None):
        return DENOISER(x, t), torch.full_like(x, self.logit)


@pytest.mark.parametrize(("logit", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(logit, variance):
    x = noise(4)
    fixed = make_plan("ddpm", process=PROCESS, num_inference_steps=6, variance=variance)
    torch.testing.assert_close(run_plan(LEARNED, Learned(logit), x), run_plan(fixed, DENOISER, x))
    # A batch-mate with another plan is asked for its variance too, and makes nothing of it.
    mixed = run_plans([LEARNED, PLANS[1], LEARNED, PLANS[0]], lambda rows: Learned(logit), x)
    torch.testing.assert_close(mixed[[0, 2]], run_plan(fixed, DENOISER, x)[[0, 2]])
    torch.testing.assert_close(mixed[1:2], run_plan(PLANS[1], DENOISER, x[1:2]))


def test_churn_is_the_published_algorithm():
    """Karras et al. 2022, algorithm 2, written out in x / alpha; the first step's noise comes from start_row."""
    steps, s_churn, s_tmin, s_tmax, s_noise = 6, 1.5, 0.05, 5.0, 1.003
    plan = make_plan(
        "edm_heun", process=PROCESS, num_inference_steps=steps, t_start=0.5,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip
    assert plan.start_row is not None

    def level(t):
        return torch.exp(-PROCESS.log_snr(torch.tensor(t, dtype=torch.float64)))

    def estimate(y, s):
        t = PROCESS.t_of_log_snr(-s.log()).expand(len(y))
        return DENOISER(PROCESS.alpha(t)[:, None] * y, t)

    high, low = level(0.5) ** (1 / 7), level(PROCESS.t_min) ** (1 / 7)
    levels = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [torch.zeros(()).double()]
    x = noise(4)
    y, call = x / PROCESS.alpha(torch.tensor(0.5, dtype=torch.float64)), 0
    for i, (s, s_next) in enumerate(pairwise(levels)):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
        s_hat = s * (1 + gamma)
        # A step's noise is folded into the call before it: it has that call's address, the first one its own.
        purpose, at = ("sampling/churn", 0) if i == 0 else ("sampling/step", call - 1)
        z = rng.normal((2,), seed=torch.arange(4), purpose=purpose, call=at, dtype=torch.float64)
        y_hat = y + torch.sqrt(s_hat**2 - s**2) * s_noise * z if gamma else y
        slope = (y_hat - estimate(y_hat, s_hat)) / s_hat
        y = y_hat + (s_next - s_hat) * slope
        call += 1
        if s_next > 0:
            y = y_hat + (s_next - s_hat) * (slope + (y - estimate(y, s_next)) / s_next) / 2
            call += 1
    torch.testing.assert_close(run_plan(plan, DENOISER, x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
@pytest.mark.parametrize("heun", [False, True])
def test_interpolant_sde_is_that_of_sit(heun, last_step):
    """SiT's sampler in its own time tau = 1 - t, with diffusion "sigma": drift v + sigma score, Heun's noise first."""
    steps, size = 9, 0.04
    denoiser = GaussianDenoiser(FLOW, DENOISER.mean, DENOISER.variance)
    name = "sde_heun" if heun else "sde_euler"
    plan = make_plan(name, process=FLOW, num_inference_steps=steps, last_step=last_step)

    def parts(x, tau):
        """Velocity dx/dtau, score and estimate of x = tau x0 + (1 - tau) eps."""
        x0 = denoiser(x, (1 - tau).expand(len(x)))
        eps = (x - tau * x0) / (1 - tau)
        return x0 - eps, -eps / (1 - tau), x0

    def drift(x, tau):
        v, score, _ = parts(x, tau)
        return v + (1 - tau) * score

    x = start = noise(4)
    taus = torch.linspace(0, 1 - size, steps, dtype=torch.float64)
    for i, (tau, after) in enumerate(pairwise(taus)):
        purpose, at = ("sampling/churn", 0) if heun and i == 0 else ("sampling/step", 2 * i - 1 if heun else i)
        z = rng.normal((2,), seed=torch.arange(4), purpose=purpose, call=at, dtype=torch.float64)
        dt = after - tau
        kick = torch.sqrt(2 * (1 - tau) * dt) * z
        if heun:
            x = x + kick
            k1 = drift(x, tau)
            x = x + dt / 2 * (k1 + drift(x + dt * k1, after))
        else:
            x = x + dt * drift(x, tau) + kick
    v, _, x0 = parts(x, taus[-1])
    x = {"mean": x + size * drift(x, taus[-1]), "tweedie": x0, "euler": x + size * v}[last_step]
    torch.testing.assert_close(run_plan(plan, denoiser, start), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("constant", lambda tau, c: c),
        ("sbdm", lambda tau, c: c * ((1 - tau) ** 2 / tau + (1 - tau))),  # (alpha'/alpha) sigma^2 - sigma sigma'
        ("sigma", lambda tau, c: c * (1 - tau)),
        ("linear", lambda tau, c: c * (1 - tau)),
        ("decreasing", lambda tau, c: 0.25 * (c * math.cos(math.pi * tau) + 1) ** 2),
        ("increasing-decreasing", lambda tau, c: c * math.sin(math.pi * tau) ** 2),
    ],
)
def test_diffusion_forms_are_those_of_sit(form, expected):
    plan = make_plan("sde_euler", process=FLOW, times=[0.8, 0.3, 0.1], diffusion=form, diffusion_scale=0.7)
    diffusions = plan.matrices[:, 0, -1] ** 2 / (2 * (plan.times - plan.next_times))
    np.testing.assert_allclose(diffusions, [expected(1 - t, 0.7) for t in plan.times], rtol=1e-12)


def test_lcm_weighs_its_estimate_by_the_published_boundary_conditions():
    """c_skip = 1 at DDPM's step 0, and 0.25 / (q^2 + 0.25) with q = 10 at step 1."""
    process = make_process("vp_linear_discrete")
    plan = make_plan("lcm", process=process, times=[0.002, 0.001, 0.0])
    alpha, sigma = process.alpha(torch.tensor(0.001).double()), process.sigma(torch.tensor(0.001).double())
    c_skip, c_out = 0.25 / 100.25, 10 / math.sqrt(100.25)
    first = [float(alpha) * c_skip, float(alpha) * c_out, float(sigma)]
    np.testing.assert_allclose(plan.matrices[:, 0], [first, [1.0, 0.0, 0.0]], atol=1e-12)


def test_consistency_sampling_puts_the_published_noise_back():
    """Song et al. 2023, algorithm 1: x0 + sqrt(tau^2 - eps^2) z, in x / alpha."""
    plan = make_plan("consistency", process=PROCESS, times=[0.9, 0.3, 0.0])
    t, least = torch.tensor([0.3, PROCESS.t_min], dtype=torch.float64)
    put_back = torch.sqrt(torch.exp(-2 * PROCESS.log_snr(t)) - torch.exp(-2 * PROCESS.log_snr(least)))
    alpha = PROCESS.alpha(t)
    expected = [[[0.0, float(alpha), float(alpha * put_back)]], [[0.0, 1.0, 0.0]]]
    np.testing.assert_allclose(plan.matrices, expected, rtol=1e-12)


def _printed(plan):
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    return console.export_text()


def test_every_kind_of_plan_can_be_printed():
    assert "before the first call: x <- " in _printed(PLANS[3])
    assert "z v" in _printed(LEARNED)
    assert "+c" not in _printed(PLANS[1])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: run_plan(PLANS[0], DENOISER, x.index_fill(0, torch.tensor([1]), float("nan"))), "x has entries"),
        (lambda x: run_plan(PLANS[0], DENOISER, x / 0), "x has entries that are NaN or infinite"),
        (lambda x: run_plan(PLANS[0], DENOISER, x.long()), "x has shape .* dtype torch.int64"),
        (lambda x: run_plan(PLANS[0], DENOISER, x, seeds=torch.arange(3)), "seeds has .*one seed a sample"),
        (lambda x: run_plan(PLANS[0], DENOISER, x, seeds=torch.ones(4)), "seeds has .*torch.float32"),
        (lambda x: run_plans(PLANS[:3], lambda rows: DENOISER, x), "plans has 3 entries for 4 rows"),
        (lambda x: run_plan(LEARNED, DENOISER, x), "GaussianDenoiser has no with_variance"),
    ],
)  # fmt: skip
def test_wrong_starts_are_refused(call, says):
    with pytest.raises(UserError, match=says):
        call(noise(4))


def test_an_empty_batch_is_no_mistake():
    assert run_plan(PLANS[0], DENOISER, noise(4)[:0]).shape == (0, 2)
