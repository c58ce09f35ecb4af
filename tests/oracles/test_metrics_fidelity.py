"""Metrics of features against torch-fidelity's and torchmetrics' on the same features."""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from fidelity_libraries import import_without_torchvision

from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.kernel_distance import kernel_distance, kernel_distance_of_subsets
from smalti.evaluation.manifolds import precision, recall

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def fidelity():
    pytest.importorskip("tqdm")
    try:
        return import_without_torchvision(
            "torch_fidelity.metric_fid", "torch_fidelity.metric_kid", "torch_fidelity.metric_prc"
        )
    except ModuleNotFoundError as error:
        pytest.skip(f"torch-fidelity is not installed: {error}")


@pytest.fixture(scope="module")
def torchmetrics_image():
    """Its modules of FID and KID, which import torch_fidelity where that is installed: here it has been already."""
    with contextlib.suppress(ModuleNotFoundError):
        import_without_torchvision("torch_fidelity")
    pytest.importorskip("torchmetrics")
    return importlib.import_module("torchmetrics.image.fid"), importlib.import_module("torchmetrics.image.kid")


@pytest.fixture(scope="module", params=[(500, 400, 64), (300, 300, 8)], ids=str)
def features(request):
    """(samples, reference): correlated, and ReLU's, as a network's features are."""
    rows, reference_rows, width = request.param
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(width, width)) / np.sqrt(width)
    samples = np.maximum(generator.normal(0.2, 1.1, size=(rows, width)) @ mix, 0)
    return samples, np.maximum(generator.normal(size=(reference_rows, width)) @ mix, 0)


def test_frechet_is_torch_fidelitys(fidelity, features):
    fid = fidelity[0]
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(rows)) for rows in features]
    expected = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(*features) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_kid_of_all_rows_is_torch_fidelitys(fidelity, features):
    samples, reference = (rows[:300] for rows in features)
    settings = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    expected = fidelity[1].kid_features_to_metric(torch.from_numpy(samples), torch.from_numpy(reference), **settings)
    expected = expected["kernel_inception_distance_mean"]
    assert kernel_distance(samples, reference) == pytest.approx(expected, rel=TOLERANCE, abs=1e-9)
    assert kernel_distance_of_subsets(samples, reference, 2, 300)[0] == pytest.approx(expected, rel=TOLERANCE, abs=1e-9)


def test_kid_of_subsets_is_torch_fidelitys_within_their_noise(fidelity, features):
    settings = {"kid_subsets": 100, "kid_subset_size": 150, "verbose": False}
    expected = fidelity[1].kid_features_to_metric(*map(torch.from_numpy, features), **settings)
    mean, deviation = kernel_distance_of_subsets(*features, subsets=100, subset_size=150)
    assert abs(mean - expected["kernel_inception_distance_mean"]) < 4 * deviation / 10
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=0.4)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_precision_and_recall_are_torch_fidelitys(fidelity, features, k):
    expected = fidelity[2].prc_features_to_metric(*map(torch.from_numpy, features), prc_neighborhood=k, verbose=False)
    assert precision(*features, k) == pytest.approx(expected["precision"], abs=TOLERANCE)
    assert recall(*features, k) == pytest.approx(expected["recall"], abs=TOLERANCE)


class _Given(torch.nn.Module):
    """A feature network that gives back its input, so that torchmetrics measures our features."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, rows):
        return rows


def test_frechet_and_kid_are_torchmetrics(torchmetrics_image, features):
    fid, kid = torchmetrics_image
    samples, reference = (torch.from_numpy(rows[:300]) for rows in features)
    width = samples.shape[1]
    frechet = fid.FrechetInceptionDistance(_Given(width), input_img_size=(1, 1, 1)).set_dtype(torch.float64)
    kernel = kid.KernelInceptionDistance(_Given(width), subsets=1, subset_size=300).set_dtype(torch.float64)
    for metric in (frechet, kernel):
        metric.update(reference, real=True)
        metric.update(samples, real=False)
    ours = samples.numpy(), reference.numpy()
    assert frechet_distance(*ours) == pytest.approx(float(frechet.compute()), rel=TOLERANCE, abs=TOLERANCE)
    assert kernel_distance(*ours) == pytest.approx(float(kernel.compute()[0]), rel=TOLERANCE, abs=1e-7)
