"""Post-hoc EMA's arithmetic: profiles, their products, and combinations against directly tracked averages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.errors import UserError
from smalti.optim.ema import PostHocEma, PowerEma, update_ema
from smalti.optim.post_hoc import PowerProfile, combine_profiles, profile_products

WIDTHS = st.floats(0.01, 0.27)


def density(profile, t):
    gamma = PowerEma(profile.relative_std).gamma
    return np.where((t > 0) & (t <= profile.step), (gamma + 1) / profile.step * (t / profile.step) ** gamma, 0.0)


def tracked(trajectory, relative_std, steps):
    """The averages that a run keeps: {step: average}, float64."""
    ema, average, kept = PowerEma(relative_std), trajectory[0].clone(), {}
    for step, weights in enumerate(trajectory, start=1):
        update_ema([average], [weights], ema.decay(step))
        if step in steps:
            kept[step] = average.clone()
    return kept


@settings(max_examples=40, deadline=None)
@given(WIDTHS, WIDTHS, st.integers(1, 5000), st.integers(1, 5000))
def test_products_are_the_integrals(first_std, second_std, first_step, second_step):
    first, second = PowerProfile(first_std, first_step), PowerProfile(second_std, second_step)
    product = float(profile_products([first], [second])[0, 0])
    nodes, shares = np.polynomial.legendre.leggauss(500)
    t, weights = (nodes + 1) / 2 * min(first_step, second_step), shares / 2 * min(first_step, second_step)
    assert product == pytest.approx(float((weights * density(first, t) * density(second, t)).sum()), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(WIDTHS)
def test_the_exponent_gives_the_width(relative_std):
    """The standard deviation of the profile, as a share of the training so far, is relative_std (eq. 123)."""
    gamma = PowerEma(relative_std).gamma
    mean, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (second - mean**2) ** 0.5 == pytest.approx(relative_std, rel=1e-9)


def test_an_average_updated_once_a_step_weighs_steps_by_the_profile():
    steps = 50
    rows = tracked(torch.eye(steps, dtype=torch.float64), 0.1, {steps})[steps]
    gamma = PowerEma(0.1).gamma
    cumulative = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (gamma + 1)
    torch.testing.assert_close(rows, cumulative.diff(), rtol=1e-12, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(30, 100_000), st.sampled_from([0.05, 0.1]), st.data())
def test_a_stored_average_is_itself(count, length, relative_std, data):
    steps = sorted({max(1, length * (i + 1) // count) for i in range(count)})
    stored = [PowerProfile(std, step) for std in (0.05, 0.1) for step in steps]
    wanted = PowerProfile(relative_std, data.draw(st.sampled_from(steps)))
    combination = combine_profiles(stored, wanted)
    expected = [float(profile == wanted) for profile in stored]
    np.testing.assert_allclose(combination.weights, expected, atol=1e-9)
    assert combination.error < 1e-6


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.integers(2, 40), st.integers(100, 10_000))
def test_combinations_sum_to_one_and_no_other_is_nearer(relative_std, count, length):
    steps = [length * (i + 1) // count for i in range(count)]
    stored = [PowerProfile(std, step) for std in (0.05, 0.1) for step in steps]
    wanted = PowerProfile(relative_std, length)
    combination = combine_profiles(stored, wanted)
    assert combination.weights.sum() == pytest.approx(1, abs=1e-9)

    products, towards = profile_products(stored, stored), profile_products(stored, [wanted])[:, 0]
    own = profile_products([wanted], [wanted])[0, 0]

    def squared_error(weights):
        return (own - 2 * towards @ weights + weights @ products @ weights) / own

    assert combination.error**2 == pytest.approx(squared_error(combination.weights), abs=1e-9)
    generator = np.random.default_rng(count)
    for _ in range(5):
        shift = generator.normal(size=len(stored))
        shift -= shift.mean()  # keeps the sum
        assert squared_error(combination.weights + 1e-3 * shift) >= squared_error(combination.weights) - 1e-9


@pytest.mark.parametrize("relative_std", [0.03, 0.05, 0.075, 0.15, 0.2])
@pytest.mark.parametrize("at", [0.5, 1.0])
def test_the_reconstruction_is_the_tracked_average(relative_std, at):
    """To what theory says, on weights that jitter and on weights that drift.

    Weights theta_i are averaged to sum_i a_i theta_i, and reconstructed with other b_i. White noise of size s errs by
    s |b - a|, which is the combination's error times the size s |a| of the average. Any other weights err by at most
    |b - a| |theta - c| for any constant c (Cauchy and Schwarz, both sums being 1), and |a| is at most the profile's L2
    norm.
    """
    length, end = 1024, int(at * 1024)
    steps = [length * (i + 1) // 16 for i in range(16)]
    noise = torch.randn(length, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drift = 5.0 + torch.linspace(0, 1, length, dtype=torch.float64)[:, None].sqrt()
    stored = [PowerProfile(std, step) for std in (0.05, 0.1) for step in steps if step <= end]
    wanted = PowerProfile(relative_std, end)
    combination = combine_profiles(stored, wanted)

    def error(trajectory):
        snapshots = {std: tracked(trajectory, std, set(steps)) for std in (0.05, 0.1)}
        truth = tracked(trajectory, relative_std, {end})[end]
        rebuilt = sum(w * snapshots[p.relative_std][p.step] for w, p in zip(combination.weights, stored, strict=True))
        return float((rebuilt - truth).square().mean().sqrt()), float(truth.square().mean().sqrt())

    size, truth = error(noise)
    assert size / truth == pytest.approx(combination.error, rel=0.05, abs=1e-7)
    size, _ = error(drift)
    norm = profile_products([wanted], [wanted]).item() ** 0.5
    around_mean = (drift[:end] - drift[:end].mean()).square().sum().item() ** 0.5
    assert size <= combination.error * norm * around_mean + 1e-9


def test_more_snapshots_reconstruct_better():
    def error(count, relative_std):
        stored = [PowerProfile(std, 9600 * (i + 1) // count) for std in (0.05, 0.1) for i in range(count)]
        return combine_profiles(stored, PowerProfile(relative_std, 9600)).error

    assert [round(error(count, 0.03), 3) for count in (16, 32, 64)] == [0.039, 0.011, 0.003]
    assert round(error(16, 0.15), 3) == 0.009


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"second_relative_std=0.05 must differ"):
        PostHocEma(second_relative_std=0.05)
    with pytest.raises(UserError, match=r"ema.relative_std=0.3 must lie in \(0, 0.28\)"):
        PostHocEma(relative_std=0.3)
    with pytest.raises(UserError, match=r"ema.snapshots=0 must be at least 1"):
        PostHocEma(snapshots=0)
    with pytest.raises(UserError, match=r"ema.snapshot_every=0 must be at least 1"):
        PostHocEma(snapshot_every=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300))
def test_snapshots_are_spread_evenly_and_the_last_is_at_the_end(count, length):
    ema = PostHocEma(snapshots=count)
    taken = [s for s in range(1, length + 1) if ema.snapshot_due(s, min(1.0, (s - 1) / length), s / length)]
    assert taken[-1] == length
    assert len(taken) == min(count, length)
    gaps = np.diff([0, *taken])
    assert gaps.max() - gaps.min() <= 2
