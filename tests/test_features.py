"""Feature networks and judges: fingerprints, the noise floor of real digits, judges of other labelled pictures."""

import pytest
import torch

from smalti import rng
from smalti.data.digits import load_digits
from smalti.data.rows import PicturesInMemory, to_bytes
from smalti.errors import UserError
from smalti.evaluation.features import (
    features_of,
    judge_feature_network,
    pixel_features,
    reference_of,
    rows_features,
)
from smalti.evaluation.judge import Judge, held_out_accuracy, load_class_judge, train_judge
from smalti.evaluation.memorisation import memorisation
from smalti.evaluation.metrics import resample


@pytest.fixture(scope="module")
def digits():
    training, held_out = load_digits()
    few = PicturesInMemory(training.images[:2000], training.class_labels[:2000])
    return few, held_out


@pytest.fixture(scope="module")
def judge(digits):
    """Of a few dozen steps: it knows enough of digits to tell them from noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smalti.evaluation.judge._FEWEST_STEPS", 60)
        patch.setattr("smalti.evaluation.judge._EPOCHS", 1)
        return train_judge(digits[0])


def test_training_rows_are_at_the_noise_floor_and_noise_at_least_50_times_worse(judge, digits):
    training, held_out = digits
    assert held_out_accuracy(judge, held_out) > 0.8
    network = judge_feature_network(judge)
    real = rows_features(network, held_out)
    rows = rows_features(network, training)
    uniform = 2 * rng.uniform((1, 28, 28), seed=0, purpose="test/noise", index=torch.arange(1000)).float() - 1
    noise = features_of(network, uniform)
    for name in ("fd", "kid"):
        floor = resample(name, rows[:1000], real).estimate()
        worst = resample(name, noise, real)
        assert worst.value > 50 * floor.value
        assert resample(name, rows[1000:], real).value < floor.high + 3 * (floor.high - floor.low)
    # Where noise lies in a young judge's features is chance; as pixels it is far from every digit.
    pixels = pixel_features(training.shape)
    noise_pixels, real_pixels = features_of(pixels, uniform), rows_features(pixels, held_out)
    for name in ("precision", "recall", "density", "coverage"):
        assert resample(name, rows[:1000], real).value > 0.8
        assert resample(name, noise_pixels, real_pixels).value == 0


def test_held_out_digits_are_not_memorised_and_copies_are(digits):
    training, held_out = digits
    network = pixel_features(training.shape)
    known, real = rows_features(network, training, 1500), rows_features(network, held_out)
    new = memorisation(real[:500], known, real[500:])
    assert new.share.estimate().low < 0.5 < new.share.estimate().high
    copies = training.read(torch.arange(20, 30)) + 0.001  # rounds to the same bytes
    found = memorisation(features_of(network, copies), known, real)
    assert (found.distances == 0).all()
    assert found.nearest.tolist() == list(range(20, 30))


def test_a_fingerprint_is_that_of_the_weights_and_the_pictures(judge, digits):
    torch.manual_seed(0)
    a, b = Judge().eval(), Judge().eval()
    assert judge_feature_network(a).fingerprint != judge_feature_network(b).fingerprint
    b.load_state_dict(a.state_dict())
    assert judge_feature_network(a).fingerprint == judge_feature_network(b).fingerprint
    assert pixel_features((1, 28, 28)).fingerprint != pixel_features((3, 28, 28)).fingerprint
    whole, part = reference_of("held-out rows", digits[1]), reference_of("held-out rows", digits[1], 600)
    assert (whole.rows, part.rows) == (1000, 600)
    assert whole.fingerprint != part.fingerprint
    same = PicturesInMemory(digits[1].images[:600])
    assert reference_of("held-out rows", same) == part


def test_features_do_not_depend_on_the_batch_and_broken_pictures_have_none(judge):
    network = judge_feature_network(judge)
    images = torch.rand(7, 1, 28, 28) * 2 - 1
    images[3, 0, 0, 0] = torch.nan
    seen = []
    features = features_of(network, images, 2, lambda done, total: seen.append((done, total)))
    assert features.shape == (7, network.width)
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    whole = features_of(network, images)
    torch.testing.assert_close(torch.from_numpy(features), torch.from_numpy(whole), atol=1e-4, rtol=0, equal_nan=True)
    assert torch.from_numpy(features).isfinite().all(dim=1).tolist() == [True] * 3 + [False] + [True] * 3


def coloured(count, size=(12, 40), seed=0):
    """Red and blue noise, by class."""
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 0.6 - 1
    images[torch.arange(count), labels * 2] += 1
    return PicturesInMemory(to_bytes(images), labels)


def test_any_labelled_pictures_have_a_judge_that_is_kept_by_their_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    monkeypatch.setattr("smalti.evaluation.judge._FEWEST_STEPS", 10)
    rows, steps = coloured(60), []
    judge = load_class_judge(rows, 2, lambda step, total: steps.append(step))
    assert (judge.in_channels, judge.image_size, len(steps)) == (3, (12, 32), 10)
    assert held_out_accuracy(judge, coloured(40, seed=1)) > 0.9
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("judge-v1-")
    again = load_class_judge(rows, 2, lambda *a: pytest.fail("trained again"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), judge.state_dict().values(), strict=True))
    file.write_bytes(b"damaged")
    load_class_judge(rows, 2)
    load_class_judge(coloured(60, seed=2), 2)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="with labels"):
        load_class_judge(PicturesInMemory(rows.images), 2)
