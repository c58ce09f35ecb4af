"""Are the samples copies of training rows? Distances to the nearest one, beside those of rows that were held out.

Source: Meehan, Chaudhuri and Dasgupta 2020, "A non-parametric test to detect data-copying in generative models",
section 3: the Mann-Whitney statistic of the two sets of distances.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smalti.evaluation.intervals import REPLICATES, Features, Resampled, resampled_mean
from smalti.evaluation.neighbours import nearest_rows

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Memorisation:
    """How near samples lie to training rows.

    share: chance that a sample lies nearer to its nearest training row than a held-out row does to its own. 0.5 of
    samples that are as new as held-out rows, 1 of copies. suspects: share of samples nearer than all but 1 % of
    held-out rows; 0.01 of new ones. quantiles (of QUANTILES) of either's distances. nearest [samples] and distances
    [samples]: the training row nearest to each sample. worst: the samples, nearest to a training row first.
    """

    share: Resampled
    suspects: float
    sample_quantiles: tuple[float, ...]
    held_out_quantiles: tuple[float, ...]
    nearest: NDArray[np.int64]
    distances: NDArray[np.float64]

    @property
    def worst(self) -> NDArray[np.int64]:
        """Samples in order of their distance, the nearest to a training row first: [samples]."""
        return np.argsort(self.distances, kind="stable")

    def text(self) -> str:
        """One line for a person."""
        share = self.share.estimate(0.0, 1.0)
        return (
            f"nearer to a training row than held-out rows are: {share.value:.1%} "
            f"(95 %: {share.low:.1%} .. {share.high:.1%}; new pictures 50 %); nearer than all but 1 % of them: "
            f"{self.suspects:.1%}"
        )


def memorisation(
    samples: Features,
    training: Features,
    held_out: Features,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Memorisation:
    """How near samples lie to training rows, in whatever space the features [rows, width] are of.

    Rows of samples that are not finite count as infinitely far.
    """
    finite = np.isfinite(samples).all(axis=1)
    nearest, distances = np.zeros(len(samples), dtype=np.int64), np.full(len(samples), np.inf)
    if finite.any():
        nearest[finite], distances[finite] = nearest_rows(samples[finite], training)
    held_out_distances = np.sort(nearest_rows(held_out, training)[1])
    below = np.searchsorted(held_out_distances, distances, side="right")
    tied = below - np.searchsorted(held_out_distances, distances, side="left")
    farther = (len(held_out) - below + 0.5 * tied) / len(held_out)
    return Memorisation(
        share=resampled_mean(farther, replicates, seed),
        suspects=float((distances < np.quantile(held_out_distances, 0.01)).mean()),
        sample_quantiles=_quantiles(distances),
        held_out_quantiles=_quantiles(held_out_distances),
        nearest=nearest,
        distances=distances,
    )


def _quantiles(distances: NDArray[np.float64]) -> tuple[float, ...]:
    ordered = np.sort(distances)  # by rank, since between infinite values there is nothing to interpolate
    return tuple(float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES)
