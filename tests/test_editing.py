"""img2img and inpainting: what is kept is kept, and what is painted follows it as the replacement method says."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.diffusion import Process, make_process, process_names
from smalti.errors import UserError
from smalti.sampling import InpaintDenoiser, make_plan, noised, run_plan, strength_to_start

CORRELATION = 0.8
SOLVERS = ["ddim", "dpmpp_2m", "flow_euler"]


@dataclass(frozen=True)
class CorrelatedDenoiser:
    """E[x0 | x_t] of pictures [batch, 1, 1, 2] whose two pixels have variance 1 and a correlation."""

    process: Process

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.process.alpha(t)[:, None, None], self.process.sigma(t)[:, None, None]
        first, second = x.unbind(-1)
        half_sum, half_difference = (first + second) / 2, (first - second) / 2  # the covariance's eigenvectors
        along, across = (alpha * v / (alpha**2 * v + sigma**2) for v in (1 + CORRELATION, 1 - CORRELATION))
        return torch.stack(
            [along * half_sum + across * half_difference, along * half_sum - across * half_difference], dim=-1
        )

    def with_variance(self, x, t, cond=None):
        return self(x, t, cond), torch.full_like(x, 0.25)


def pixels(known, painted=0.0):
    """Pictures of a known and a painted pixel; [batch, 1, 1, 2]."""
    known = torch.as_tensor(known, dtype=torch.float64)
    return torch.stack([known, torch.full_like(known, painted)], dim=-1)[:, None, None]


MASK = pixels([0.0], painted=1.0)


def replacement_slope() -> float:
    """How far the painted pixel follows the known one along the exact probability-flow ODE under replacement.

    With e = sigma / alpha, q = 1 + e^2 and r the correlation, u = x / alpha of the painted pixel obeys
    du/dq = (q u - r k) / (2 (q^2 - r^2)) for a known pixel k with noise 0. So u is k times
    (1 - r^2)^(1/4) times the integral of r / (2 (q^2 - r^2)^(5/4)) over q from 1 to infinity (here q = 1 / p^2).
    """
    r = CORRELATION
    p = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:]
    integrand = r / (2 * (p**-4 - r**2) ** 1.25) * 2 * p**-3
    return float((1 - r**2) ** 0.25 * torch.trapezoid(integrand, p))


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_linear", "vp_cosine"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_painted_region_follows_the_known_one(solver, process_name):
    process = make_process(process_name)
    known = pixels([-2.0, -0.5, 1.0, 3.0])
    zero = torch.zeros_like(known)
    inpaint = InpaintDenoiser(CorrelatedDenoiser(process), process, known, MASK, zero)
    plan = make_plan(solver, process=process, num_inference_steps=200, spacing="lambda")
    end = run_plan(plan, inpaint, zero)
    torch.testing.assert_close(end[..., 0], known[..., 0], rtol=0, atol=1e-6)
    # The exact conditional mean has slope 0.8: replacement follows the known pixel, but by 0.347 of it alone.
    slope = end[:, 0, 0, 1] / known[:, 0, 0, 0]
    assert (slope - replacement_slope()).abs().max() < (5e-4 if solver == "dpmpp_2m" else 5e-3), slope


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_known_region_ends_as_given_from_any_noise(solver, steps):
    process = make_process("vp_cosine")
    x, known, noise = torch.randn(3, 4, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mask[..., 2:4, 1:4] = 1
    inpaint = InpaintDenoiser(lambda x, t, cond=None: 0.3 * x, process, known, mask, noise)
    end = run_plan(make_plan(solver, process=process, num_inference_steps=max(steps, 2)), inpaint, x)
    kept = (mask == 0).expand_as(x)
    assert (end - known)[kept].abs().max() < 1e-6
    assert (end - known)[~kept].abs().min() > 1e-6


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 3]), channels=st.sampled_from([1, 2]), share=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_soft_masks_of_any_broadcast_shape_blend(rows, channels, share, seed):
    process = make_process("rectified_flow")
    generator = torch.Generator().manual_seed(seed)
    x, known, noise = torch.randn(3, 3, 2, 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, channels, 4, 5, dtype=torch.float64, generator=generator)
    t = torch.full((3,), share, dtype=torch.float64)
    seen = []

    def denoiser(x, t, cond=None):
        seen.append(x)
        return 0.5 * x

    x0 = InpaintDenoiser(denoiser, process, known, mask, noise)(x, t)
    expected = mask * x + (1 - mask) * ((1 - share) * known + share * noise)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(x0, mask * 0.5 * expected + (1 - mask) * known)


def test_a_mask_of_ones_paints_all_and_variance_logits_pass():
    process = make_process("vp_cosine")
    denoiser = CorrelatedDenoiser(process)
    x, t = pixels([0.3, -1.0], painted=0.5), torch.tensor([0.2, 0.8], dtype=torch.float64)
    inpaint = InpaintDenoiser(denoiser, process, torch.zeros_like(x), torch.ones(1, 1, 1, 2), torch.zeros_like(x))
    assert torch.equal(inpaint(x, t), denoiser(x, t))
    x0, logits = inpaint.with_variance(x, t)
    assert torch.equal(x0, denoiser(x, t))
    assert torch.equal(logits, torch.full_like(x, 0.25))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(process_names()), strength=st.floats(0, 1, exclude_min=True))
def test_strength_is_a_share_of_the_processs_range(name, strength):
    process = make_process(name)
    start = strength_to_start(process, strength)
    assert process.t_min <= start <= process.t_max + 1e-12
    assert strength_to_start(process, 1.0) == pytest.approx(process.t_max)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.0])
def test_img2img_of_a_gaussian_ends_nearer_to_its_picture_at_lower_strength(solver, strength):
    """With noise 0 and x0 = (k, k), an eigenvector of variance v, the ODE ends at alpha sqrt(v / (alpha^2 v + sigma^2))
    times k."""
    process = make_process("vp_cosine")
    t_start = strength_to_start(process, strength)
    x0 = pixels([1.5], painted=1.5)
    plan = make_plan(solver, process=process, num_inference_steps=200, spacing="lambda", t_start=t_start)
    end = run_plan(plan, CorrelatedDenoiser(process), noised(process, x0, t_start, torch.zeros_like(x0)))
    t, variance = torch.tensor(t_start, dtype=torch.float64), 1 + CORRELATION
    alpha, sigma = process.alpha(t), process.sigma(t)
    expected = x0 * alpha * (variance / (alpha**2 * variance + sigma**2)) ** 0.5
    torch.testing.assert_close(end, expected, rtol=0.02, atol=1e-3)


def test_noised_is_the_marginal():
    process = make_process("rectified_flow")
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noised(process, x0, 0.25, eps), 0.75 * x0 + 0.25 * eps)
    assert noised(process, x0, 0.25, eps).dtype == torch.float32


PROCESS = make_process("rectified_flow")
KNOWN = torch.zeros(3, 2, 4, 5)


def inpainting(known=KNOWN, mask=None, noise=KNOWN):
    mask = torch.ones(1, 1, 4, 5) if mask is None else mask
    return InpaintDenoiser(lambda x, t, cond=None: x, PROCESS, known, mask, noise)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: strength_to_start(PROCESS, 0.0), "strength=0.0"),
        (lambda: strength_to_start(PROCESS, 1.2), "strength=1.2"),
        (lambda: strength_to_start(PROCESS, float("nan")), "strength=nan"),
        (lambda: noised(PROCESS, KNOWN, 1.5, KNOWN), "t=1.5"),
        (lambda: noised(PROCESS, KNOWN, 0.5, KNOWN[:1]), r"eps has shape \(1, 2, 4, 5\)"),
        (lambda: inpainting(mask=torch.ones(4, 5)), r"mask has shape \(4, 5\), needed is \[1 or 3, 1 or 2, 4, 5\]"),
        (lambda: inpainting(mask=torch.ones(2, 1, 4, 5)), "mask has shape"),
        (lambda: inpainting(mask=torch.ones(1, 3, 4, 5)), "mask has shape"),
        (lambda: inpainting(mask=torch.ones(1, 1, 1, 5)), "mask has shape"),
        (lambda: inpainting(mask=torch.ones(1, 1, 4, 5).bool()), "mask is torch.bool"),
        (lambda: inpainting(mask=torch.full((1, 1, 4, 5), 255.0)), "mask has values from 255 to 255"),
        (lambda: inpainting(mask=torch.full((1, 1, 4, 5), -0.1)), "mask has values"),
        (lambda: inpainting(mask=torch.full((1, 1, 4, 5), float("nan"))), "mask has values"),
        (lambda: inpainting(noise=KNOWN[:1]), "noise has shape"),
        (lambda: inpainting(known=KNOWN / 0), "known has entries that are NaN or infinite"),
        (lambda: inpainting(known=torch.zeros(3, 2), noise=torch.zeros(3, 2)), "known has shape"),
        (lambda: inpainting()(KNOWN[:2], torch.ones(2).double()), r"known has shape \(3, 2, 4, 5\), that of x"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
