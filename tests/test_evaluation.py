"""The Frechet distance against closed forms and scipy; bootstrap coverage; the bundled digits."""

import numpy as np
import pytest
import torch
from scipy import linalg

from smalti.data.digits import load_digits
from smalti.data.order import batch_indices
from smalti.data.rows import to_bytes, to_signed_unit
from smalti.errors import UserError
from smalti.evaluation.digits import evaluate_run
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.intervals import bootstrap


def test_frechet_equals_the_closed_form_by_scipy():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(300, 12)) @ generator.normal(size=(12, 12))
    b = generator.normal(size=(200, 12)) @ generator.normal(size=(12, 12)) + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    a = np.random.default_rng(0).normal(size=(500, 6))
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, a + 2.0) == pytest.approx(6 * 4.0)


def test_bootstrap_interval_covers_a_mean():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        values = generator.normal(size=200)
        estimate = bootstrap(lambda rows, values=values: float(values[rows].mean()), 200, 200, seed=trial)
        covered += estimate.low <= 0.0 <= estimate.high
    assert 88 <= covered <= 100


def test_digits_are_the_bundled_ones():
    training_rows, held_out = load_digits()
    assert (len(training_rows), len(held_out)) == (9000, 1000)
    assert training_rows.images.shape[1:] == (1, 28, 28)
    assert set(held_out.class_labels.tolist()) == set(range(10))
    images, labels = training_rows.labelled(torch.tensor([3, 5]))
    assert images.min() == -1.0
    assert torch.equal(to_bytes(images), training_rows.images[[3, 5]])
    assert labels.tolist() == training_rows.class_labels[[3, 5]].tolist()


def test_every_byte_survives_the_trip_to_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_signed_unit(values)), values)


def test_order_reads_each_row_once_an_epoch_whatever_the_batch_size():
    whole = torch.cat([batch_indices(step, 7, 50, seed=3) for step in range(15)])[:100]
    assert torch.equal(whole[:50].sort().values, torch.arange(50))
    assert torch.equal(whole[50:].sort().values, torch.arange(50))
    assert not torch.equal(whole[:50], whole[50:])
    other = torch.cat([batch_indices(step, 20, 50, seed=3) for step in range(5)])
    assert torch.equal(whole, other)


def test_a_sampler_that_diverged_is_infinitely_far():
    features = np.random.default_rng(0).normal(size=(50, 4))
    broken = features.copy()
    broken[3, 1] = np.nan
    assert frechet_distance(broken, features) == float("inf")


def test_a_mistake_in_the_settings_shows_before_a_judge_is_trained(trained_run, monkeypatch):
    def never(progress):
        raise AssertionError("the judge was asked for")

    monkeypatch.setattr("smalti.evaluation.digits.load_judge", never)
    with pytest.raises(UserError, match="num_inference_steps=0"):
        evaluate_run(trained_run, num_inference_steps=0)
