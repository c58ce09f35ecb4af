"""KID: the squared maximum mean discrepancy with a polynomial kernel of degree 3. Unbiased at any number of rows.

Sources: Binkowski et al. 2018, "Demystifying MMD GANs", section 4; Gretton et al. 2012, lemma 6.
"""

import numpy as np
from numpy.typing import NDArray

from smalti.evaluation.intervals import REPLICATES, Features, Resampled, drawn_counts

_BLOCK = 2000  # rows of a kernel matrix that are held at once


def polynomial_kernel(a: Features, b: Features) -> NDArray[np.float64]:
    """(a . b / width + 1)^3 of each pair of rows: [rows of a, rows of b]."""
    return np.asarray((a @ b.T / a.shape[1] + 1.0) ** 3)


def kernel_distance(samples: Features, reference: Features) -> float:
    """KID of all rows [rows, width]: the mean kernel within either set less twice that between them.

    A row is not paired with itself, so the mean over draws is the distributions' own and values below 0 are possible.
    Features that are not all finite (a sampler that diverged) are infinitely far.
    """
    return resampled_kernel_distance(samples, reference, replicates=0).value


def resampled_kernel_distance(
    samples: Features, reference: Features, replicates: int = REPLICATES, seed: int = 0
) -> Resampled:
    """kernel_distance to a fixed reference, and of samples drawn from these with replacement.

    A replicate pairs distinct rows only: one drawn twice is not paired with itself. Kernels are computed once.
    """
    if not (np.isfinite(samples).all() and np.isfinite(reference).all()):
        return Resampled(float("inf"), np.full(replicates, np.inf))
    rows = len(samples)
    counts = np.concatenate([np.ones((1, rows)), drawn_counts(rows, replicates, seed)])
    within, between = np.zeros(len(counts)), np.zeros(len(counts))
    for start in range(0, rows, _BLOCK):
        block = slice(start, start + _BLOCK)
        kernel = polynomial_kernel(samples[block], samples)
        kernel[np.arange(len(kernel)), start + np.arange(len(kernel))] = 0.0
        within += ((counts[:, block] @ kernel) * counts).sum(axis=1)
        between += counts[:, block] @ polynomial_kernel(samples[block], reference).mean(axis=1)
    within /= rows**2 - (counts**2).sum(axis=1)
    values = within + _mean_of_distinct_pairs(reference) - 2 * between / rows
    return Resampled(float(values[0]), values[1:])


def _mean_of_distinct_pairs(rows: Features) -> float:
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        own = ((part**2).sum(axis=1) / rows.shape[1] + 1.0) ** 3
        total += polynomial_kernel(part, rows).sum() - own.sum()
    return float(total / (len(rows) * (len(rows) - 1)))


def kernel_distance_of_subsets(
    samples: Features, reference: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of the KID of `subsets` draws of subset_size rows of either set, as papers report it.

    The mean estimates what kernel_distance does, less exactly. The deviation is that of a subset and not of the figure.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    values = [
        kernel_distance(
            samples[generator.choice(len(samples), subset_size, replace=False)],
            reference[generator.choice(len(reference), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))
