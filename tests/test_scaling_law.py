"""The fitted scaling law: closed forms, recovery, invariances, and intervals that hold what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares, minimize_scalar

from smalti.errors import UserError
from smalti.scaling.huber import law_refits, log_residuals
from smalti.scaling.law import Cost, Law, Runs, fit, fit_law
from smalti.scaling.prediction import flops_from_hours, flops_from_money, predict
from smalti.scaling.published import BESIROGLU, DIFFUSION_TRANSFORMERS, HOFFMANN, TOKEN_COST


def grid(law=HOFFMANN, budgets=5, sizes=5, span=8.0, cost=TOKEN_COST, lowest=1e14, highest=1e17, noise=0.0, seed=0):
    """Runs of a grid of budgets and sizes, their losses those of a law with noise."""
    each = np.geomspace(lowest, highest, budgets)
    best = np.array([law.best(budget, cost)[0] for budget in each])
    n = np.concatenate([size * np.geomspace(1 / span, span, sizes) for size in best])
    flops = np.repeat(each, sizes)
    d = cost.pictures(n, flops)
    loss = law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Runs(n, d, loss, flops)


def constants(law):
    return np.array([law.e, law.a, law.b, law.alpha, law.beta])


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
def test_a_law_without_noise_is_found_exactly(law):
    np.testing.assert_allclose(constants(fit_law(grid(law))), constants(law), rtol=1e-4)


@given(
    alpha=st.floats(0.15, 0.9), beta=st.floats(0.15, 0.9), gamma=st.floats(0.6, 1.4), log_flops=st.floats(10.0, 22.0)
)
@settings(deadline=None)
def test_the_best_run_is_the_lowest_of_its_budget(alpha, beta, gamma, log_flops):
    law, cost, flops = Law(1.0, 300.0, 500.0, alpha, beta), Cost(20.0, gamma), 10**log_flops
    n, d = law.best(flops, cost)
    assert cost.factor * n**gamma * d == pytest.approx(flops, rel=1e-9)

    def without_e(log_n):
        return float(law.loss(np.exp(log_n), cost.pictures(np.exp(log_n), flops))) - law.e

    found = minimize_scalar(without_e, bounds=(np.log(n) - 3, np.log(n) + 3), method="bounded", options={"xatol": 1e-8})
    assert found.x == pytest.approx(np.log(n), abs=1e-4)
    ten_n, ten_d = law.best(10 * flops, cost)
    assert np.log10(ten_n / n) == pytest.approx(law.n_exponent(cost))
    assert np.log10(ten_d / d) == pytest.approx(law.d_exponent(cost))


def test_cost_is_the_power_of_its_runs():
    cost = Cost.of(grid(cost=Cost(17.0, 0.83)))
    assert (cost.factor, cost.power) == (pytest.approx(17.0), pytest.approx(0.83))
    assert cost.misfit(grid(cost=Cost(17.0, 0.83))) < 1e-9
    assert Cost(34.0, 0.83).misfit(grid(cost=Cost(17.0, 0.83))) == pytest.approx(0.5)


@given(of_n=st.floats(1e-3, 1e3), of_d=st.floats(1e-3, 1e3), of_loss=st.floats(0.1, 10.0))
@settings(deadline=None, max_examples=15)
def test_units_change_the_constants_only(of_n, of_d, of_loss):
    runs = grid(noise=0.01)
    law = fit_law(runs)
    scaled = fit_law(Runs(runs.n * of_n, runs.d * of_d, runs.loss * of_loss, runs.flops))
    expected = (law.e * of_loss, law.a * of_loss * of_n**law.alpha, law.b * of_loss * of_d**law.beta)
    np.testing.assert_allclose(constants(scaled), [*expected, law.alpha, law.beta], rtol=1e-5)


@given(order=st.permutations(range(25)))
@settings(deadline=None, max_examples=10)
def test_the_order_of_runs_does_not_matter(order):
    runs = grid(noise=0.01)
    shuffled = Runs(*(values[list(order)] for values in (runs.n, runs.d, runs.loss, runs.flops)))
    one, other = fit(runs, replicates=20), fit(shuffled, replicates=20)
    np.testing.assert_allclose(constants(one.law), constants(other.law), rtol=1e-6)
    for mine, theirs in zip(one.replicates, other.replicates, strict=True):
        np.testing.assert_allclose(constants(mine), constants(theirs), rtol=1e-4)
    np.testing.assert_allclose(one.residuals[list(order)], other.residuals, atol=1e-7)


def test_an_outlier_hardly_moves_the_law():
    runs = grid(noise=0.002)
    spoilt = runs.loss.copy()
    spoilt[7] *= 1.5
    law = fit_law(Runs(runs.n, runs.d, spoilt, runs.flops))
    assert law.alpha == pytest.approx(HOFFMANN.alpha, abs=0.02)
    assert law.beta == pytest.approx(HOFFMANN.beta, abs=0.02)


def test_all_refits_at_once_are_scipys():
    runs = grid(noise=0.01)
    x, y, z = (np.log(v) - np.log(v).mean() for v in (runs.n, runs.d, runs.loss))
    noisy = z + 0.01 * np.random.default_rng(1).standard_normal((8, len(z)))
    start = np.array([-1.5, -1.2, -1.2, 0.4, 0.4])
    costs, _ = law_refits(np.tile(start, (8, 1)), x, y, noisy, 0.01)
    for cost, losses in zip(costs, noisy, strict=True):
        oracle = least_squares(
            lambda theta, z=losses: log_residuals(theta, x, y, z)[0], start, loss="huber", f_scale=0.01, xtol=1e-12
        )
        assert cost == pytest.approx(oracle.cost, rel=1e-5)


@pytest.fixture(scope="module", params=[(5, 5), (3, 4)], ids=["25 runs", "12 runs"])
def repeated(request):
    budgets, sizes = request.param
    return [
        fit(grid(budgets=budgets, sizes=sizes, noise=0.01, seed=seed), replicates=100, seed=seed) for seed in range(40)
    ]


@pytest.mark.parametrize("of", [lambda law: law.alpha, lambda law: law.beta, lambda law: law.n_exponent(TOKEN_COST)])
def test_intervals_hold_the_truth_as_often_as_they_say(repeated, of):
    # 34 of 40: less than that has a probability of 0.5 % at 95 %.
    assert sum(of(HOFFMANN) in fitted.interval(of) for fitted in repeated) >= 34
    # 50 % intervals hold it about half the time: neither too narrow nor too wide.
    assert 11 <= sum(of(HOFFMANN) in fitted.interval(of, 0.5) for fitted in repeated) <= 30


def test_a_new_run_lies_in_its_interval(repeated):
    n, d = HOFFMANN.best(1e18, TOKEN_COST)
    noise = 0.01 * np.random.default_rng(5).standard_normal(len(repeated))
    new = HOFFMANN.loss(n, d) * np.exp(noise)
    assert sum(loss in fitted.predict_loss(n, d) for loss, fitted in zip(new, repeated, strict=True)) >= 34
    for fitted in repeated[:3]:
        law_only = fitted.interval(lambda law: float(law.loss(n, d)))
        run = fitted.predict_loss(n, d)
        assert run.high - run.low > law_only.high - law_only.low


def test_replicates_are_addressed():
    runs = grid(noise=0.01)
    few, more = fit(runs, replicates=20, seed=3), fit(runs, replicates=30, seed=3)
    np.testing.assert_allclose([constants(r) for r in few.replicates], [constants(r) for r in more.replicates[:20]])
    assert fit(runs, replicates=20, seed=4).replicates != few.replicates


def test_a_band_is_the_interval_of_each_point():
    fitted = fit(grid(noise=0.01), replicates=50)
    d = np.geomspace(1e6, 1e8, 3)
    low, high = fitted.band(lambda law: law.loss(1e7, d))
    at_one = fitted.interval(lambda law: float(law.loss(1e7, d[1])))
    assert (low[1], high[1]) == (pytest.approx(at_one.low), pytest.approx(at_one.high))


def test_the_prediction_of_a_budget():
    fitted = fit(grid(noise=0.005), replicates=100)
    near, far = predict(fitted, 1e18), predict(fitted, 2e19)
    assert near.warning is None
    assert near.extrapolation == pytest.approx(10)
    assert "200 times" in str(far.warning)
    true_n, true_d = HOFFMANN.best(1e18, TOKEN_COST)
    assert true_n in near.n
    assert true_d in near.d
    assert near.loss.value == pytest.approx(float(fitted.law.loss(near.n.value, near.d.value)))
    assert near.run_loss.low < near.loss.low < near.loss.high < near.run_loss.high
    assert predict(fitted, 1e18, level=0.5).n.low > near.n.low


def test_budgets_of_hours_and_money():
    assert flops_from_hours(2, 1e15, 0.4) == pytest.approx(2.88e18)
    assert flops_from_money(10, 2.5, 1e15, 0.4) == pytest.approx(flops_from_hours(4, 1e15, 0.4))


def test_published_frontier_of_diffusion_transformers():
    assert DIFFUSION_TRANSFORMERS.n.power + DIFFUSION_TRANSFORMERS.d.power == pytest.approx(1)
    assert float(DIFFUSION_TRANSFORMERS.loss.at(1e18)) == pytest.approx(2.394 * 1e18**-0.0273)


def changed(name, index, value):
    runs = grid()
    columns = {key: getattr(runs, key).copy() for key in ("n", "d", "loss", "flops")}
    columns[name][index] = value
    return columns


@pytest.mark.parametrize("name", ["n", "d", "loss", "flops"])
@pytest.mark.parametrize("value", [-0.5, 0.0, np.nan, np.inf])
def test_values_without_a_logarithm_are_named(name, value):
    with pytest.raises(UserError, match=rf"run 3 of 25 .*{name}={value:g} must be finite and above 0"):
        Runs(**changed(name, 3, value))


def test_runs_that_no_law_can_be_fitted_to():
    runs = grid()
    five = slice(0, 5)
    with pytest.raises(UserError, match="5 runs are too few"):
        Runs(runs.n[five], runs.d[five], runs.loss[five], runs.flops[five])
    with pytest.raises(UserError, match="0 runs are too few"):
        Runs(*(np.array([]) for _ in range(4)))
    with pytest.raises(UserError, match="one value each run"):
        Runs(runs.n[1:], runs.d, runs.loss, runs.flops)
    with pytest.raises(UserError, match=r"all 25 runs cost about 1\.02e\+14 FLOPs"):
        Runs(runs.n, runs.d, runs.loss, np.linspace(1e14, 1.04e14, 25))
    with pytest.raises(UserError, match=r"2 sizes \(n\)"):
        Runs(np.resize([1e5, 2e5], 25), runs.d, runs.loss, runs.flops)
    with pytest.raises(UserError, match=r"2 lengths \(d\)"):
        Runs(runs.n, np.resize([1e5, 2e5], 25), runs.loss, runs.flops)


def test_other_bad_input():
    fitted = fit(grid(noise=0.01), replicates=20)
    with pytest.raises(UserError, match="replicates=3"):
        fit(grid(), replicates=3)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(UserError, match="level="):
            fitted.interval(lambda law: law.alpha, level)
        with pytest.raises(UserError, match="level="):
            fitted.predict_loss(1e6, 1e6, level)
    for flops in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="flops="):
            predict(fitted, flops)
    with pytest.raises(UserError, match=r"mfu=1\.5"):
        flops_from_hours(1, 1e15, 1.5)
    with pytest.raises(UserError, match="hours=-1"):
        flops_from_hours(-1, 1e15, 0.4)
    with pytest.raises(UserError, match="price_per_hour=0"):
        flops_from_money(10, 0, 1e15, 0.4)
