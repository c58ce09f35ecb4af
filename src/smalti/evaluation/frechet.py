"""The Frechet distance between two sets of features (FID, FD-DINOv2, by what computed the features)."""

import numpy as np
from numpy.typing import NDArray

from smalti.evaluation.intervals import REPLICATES, Features, Resampled, drawn_counts


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
    root_a = _square_root(covariance_a)
    cross = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(mean_gap @ mean_gap + trace)


def _square_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def resampled_frechet(samples: Features, reference: Features, replicates: int = REPLICATES, seed: int = 0) -> Resampled:
    """frechet_distance of samples [rows, width] to a fixed reference, and of samples drawn from them with replacement.

    With Z = samples B^(1/2), which is computed once, tr (A B)^(1/2) is the sum of the singular values of the centred Z
    over (rows - 1)^(1/2): a replicate costs the eigenvalues of a matrix of the smaller of width and rows.
    """
    value = frechet_distance(samples, reference)
    if not np.isfinite(value):
        return Resampled(value, np.full(replicates, value))
    rows, width = samples.shape
    reference_mean, covariance = reference.mean(axis=0), np.cov(reference, rowvar=False)
    centred = samples - reference_mean
    turned = centred @ _square_root(covariance)
    lengths = (centred**2).sum(axis=1)
    gram = turned @ turned.T if rows < width else None
    values = []
    for counts in drawn_counts(rows, replicates, seed):
        weights = counts / rows
        mean_gap = weights @ centred
        own_trace = (weights @ lengths - mean_gap @ mean_gap) * rows / (rows - 1)
        if gram is None:
            mean = weights @ turned
            spread = (turned.T * weights) @ turned - np.outer(mean, mean)
        else:
            drawn = np.flatnonzero(counts)
            spread = _centred_gram(gram[np.ix_(drawn, drawn)], weights[drawn])
        cross = np.linalg.eigvalsh(spread * (rows / (rows - 1)))
        roots = np.sqrt(np.clip(cross, 0, None)).sum()
        values.append(mean_gap @ mean_gap + own_trace + np.trace(covariance) - 2 * roots)
    return Resampled(value, np.array(values))


def _centred_gram(gram: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """W^(1/2) (Z - mean) (Z - mean)^T W^(1/2) from Z Z^T: it has the weighted covariance's eigenvalues, but for 0s."""
    to_mean = gram @ weights
    centred = gram - to_mean[:, None] - to_mean[None] + weights @ to_mean
    roots = np.sqrt(weights)
    return np.asarray(centred * roots[:, None] * roots[None])
