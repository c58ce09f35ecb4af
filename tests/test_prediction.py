"""Predictions and denoisers: the one conversion table, preconditioning, pure noise, learned variance, the switch."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from gaussian import GaussianDenoiser
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.diffusion import (
    NetworkDenoiser,
    Process,
    SwitchedDenoiser,
    convert_prediction,
    make_process,
    process_names,
    usable_at_pure_noise,
)
from smalti.diffusion.prediction import input_scale, per_sample, prediction_types, training_target, x0_from_output
from smalti.errors import UserError

MEAN = torch.tensor([0.7, -0.3], dtype=torch.float64)
VARIANCE = torch.tensor([0.09, 0.5], dtype=torch.float64)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_pair(seed, batch=3, width=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, width, dtype=torch.float64, generator=generator).unbind(0)


def mixed(process, t, x0, eps):
    return process.alpha(t)[:, None] * x0 + process.sigma(t)[:, None] * eps


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(process_names()), source=st.sampled_from(prediction_types()),
    target=st.sampled_from(prediction_types()), share=st.floats(0.02, 0.98), seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_pair_of_predictions_converts(name, source, target, share, seed):
    process = make_process(name)
    x0, eps = random_pair(seed)
    t = torch.full((3,), process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
    x = mixed(process, t, x0, eps)
    output = training_target(source, process, t, x0, eps)
    expected = training_target(target, process, t, x0, eps)
    converted = convert_prediction(source, target, process, t, x, output)
    # What rounding of x alone does to x0: sigma / alpha at the noisy end, as float64 cannot be better.
    atol = 1e-13 * float(1 + (process.sigma(t) / process.alpha(t)).max() + (process.alpha(t) / process.sigma(t)).max())
    torch.testing.assert_close(converted, expected, rtol=1e-10, atol=atol)
    torch.testing.assert_close(x0_from_output(source, process, t, x, output), x0, rtol=1e-10, atol=atol)


def test_velocity_and_v_are_different_things():
    process, t = make_process("vp_cosine"), float64(0.5)
    x0, eps = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    assert training_target("v", process, t, x0, eps) != training_target("velocity", process, t, x0, eps)


@pytest.mark.parametrize("name", [n for n in process_names() if float(make_process(n).alpha(float64(1.0))) == 0.0])
@pytest.mark.parametrize("kind", prediction_types())
def test_x0_at_pure_noise(name, kind):
    process, t = make_process(name), float64(1.0, 1.0, 1.0)
    x0, eps = random_pair(1)
    x = mixed(process, t, x0, eps)
    estimate = x0_from_output(kind, process, t, x, training_target(kind, process, t, x0, eps))
    if usable_at_pure_noise(kind):
        torch.testing.assert_close(estimate, x0, rtol=1e-12, atol=1e-12)
        for target in prediction_types():
            converted = convert_prediction(kind, target, process, t, x, training_target(kind, process, t, x0, eps))
            torch.testing.assert_close(converted, training_target(target, process, t, x0, eps), rtol=1e-9, atol=1e-9)
    else:
        assert not estimate.isfinite().any()


@pytest.mark.parametrize("name", process_names())
def test_x0_at_clean_data(name):
    """At t = 0 an x0 network is believed, and any other but velocity leaves x as it is."""
    process, t = make_process(name), torch.zeros(3, dtype=torch.float64)
    x, output = random_pair(2)
    assert torch.equal(x0_from_output("x0", process, t, x, output), output)
    for kind in ("eps", "v", "edm"):
        torch.testing.assert_close(x0_from_output(kind, process, t, x, output), x)


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(process_names()), share=st.floats(0.02, 0.98), seed=st.integers(0, 1000))
def test_edm_prediction_is_the_published_preconditioning(name, share, seed):
    """Karras et al. 2022, eq. 7 and table 1, at s = sigma / alpha and x / alpha."""
    process = make_process(name)
    t = torch.full((3,), process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
    x, output = random_pair(seed)
    alpha, s, sigma_data = process.alpha(t)[:, None], (process.sigma(t) / process.alpha(t))[:, None], 0.5
    total = s**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, s * sigma_data / total.sqrt(), 1 / total.sqrt()
    torch.testing.assert_close(x0_from_output("edm", process, t, x, output), c_skip * x / alpha + c_out * output)
    torch.testing.assert_close(x * input_scale("edm", process, t)[:, None], c_in * x / alpha)


def test_edm_preconditioning_is_that_of_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler, process = EDMEulerScheduler(sigma_data=0.5), make_process("edm")
    x, output = random_pair(3)
    t = float64(0.3, 0.6, 0.95)
    for i, sigma in enumerate(process.sigma(t)):
        theirs = scheduler.precondition_outputs(x[i], output[i], sigma)
        torch.testing.assert_close(x0_from_output("edm", process, t, x, output)[i], theirs)
        ours = x[i] * input_scale("edm", process, t)[i]
        torch.testing.assert_close(ours, scheduler.precondition_inputs(x[i], sigma))
        # diffusers takes ln(sigma) in float32.
        assert float(process.network_time(t)[i]) == pytest.approx(float(scheduler.precondition_noise(sigma)), rel=1e-6)


@dataclass(frozen=True)
class ExactNetwork:
    """A network with the posterior mean of a Gaussian behind it, answering in any prediction type at one t."""

    kind: str
    process: Process
    t: torch.Tensor
    variance_logits: bool = False

    def __call__(self, x, network_time, cond=None):
        torch.testing.assert_close(network_time, self.process.network_time(self.t).to(x.dtype))
        x = x / per_sample(input_scale(self.kind, self.process, self.t), x)
        exact = GaussianDenoiser(self.process, MEAN, VARIANCE)(x, self.t)
        output = convert_prediction("x0", self.kind, self.process, self.t, x, exact)
        return torch.cat([output, x.sign()], dim=1) if self.variance_logits else output

    def null_condition(self, batch_size):
        return None


@pytest.mark.parametrize("name", process_names())
@pytest.mark.parametrize("kind", prediction_types())
def test_denoiser_is_the_same_through_every_prediction_type(name, kind):
    process = make_process(name)
    t = torch.linspace(max(process.t_min, 0.1), 0.9, 16, dtype=torch.float64)
    x = process.sigma(t)[:, None] * random_pair(0, 16, 2)[0]
    exact = GaussianDenoiser(process, MEAN, VARIANCE)(x, t)
    estimate = NetworkDenoiser(ExactNetwork(kind, process, t), process, kind)(x, t)
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-8)


def test_learned_variance_is_the_second_half():
    process, t = make_process("vp_linear"), float64(0.3, 0.6)
    x = random_pair(0, 2, 2)[0]
    denoiser = NetworkDenoiser(ExactNetwork("eps", process, t, variance_logits=True), process, "eps")
    x0, logits = denoiser.with_variance(x, t)
    assert torch.equal(x0, denoiser(x, t))
    assert torch.equal(logits, x.sign())
    plain = NetworkDenoiser(ExactNetwork("eps", process, t), process, "eps")
    with pytest.raises(UserError, match="2 channels for 2 of input: a learned variance needs 4"):
        plain.with_variance(x, t)


@pytest.mark.parametrize(("trained", "sampled"), list(itertools.permutations(process_names(), 2)))
def test_exact_denoisers_agree_through_the_switch(trained, sampled):
    trained, sampled = make_process(trained), make_process(sampled)
    # Log-SNRs that both processes were trained on.
    ends = [p.log_snr(float64(p.t_min, min(p.t_max, 0.999))) for p in (trained, sampled)]
    low, high = max(float(e[1]) for e in ends), min(float(e[0]) for e in ends)
    t = sampled.t_of_log_snr(torch.linspace(low + 0.01, high - 0.01, 16, dtype=torch.float64))
    x0, eps = random_pair(0, 16, 2)
    x = mixed(sampled, t, x0, eps)
    switched = SwitchedDenoiser(GaussianDenoiser(trained, MEAN, VARIANCE), trained, sampled)
    torch.testing.assert_close(switched(x, t), GaussianDenoiser(sampled, MEAN, VARIANCE)(x, t), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("trained", "sampled"), list(itertools.permutations(process_names(), 2)))
def test_the_switch_is_finite_at_the_ends_and_asks_within_the_trained_span(trained, sampled):
    trained, sampled = make_process(trained), make_process(sampled)

    def asked(x, t, cond=None):
        assert ((t >= trained.t_min) & (t <= trained.t_max)).all()
        assert t.dtype == torch.float64
        return x

    t = float64(0.0, sampled.t_min, sampled.t_max, 1.0)
    x = torch.ones(4, 2) * sampled.sigma(t).clamp(min=1.0).float()[:, None]
    scaled = SwitchedDenoiser(asked, trained, sampled)(x, t)
    assert scaled.dtype == torch.float32
    assert scaled.isfinite().all()
    # Nothing of pure noise but its size is left: it comes out at the trained process's size.
    if float(sampled.alpha(t)[-1]) == 0.0:
        end = float64(trained.t_max)
        expected = torch.hypot(trained.alpha(end), trained.sigma(end)).float().expand(2)
        torch.testing.assert_close(scaled[-1], expected)


def test_the_switch_hands_on_the_learned_variance():
    trained, sampled, t = make_process("vp_linear"), make_process("edm"), float64(0.5, 0.6)
    matched = trained.t_of_log_snr(sampled.log_snr(t))
    inner = NetworkDenoiser(ExactNetwork("eps", trained, matched, variance_logits=True), trained, "eps")
    x = random_pair(0, 2, 2)[0]
    x0, logits = SwitchedDenoiser(inner, trained, sampled).with_variance(x, t)
    torch.testing.assert_close(x0, GaussianDenoiser(sampled, MEAN, VARIANCE)(x, t), rtol=1e-6, atol=1e-8)
    assert torch.equal(logits, x.sign())
    with pytest.raises(UserError, match="function has no with_variance"):
        SwitchedDenoiser(lambda x, t, cond=None: x, trained, sampled).with_variance(x, t)


@pytest.mark.parametrize(
    "call",
    [
        lambda: training_target("epsilon", make_process("vp_linear"), *[torch.ones(1, 1)] * 3),
        lambda: usable_at_pure_noise("epsilon"),
    ],
)
def test_unknown_predictions_are_refused(call):
    with pytest.raises(UserError, match="unknown prediction_type 'epsilon': did you mean 'eps'"):
        call()
