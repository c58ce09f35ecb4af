"""The empirical model statistics of DPM-Solver-v3, against closed forms, brute force and their own limit."""

import math

import numpy as np
import pytest
import torch
from gaussian import GaussianDenoiser, MixtureDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from needed_options import constant_ems

from smalti import rng
from smalti.diffusion import make_process
from smalti.errors import UserError
from smalti.sampling.ems import EMS, EMSOrigin, _regression, ems_integrals, estimate_ems, load_ems, save_ems

PLANE = torch.tensor([[0.9, 0.2], [-0.5, 0.6], [0.1, -0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Small tensors and many calls: a second thread is only waited for."""
    torch.set_num_threads(1)


def statistics(denoiser, x0, **options):
    t_start, t_end = denoiser.process.t_of_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    options = {"t_start": t_start, "t_end": t_end, "num_nodes": 200, "batch_size": 4096, **options}
    return estimate_ems(lambda rows: denoiser, denoiser.process, x0, **options)


def start(count):
    return rng.normal((2,), seed=torch.arange(count), purpose="test", dtype=torch.float64)


def gaussian(process_name):
    mean, variance = torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64)
    return GaussianDenoiser(make_process(process_name), mean, variance)


@pytest.mark.parametrize("secant_width", [0.0, 0.1])
@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_cosine", "edm"])
def test_statistics_of_a_gaussian_are_the_closed_form(process_name, secant_width):
    """f = -l mean is the same for all samples: l = sigma^2 / (alpha^2 variance + sigma^2), s = 0, b = -l' mean."""
    denoiser = gaussian(process_name)
    x0 = denoiser.mean + denoiser.variance.sqrt() * start(64)
    ems = statistics(denoiser, x0, secant_width=secant_width)
    expected = 1 / (1 + torch.exp(2 * ems.log_snrs)[:, None] * denoiser.variance)
    torch.testing.assert_close(ems.l, expected, rtol=0, atol=1e-10)
    assert not ems.s.any()
    torch.testing.assert_close(ems.b, 2 * expected * (1 - expected) * denoiser.mean, rtol=0, atol=1e-3)


def test_s_and_b_are_the_line_through_f_and_its_rate():
    """By brute force: f at x and a little later on the flow, and a fitted line, element by element."""
    process = make_process("rectified_flow")
    denoiser = MixtureDenoiser(process, PLANE, 0.4)
    x0 = denoiser.sample(0.0, torch.arange(512))
    ems = statistics(denoiser, x0, secant_width=0, shrink=False, seed=3)
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
    found = ems_integrals(constant_ems(l, s, b), begin, begin + length, 2)
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


def test_statistics_are_linear_between_nodes_and_constant_beyond():
    nodes = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
    l, s, b = torch.tensor([[1.0, 3.0, -1.0], [0.0, 2.0, 4.0], [5.0, 5.0, 6.0]], dtype=torch.float64)  # noqa: E741
    ems = EMS(nodes, l, s, b)
    at = torch.tensor([-9.0, -1.0, -0.25, 0.5, 0.75, 9.0], dtype=torch.float64)
    for found, expected in zip(
        ems.at(at), ([1, 1, 2, 3, 1, -1], [0, 0, 1, 2, 3, 4], [5, 5, 5, 5, 5.5, 6]), strict=True
    ):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    # Their integrals go by the kinks: trapezia are exact.
    integrals = ems_integrals(ems, -0.25, 0.75, 1)
    assert float(integrals.L) == pytest.approx(0.75 * 2.5 + 0.25 * 2, abs=1e-12)
    assert float(integrals.S) == pytest.approx(0.75 * 1.5 + 0.25 * 2.5, abs=1e-12)


def test_no_estimate_is_asked_beyond_the_ends():
    denoiser = gaussian("rectified_flow")
    asked = []

    def watched(x, t, cond=None):
        asked.append(float(denoiser.process.log_snr(t[:1])))
        return denoiser(x, t)

    t_start, t_end = denoiser.process.t_of_log_snr(torch.tensor([-2.0, 2.0], dtype=torch.float64)).tolist()
    estimate_ems(
        lambda rows: watched, denoiser.process, start(4), num_nodes=4, t_start=t_start, t_end=t_end, secant_width=0.5
    )
    assert min(asked) == pytest.approx(-2.0)
    assert max(asked) == pytest.approx(2.0)


def test_a_table_that_ends_at_pure_noise_is_measured_from_just_before():
    denoiser = gaussian("vp_cosine_zero_snr")
    ems = estimate_ems(lambda rows: denoiser, denoiser.process, start(4), num_nodes=2)
    before = denoiser.process.log_snr(torch.tensor([denoiser.process.t_max - 1e-3], dtype=torch.float64))
    assert float(ems.log_snrs[0]) == pytest.approx(float(before))


def test_statistics_do_not_depend_on_the_batch_size():
    denoiser = MixtureDenoiser(make_process("vp_linear"), PLANE, 0.4)
    x0 = denoiser.sample(0.0, torch.arange(50))
    one, other = (statistics(denoiser, x0, num_nodes=6, batch_size=size) for size in (50, 7))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)


def test_a_narrower_secant_tends_to_the_derivative_at_second_order():
    denoiser = MixtureDenoiser(make_process("vp_cosine"), PLANE, 0.4)
    x0 = denoiser.sample(0.0, torch.arange(128))
    exact, *secants = (statistics(denoiser, x0, num_nodes=10, secant_width=width) for width in (0.0, 0.1, 0.05))
    inside = slice(1, -1)  # at the ends the secant is one-sided, and of first order
    for name in ("s", "b"):
        wide, narrow = ((getattr(ems, name) - getattr(exact, name))[inside].abs().mean() for ems in secants)
        assert 3.6 < float(wide / narrow) < 4.4
        assert float(narrow) > 0
    assert torch.equal(secants[0].l, exact.l)


def test_shrinking_brings_few_samples_nearer_to_the_truth():
    """48 samples in 16 dimensions against 6000. l has little noise to lose."""
    means = 0.25 * rng.normal((16,), seed=torch.arange(4), purpose="means", dtype=torch.float64)
    denoiser = MixtureDenoiser(make_process("rectified_flow"), means, 0.5)
    nodes = {"num_nodes": 6, "secant_width": 0.1}
    truth = statistics(denoiser, denoiser.sample(0.0, torch.arange(6000)), shrink=False, batch_size=6000, **nodes)
    x0 = denoiser.sample(0.0, torch.arange(48) + 10_000)
    plain, shrunk = (statistics(denoiser, x0, shrink=shrink, **nodes) for shrink in (False, True))
    for name in ("s", "b"):
        wide, near = ((getattr(ems, name) - getattr(truth, name)).square().mean() for ems in (plain, shrunk))
        assert float(near) < 0.5 * float(wide), (name, near, wide)
    assert (shrunk.origin.shrink, plain.origin.shrink) == (True, False)


def test_shrinking_takes_the_probes_noise_from_l():
    """A Gaussian whose 32 elements are correlated and alike: J's diagonal is constant, a probe sees the rest of J."""
    process, correlation = make_process("rectified_flow"), 0.5
    covariance = torch.full((32, 32), correlation, dtype=torch.float64).fill_diagonal_(1.0)

    def gain(t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(32))

    def denoiser(x, t, cond=None):
        return x @ gain(t[0])

    root = torch.linalg.cholesky(covariance)
    x0 = rng.normal((32,), seed=torch.arange(24), purpose="test", dtype=torch.float64) @ root.T
    t_start, t_end = process.t_of_log_snr(torch.tensor([-1.0, 1.0], dtype=torch.float64)).tolist()
    options = {"num_nodes": 2, "t_start": t_start, "t_end": t_end}
    plain, shrunk = (estimate_ems(lambda rows: denoiser, process, x0, shrink=s, **options) for s in (False, True))
    for i, t in enumerate(process.t_of_log_snr(plain.log_snrs)):
        truth = 1 - process.alpha(t) * gain(t)[0, 0]
        wide, near = (float((ems.l[i] - truth).square().mean()) for ems in (plain, shrunk))
        assert near < 0.3 * wide


def test_slopes_are_shrunk_by_their_standard_errors():
    """The regression alone, on samples of x0 and its rate where m = 0, so that f = -x0 and f' = -rate. One element of
    four is the same in all samples: its slope is not seen, and becomes the mean of the others."""
    count, nodes = 40, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    y, x0, errors = rng.normal((3, 3, 4), seed=torch.arange(count), purpose="test", dtype=torch.float64).unbind(1)
    x0[..., 3] = 1.5
    rate = torch.linspace(-1, 2, 4) * x0 + 0.7 * errors + 0.3
    q = torch.stack([y, x0, rate], 2)  # samples, nodes, 3, elements
    means, products = q.mean(0), torch.einsum("knie,knje->nije", q, q) / count
    plain, shrunk = (_regression(nodes, torch.zeros(3, 4).double(), means, products, k) for k in (None, count))
    for node in range(3):
        fits = [np.polyfit(-x0[:, node, e].numpy(), -rate[:, node, e].numpy(), 1, cov=True) for e in range(3)]
        slopes = np.array([fit[0] for fit, _ in fits])
        noise = np.array([covariance[0, 0] for _, covariance in fits])
        np.testing.assert_allclose(plain[0][node], [*slopes, 0.0], atol=1e-9)
        np.testing.assert_allclose(plain[1][node, :3], [fit[1] for fit, _ in fits], atol=1e-9)
        weights = x0[:, node, :3].var(0, correction=0).numpy()
        mean = np.average(slopes, weights=weights)
        spread = np.average((slopes - mean) ** 2 - noise, weights=weights)
        assert spread > 0
        expected = mean + spread / (spread + noise) * (slopes - mean)
        np.testing.assert_allclose(shrunk[0][node], [*expected, mean], atol=1e-9)
        # The line goes through the middle of the samples whatever its slope.
        np.testing.assert_allclose(shrunk[1][node], shrunk[0][node] * means[node, 1] - means[node, 2], atol=1e-9)


def test_statistics_are_read_back_as_written(tmp_path):
    values = start(12).reshape(4, 3, 2)
    origin = EMSOrigin("vp_linear", "eps", "step-3", 2.0, 128, 0.3, True)
    ems = EMS(torch.linspace(-3, 3, 4, dtype=torch.float64), values, values + 1, values - 1, origin)
    save_ems(ems, tmp_path / "ems.npz")
    again = load_ems(tmp_path / "ems.npz")
    assert again.origin == origin
    for name in ("log_snrs", "l", "s", "b"):
        assert torch.equal(getattr(again, name), getattr(ems, name))
    with pytest.raises(UserError, match="cannot write"):
        save_ems(ems, tmp_path / "nowhere" / "ems.npz")


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:100])
    for name in ("other", "text", "empty", "cut"):
        with pytest.raises(UserError, match="not a file of `smalti ems`"):
            load_ems(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"No such file.*smalti ems"):
        load_ems(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_nodes": 1}, "num_nodes=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"secant_width": -0.1}, "secant_width=-0.1 must be 0"),
        ({"secant_width": math.inf}, "secant_width=inf must be"),
        ({"t_end": 0.0}, "lambda is infinite"),
        ({"t_start": 0.1, "t_end": 0.2}, "0 <= t_end < t_start <= 1"),
    ],
)
def test_mistakes_in_measuring_are_named(change, says):
    denoiser = gaussian("rectified_flow")
    with pytest.raises(UserError, match=says):
        statistics(denoiser, start(4), **change)
    with pytest.raises(UserError, match="x0 has 2 samples"):
        statistics(denoiser, start(2))


def test_statistics_that_do_not_fit_are_refused():
    nodes, ones = torch.arange(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    for log_snrs, l, says in [  # noqa: E741
        (nodes.flip(0), ones, "rising"),
        (nodes.clamp(max=1), ones, "rising"),
        (nodes, ones[:2], "have shapes"),
        (nodes, ones[0, 0], "have shapes"),
        (nodes, ones / 0, "ems.l .*finite"),
        (nodes, ones.float(), "ems.l of dtype torch.float32"),
    ]:
        with pytest.raises(UserError, match=says):
            EMS(log_snrs, l, l, l)
