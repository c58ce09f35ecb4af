"""The Frechet distance between two sets of features, and bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: Features, b: Features) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for features [rows, width], float64.

    The trace of the square root is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2).
    Source: Heusel et al. 2017, eq. 6. Two samples of one distribution do not score 0: the finite rows cost something.
    Features that are not all finite (a sampler that diverged) are infinitely far.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    mean_gap = a.mean(axis=0) - b.mean(axis=0)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(mean_gap @ mean_gap + trace)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], rows: int, replicates: int = 200, seed: int = 0
) -> Estimate:
    """statistic(indices) on all rows, with a 95 % interval from resampled rows.

    The interval is the replicates' spread moved onto the estimate, since resampling biases a Frechet distance upward.
    Source: Efron and Tibshirani 1993, chapter 10.
    """
    value = statistic(np.arange(rows))
    generator = np.random.Generator(np.random.Philox(seed))
    replicate_values = np.array([statistic(generator.integers(0, rows, rows)) for _ in range(replicates)])
    shift = value - replicate_values.mean()
    low, high = np.quantile(replicate_values + shift, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
