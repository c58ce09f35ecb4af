"""What compute buys: curves with an asymptote and without, and which of them cross-validation chooses."""

import numpy as np
import pytest

from smalti.errors import UserError
from smalti.scaling.compute import fit_compute

FLOPS = np.geomspace(1e12, 1e15, 7)


def measured(asymptote, noise=0.0, seed=0, flops=FLOPS):
    return (asymptote + 50 * flops**-0.15) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(flops)))


@pytest.mark.parametrize("asymptote", [0.0, 0.4])
def test_a_curve_without_noise_is_found_exactly_and_chosen(asymptote):
    law = fit_compute(FLOPS, measured(asymptote), replicates=20)
    curve = law.with_asymptote.curve
    assert float(curve.at(1e17)) == pytest.approx(asymptote + 50 * 1e17**-0.15, rel=1e-3)
    assert curve.asymptote == pytest.approx(asymptote, abs=1e-3)
    if asymptote:
        assert law.asymptote_chosen
        assert law.chosen is law.with_asymptote
        assert (curve.factor, curve.power) == (pytest.approx(50, rel=1e-3), pytest.approx(0.15, rel=1e-3))
    else:
        assert (law.power.curve.factor, law.power.curve.power) == (pytest.approx(50), pytest.approx(0.15))
        assert law.power.cv_error < 1e-6


def test_the_pure_power_is_linear_regression_of_logarithms():
    y = measured(0.2, noise=0.02)
    slope, constant = np.polyfit(np.log(FLOPS), np.log(y), 1)
    curve = fit_compute(FLOPS, y, replicates=20).power.curve
    assert (curve.power, curve.factor) == (pytest.approx(-slope), pytest.approx(np.exp(constant)))
    assert curve.asymptote == 0.0


def test_left_out_errors_of_the_pure_power_are_those_of_its_leverages():
    y = measured(0.2, noise=0.02)
    x = np.stack([np.ones(7), np.log(FLOPS)], axis=1)
    hat = x @ np.linalg.pinv(x)
    left_out = (np.log(y) - hat @ np.log(y)) / (1 - np.diag(hat))
    assert fit_compute(FLOPS, y, replicates=20).power.cv_error == pytest.approx(np.sqrt(np.mean(left_out**2)))


def test_intervals_hold_the_truth_and_the_choice_follows_the_data():
    held, chosen = 0, {0.0: 0, 0.4: 0}
    for seed in range(30):
        pure = fit_compute(FLOPS, measured(0.0, 0.01, seed), replicates=100, seed=seed)
        bent = fit_compute(FLOPS, measured(0.4, 0.01, seed), replicates=100, seed=seed)
        held += (0.15 in pure.power.interval(lambda curve: curve.power)) + (
            0.4 + 50 * 1e16**-0.15 in bent.with_asymptote.at(1e16)
        )
        chosen[0.0] += pure.asymptote_chosen
        chosen[0.4] += bent.asymptote_chosen
    assert held >= 52
    assert chosen[0.4] >= 27  # noise of 1 % hides the bend now and then
    assert chosen[0.0] <= 15


def test_units_change_the_constants_only_and_order_nothing():
    y = measured(0.3, noise=0.01)
    order = np.random.default_rng(0).permutation(7)
    law, shuffled = fit_compute(FLOPS, y, replicates=20), fit_compute(FLOPS[order], y[order], replicates=20)
    assert shuffled.with_asymptote.curve == law.with_asymptote.curve
    scaled = fit_compute(1e-6 * FLOPS, 7 * y, replicates=20).with_asymptote.curve
    assert scaled.asymptote == pytest.approx(7 * law.with_asymptote.curve.asymptote, rel=1e-4)
    assert scaled.power == pytest.approx(law.with_asymptote.curve.power, rel=1e-4)


def test_bad_input():
    with pytest.raises(UserError, match="3 budgets are too few to fit FID"):
        fit_compute(FLOPS[:3], measured(0.1)[:3], name="FID")
    with pytest.raises(UserError, match="1 budgets are too few"):
        fit_compute(np.full(7, 1e12), measured(0.1))
    with pytest.raises(UserError, match="0 budgets"):
        fit_compute(np.array([]), np.array([]))
    with pytest.raises(UserError, match="7 budgets and 6 values"):
        fit_compute(FLOPS, measured(0.1)[1:])
    for bad in (-1.0, 0.0, np.nan):
        with pytest.raises(UserError, match=f"FID={bad:g} must be finite and above 0"):
            fit_compute(FLOPS, np.where(FLOPS > 9e14, bad, measured(0.1)), name="FID")
