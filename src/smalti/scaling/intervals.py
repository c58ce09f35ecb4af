"""Values with the interval that their bootstrap replicates give them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smalti.errors import UserError

Values = NDArray[np.float64]
_WIDTHS, _RESIDUALS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Interval:
    """An estimate, and the ends of the interval that holds the truth with a stated probability."""

    value: float
    low: float
    high: float

    def __contains__(self, truth: float) -> bool:
        return self.low <= truth <= self.high


def check_level(level: float) -> None:
    """Raises UserError unless a level of confidence lies between 0 and 1."""
    if not 0 < level < 1:
        raise UserError(
            f"level={level} must lie between 0 and 1: 0.95 for intervals that hold the truth 95 times in 100"
        )


def percentile_interval(value: float, replicates: Values, level: float) -> Interval:
    """The interval between the percentiles of replicates [replicates] of a value."""
    check_level(level)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def log_prediction(value: float, log_means: Values, scales: Values, level: float) -> Interval:
    """The interval of a new value whose logarithm is normal about each replicate's mean [replicates], scales alike."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    check_level(level)
    lowest, highest = (log_means - 40 * scales).min() - 1e-9, (log_means + 40 * scales).max() + 1e-9
    ends = [
        float(np.exp(brentq(lambda log, p=p: norm.cdf(log, log_means, scales).mean() - p, lowest, highest)))
        for p in ((1 - level) / 2, (1 + level) / 2)
    ]
    return Interval(value, *ends)


def bootstrap_noise(residuals: Values, jacobian: Values, replicates: int, seed: int) -> tuple[Values, Values]:
    """(noise [replicates, values], its standard deviation [replicates]) of a fit's residuals and derivatives.

    A replicate's numbers depend on (seed, replicate) alone, not on how many replicates there are.
    """
    count, parameters = jacobian.shape
    basis, sizes, _ = np.linalg.svd(jacobian, full_matrices=False)
    leverages = (basis[:, sizes > 1e-9 * sizes.max()] ** 2).sum(axis=1)
    corrected = residuals / np.sqrt(np.maximum(1 - leverages, 0.02))
    corrected = corrected - corrected.mean()
    freedom = max(1, count - parameters)
    widths = noise_widths(freedom, replicates, seed)
    drawn = np.random.default_rng([seed, _RESIDUALS]).choice(corrected, (replicates, count))
    return widths[:, None] * drawn, widths * corrected.std()


def noise_widths(freedom: int, replicates: int, seed: int) -> Values:
    """Draws of sqrt(freedom / chi^2) [replicates]: with them normal noise becomes Student's."""
    chi_squared = np.random.default_rng([seed, _WIDTHS]).chisquare(freedom, replicates)
    return np.asarray(np.sqrt(freedom / chi_squared))
