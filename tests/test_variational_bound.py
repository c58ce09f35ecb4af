"""The loss of learned variances, against the paper written out with its tables, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence
from training_runs import tiny_config

from smalti import load
from smalti.diffusion import make_process
from smalti.diffusion.objective import Objective, noisy_input, per_sample_loss
from smalti.diffusion.processes import cosine_betas, linear_betas
from smalti.diffusion.variational_bound import _log_probability_of_bytes, variational_bound
from smalti.training.display import PlainDisplay
from smalti.training.loop import train

TABLES = {"vp_linear_discrete": linear_betas, "vp_cosine_discrete": cosine_betas}


def example(steps, seed=0):
    """Bytes, a guess at them, the network's variance half (also past -1 .. 1), noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(steps), 2, 3, 3)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1.0, 1.0
    guess, logits, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return x0, x0 + 0.02 * guess, logits, eps


def papers_bound(betas, step, x0, x_t, eps_estimate, logits):
    """T L_t in bits per dimension, from Nichol and Dhariwal 2021, eq. 9 to 15, by arrays over the steps."""
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bars[:-1])
    tilde = betas * (1 - before) / (1 - alpha_bars)  # eq. 10

    def mean(start):  # eq. 11
        return (
            np.sqrt(before[step]) * betas[step] / (1 - alpha_bars[step]) * start
            + np.sqrt(1 - betas[step]) * (1 - before[step]) / (1 - alpha_bars[step]) * x_t
        )

    start = (x_t - np.sqrt(1 - alpha_bars[step]) * eps_estimate) / np.sqrt(alpha_bars[step])  # eq. 9
    least = tilde[1] if step == 0 else tilde[step]
    v = (logits + 1) / 2
    variance = np.exp(v * np.log(betas[step]) + (1 - v) * np.log(least))  # eq. 15
    if step == 0:
        std = np.sqrt(variance)
        high = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
        low = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
        nats = -np.log(norm.cdf(high, start, std) - norm.cdf(low, start, std))
    else:
        first, second = (
            Normal(*map(torch.tensor, (mean(x0), np.sqrt(tilde[step])))),
            Normal(*map(torch.tensor, (mean(start), np.sqrt(variance)))),
        )
        nats = kl_divergence(first, second).numpy()
    return len(betas) * nats.mean() / math.log(2)


@pytest.mark.parametrize("name", TABLES)
def test_the_bound_is_the_papers_at_every_step(name):
    process, betas = make_process(name), TABLES[name]().numpy()
    steps = [0, 1, 2, 10, 500, 998, 999]
    x0, _, logits, eps = example(steps)
    t = (torch.tensor(steps).double() + 1) / 1000
    eps_estimate = eps + 0.1 * logits.flip(0)
    network = lambda x, network_time, cond: torch.cat([eps_estimate, logits], 1)  # noqa: E731
    plain, hybrid = (
        per_sample_loss(network, process, Objective("eps", vlb_weight=weight), x0, eps, t, None)
        for weight in (0.0, 0.001)
    )
    x_t = noisy_input(process, t, x0, eps)
    for i, step in enumerate(steps):
        expected = papers_bound(betas, step, *(v[i].numpy() for v in (x0, x_t, eps_estimate, logits)))
        assert (hybrid - plain)[i].item() == pytest.approx(0.001 * expected, rel=1e-6), step


def test_a_true_estimate_with_the_true_variance_costs_nothing():
    process = make_process("vp_linear_discrete")
    x0, _, logits, _ = example([5, 600])
    t = torch.tensor([0.006, 0.601], dtype=torch.float64)
    assert variational_bound(process, t, x0, x0, torch.full_like(logits, -1)).abs().max() < 1e-9
    assert (variational_bound(process, t, x0, x0, logits) > 0).all()


def test_the_bound_between_steps_is_that_of_a_step_of_the_same_length():
    """The loop draws t from a continuum: a t below 2 / T is the last step, where x0 is read."""
    process = make_process("vp_linear_discrete")
    x0, guess, logits, _ = example([0, 0, 0])
    t = torch.tensor([0.001, 0.0014, 0.001999], dtype=torch.float64)
    same = x0[:1], guess[:1], logits[:1]
    terms = variational_bound(process, t, *(v.expand(3, -1, -1, -1) for v in same))
    assert torch.equal(terms, terms[:1].expand(3))
    between = variational_bound(process, torch.tensor([0.3004], dtype=torch.float64), *same)
    ends = [variational_bound(process, torch.tensor([end], dtype=torch.float64), *same) for end in (0.3, 0.301)]
    assert min(ends) < between < max(ends)


def test_the_probabilities_of_all_bytes_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.3), (0.97, 0.01), (-1.2, 0.1)):
        log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
        log_probability = _log_probability_of_bytes(levels, torch.tensor(mean, dtype=torch.float64), log_variance)
        assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-8)


def test_the_bound_trains_the_variances_alone():
    process = make_process("vp_cosine_discrete")
    x0, _, logits, eps = example([0, 3, 700])
    t = torch.tensor([0.001, 0.004, 0.701], dtype=torch.float64)
    gradients = []
    for weight in (0.0, 0.001):
        output = torch.cat([0.5 * eps, logits], 1).requires_grad_()
        loss = per_sample_loss(lambda x, t, c: output, process, Objective("eps", vlb_weight=weight), x0, eps, t, None)  # noqa: B023
        loss.sum().backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0][:, :2], gradients[1][:, :2])
    assert not gradients[0][:, 2:].any()
    assert gradients[1][:, 2:].abs().min() > 0


def test_float32_is_near_float64():
    process = make_process("vp_linear_discrete")
    x0, guess, logits, _ = example([0, 1, 20, 900])
    t = torch.tensor([0.001, 0.002, 0.021, 0.901], dtype=torch.float64)
    exact = variational_bound(process, t, x0, guess, logits)
    near = variational_bound(process, t, x0.float(), guess.float(), logits.float())
    assert near.dtype == torch.float32
    torch.testing.assert_close(near.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_run_learns_variances_and_samples_by_them(tmp_path):
    options = ("process=vp_linear_discrete", "prediction_type=eps", "learn_sigma=true", "vlb_weight=0.001")
    train(tiny_config(3, *options), tmp_path / "run", display=PlainDisplay(1e9))
    pipe = load(tmp_path / "run")
    learned, small = (pipe([1], solver="ddpm", num_inference_steps=3, variance=v).tensor for v in ("learned", "small"))
    assert torch.isfinite(learned).all()
    assert not torch.equal(learned, small)
