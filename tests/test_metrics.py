"""Metrics of features against closed forms, definitions read aloud, and the truth of their intervals."""

import numpy as np
import pytest

from smalti.errors import UserError
from smalti.evaluation.frechet import frechet_distance, resampled_frechet
from smalti.evaluation.intervals import Estimate, Resampled, difference, drawn_rows, half_samples
from smalti.evaluation.kernel_distance import (
    kernel_distance,
    kernel_distance_of_subsets,
    resampled_kernel_distance,
)
from smalti.evaluation.manifolds import coverage, density, precision, recall, resampled_coverage, resampled_recall
from smalti.evaluation.memorisation import memorisation
from smalti.evaluation.metrics import FEATURE_METRICS, METRICS, resample
from smalti.evaluation.neighbours import nearest_rows, radii


def normal(rows, width=6, seed=0, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, size=(rows, width))


def test_frechet_of_two_gaussians_is_the_closed_form():
    """Diagonal covariances: sum of (mean gap)^2 + (standard deviations' gap)^2, met as rows grow."""
    a, b = normal(200_000, 3, 0), normal(200_000, 3, 1, shift=1.0, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(3 * 1.0 + 3 * 1.0, rel=0.01)


@pytest.mark.parametrize(("rows", "width"), [(60, 8), (30, 45)], ids=["wider than long", "gram"])
def test_resampled_frechet_is_the_distance_of_the_drawn_rows(rows, width):
    samples, reference = normal(rows, width, 0, 0.3), normal(200, width, 1)
    resampled = resampled_frechet(samples, reference, replicates=5, seed=3)
    by_hand = [frechet_distance(samples[draw], reference) for draw in drawn_rows(rows, 5, 3)]
    np.testing.assert_allclose(resampled.replicates, by_hand, rtol=1e-6)
    assert resampled.value == frechet_distance(samples, reference)


def mmd_by_hand(x, y):
    """The unbiased estimator, pair by pair."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    own = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    return own[0] + own[1] - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_is_the_unbiased_estimator(monkeypatch):
    x, y = normal(23, 4, 0), normal(17, 4, 1, 0.5)
    expected = mmd_by_hand(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("smalti.evaluation.kernel_distance._BLOCK", 5)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_equal_distributions_is_zero_on_average_at_any_number_of_rows():
    values = np.array([kernel_distance(normal(20, 5, 2 * i), normal(30, 5, 2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert (values < 0).any()  # unbiased, so not clipped


def test_kernel_distance_of_subsets_estimates_the_same():
    x, y = normal(400, 5, 0), normal(400, 5, 1, 0.4)
    mean, deviation = kernel_distance_of_subsets(x, y, subsets=60, subset_size=150)
    assert abs(mean - kernel_distance(x, y)) < 4 * deviation / np.sqrt(60)
    assert kernel_distance_of_subsets(x, y, 3, 400)[0] == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_kernel_distance_replicates_pair_distinct_rows():
    x, y = normal(30, 4, 0), normal(40, 4, 1)
    resampled = resampled_kernel_distance(x, y, replicates=3, seed=5)
    for draw, value in zip(drawn_rows(30, 3, 5), resampled.replicates, strict=True):
        kernel = (x[draw] @ x[draw].T / 4 + 1) ** 3
        distinct = draw[:, None] != draw[None]
        within_y = ((y @ y.T / 4 + 1) ** 3)[~np.eye(40, dtype=bool)].mean()
        between = ((x[draw] @ y.T / 4 + 1) ** 3).mean()
        assert value == pytest.approx(kernel[distinct].mean() + within_y - 2 * between, rel=1e-9)


def shares_by_hand(samples, reference, k):
    """(precision, recall, density, coverage), a row at a time."""
    reach = lambda rows: [np.sort(np.linalg.norm(rows - row, axis=1))[k] for row in rows]  # noqa: E731
    of_reference, of_samples = reach(reference), reach(samples)
    d = np.array([[np.linalg.norm(s - r) for r in reference] for s in samples])
    return (
        np.mean([any(d[s, r] <= of_reference[r] for r in range(len(reference))) for s in range(len(samples))]),
        np.mean([any(d[s, r] <= of_samples[s] for s in range(len(samples))) for r in range(len(reference))]),
        np.mean([sum(d[s, r] <= of_reference[r] for r in range(len(reference))) / k for s in range(len(samples))]),
        np.mean([any(d[s, r] <= of_reference[r] for s in range(len(samples))) for r in range(len(reference))]),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_are_their_definitions(k, monkeypatch):
    monkeypatch.setattr("smalti.evaluation.neighbours._BLOCK", 13)
    samples, reference = normal(40, 3, 0, 0.8, 0.7), normal(55, 3, 1)
    found = tuple(metric(samples, reference, k) for metric in (precision, recall, density, coverage))
    assert found == pytest.approx(shares_by_hand(samples, reference, k))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_disjoint_supports_score_0_and_a_set_with_itself_1():
    a, far = normal(60), normal(60, seed=1, shift=100.0)
    for metric in (precision, recall, coverage):
        assert metric(a, far) == 0.0
        assert metric(a, a) == 1.0
    assert density(a, far) == 0.0
    # Each row lies in its own ball and, on average, in those of k others.
    assert density(a, a) == pytest.approx((5 + 1) / 5)


def test_a_mode_that_is_missing_costs_recall_and_coverage_but_not_precision():
    both = np.concatenate([normal(300, 2, 0), normal(300, 2, 1, 50.0)])
    one = normal(300, 2, 2)
    assert precision(one, both) > 0.9
    assert recall(one, both) == pytest.approx(0.5, abs=0.05)
    assert coverage(one, both) < 0.5


@pytest.mark.parametrize("name", ["fd", "kid", "recall", "precision", "density", "coverage"])
def test_intervals_hold_the_spread_of_other_draws(name):
    """The replicates' standard deviation against that of 40 independent draws, one reference for all."""
    reference = normal(400, 8, 99)
    metric = METRICS[name].resampled
    draws = [metric(normal(300, 8, seed, 0.3), reference, 60, 0) for seed in range(40)]
    true = np.std([draw.value for draw in draws])
    found = np.mean([draw.replicates.std() for draw in draws])
    assert 0.6 < found / true < 1.6


def test_recall_replicates_are_the_recall_of_the_half():
    samples, reference = normal(41, 3, 0), normal(50, 3, 1, 0.5)
    for resampled, whole in ((resampled_recall, recall), (resampled_coverage, coverage)):
        got = resampled(samples, reference, 3, replicates=4, seed=2)
        halves = half_samples(41, 4, 2)
        assert halves.sum(axis=1).tolist() == [20] * 4
        assert got.replicates.tolist() == pytest.approx([whole(samples[half], reference, 3) for half in halves])


def test_an_interval_holds_its_value_and_stays_within_what_is_possible():
    skewed = Resampled(1.0, np.array([0.9] * 199 + [0.1]))
    assert skewed.estimate(0.0, 1.0) == Estimate(1.0, 1.0, 1.0)
    assert Resampled(0.5, np.linspace(0, 2, 201)).estimate(0.0, 1.0) == Estimate(0.5, 0.0, 1.0)


def test_the_difference_of_two_runs_is_told_from_none():
    reference = normal(400, 3, 9)
    near, nearer, far = (resample("kid", normal(400, 3, s, m), reference) for s, m in ((0, 0.1), (1, 0.1), (2, 0.6)))
    same, apart = difference(near, nearer), difference(far, near)
    assert same.low < 0 < same.high
    assert 0 < apart.low < apart.value < apart.high
    diverged = Resampled(float("inf"), np.full(200, np.inf))
    assert difference(diverged, near).low == float("inf")
    assert difference(diverged, diverged).value == 0.0


def test_rows_that_are_not_finite_are_infinitely_far_and_in_no_ball():
    samples, reference = normal(100), normal(100, seed=1)
    broken = samples.copy()
    broken[7, 2] = np.nan
    for name in ("fd", "kid"):
        assert METRICS[name].estimate(resample(name, broken, reference)).low == float("inf")
    without = np.delete(samples, 7, axis=0)
    assert recall(broken, reference) == recall(without, reference)
    assert coverage(broken, reference) == coverage(without, reference)
    assert precision(broken, reference) == pytest.approx(precision(without, reference) * 99 / 100)
    nothing = np.full_like(samples, np.nan)
    assert [m(nothing, reference) for m in (precision, recall, density, coverage)] == [0.0] * 4


@pytest.mark.parametrize("name", FEATURE_METRICS)
def test_too_few_rows_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match="at least"):
        resample(name, normal(9), normal(100))
    with pytest.raises(UserError, match="at least"):
        resample(name, normal(100), normal(9))


def test_ten_images_have_no_frechet_distance_and_a_kernel_distance_instead():
    ten, reference = normal(10, 64), normal(1000, 64, 1)
    with pytest.raises(UserError, match=r"singular below 65 rows.*'kid'"):
        resample("fd", ten, reference)
    with pytest.raises(UserError, match="at least 100 are needed, since below 100 rows its bias"):
        resample("fd", normal(99, 64), reference)
    estimate = METRICS["kid"].estimate(resample("kid", ten, reference))
    assert estimate.low < estimate.value < estimate.high


def test_unknown_metrics_and_other_widths_are_named():
    with pytest.raises(UserError, match="did you mean 'recall'"):
        resample("recal", normal(100), normal(100))
    with pytest.raises(UserError, match="6 features and the reference 7"):
        resample("kid", normal(100), normal(100, 7))


def test_radii_leave_the_row_itself_out_and_equal_rows_are_at_distance_0():
    rows = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert radii(rows, 1).tolist() == pytest.approx([1, 1, 4, 16])
    assert radii(rows, 2).tolist() == pytest.approx([9, 4, 9, 36])
    indices, distances = nearest_rows(normal(50, 700) * 1e3, normal(50, 700)[::-1] * 1e3)
    assert indices.tolist() == list(range(50))[::-1]
    assert (distances == 0).all()


def test_memorisation_is_a_half_for_new_rows_and_1_for_copies():
    training, held_out = normal(500, 5, 0), normal(200, 5, 1)
    new = memorisation(normal(300, 5, 2), training, held_out)
    estimate = new.share.estimate(0, 1)
    assert estimate.low < 0.5 < estimate.high + 0.05
    assert new.suspects < 0.04
    copies = memorisation(training[100:200], training, held_out)
    assert copies.share.value == 1.0
    assert copies.suspects == 1.0
    assert copies.nearest.tolist() == list(range(100, 200))
    assert copies.sample_quantiles == (0.0,) * 7


def test_memorisation_finds_the_few_copies_among_new_rows():
    training, held_out, samples = normal(500, 5, 0), normal(200, 5, 1), normal(300, 5, 2)
    samples[[4, 90, 200]] = training[[7, 8, 9]] + 1e-4
    samples[10] = np.nan
    found = memorisation(samples, training, held_out)
    assert sorted(found.worst[:3].tolist()) == [4, 90, 200]
    assert found.nearest[[4, 90, 200]].tolist() == [7, 8, 9]
    assert found.worst[-1] == 10
    assert "nearer to a training row" in found.text()


def test_memorisation_is_the_mann_whitney_statistic():
    from scipy import stats

    training, held_out, samples = normal(300, 4, 0), normal(80, 4, 1), normal(60, 4, 2, 0.3)
    samples[:10] = held_out[:10]  # ties
    found = memorisation(samples, training, held_out)
    of_held_out = nearest_rows(held_out, training)[1]
    u = stats.mannwhitneyu(of_held_out, found.distances).statistic
    assert found.share.value == pytest.approx(u / (80 * 60))
