"""Figures with 95 % intervals: what another draw of the samples would give, measured by drawing from those there are.

The reference is held fixed: an interval is about the samples, and figures against one reference may be compared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
"""[rows, width]."""

REPLICATES = 200
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """A statistic of all rows, and of each resampling of them: float64 [replicates]."""

    value: float
    replicates: NDArray[np.float64]

    @property
    def centred(self) -> NDArray[np.float64]:
        """The replicates moved so that their mean is the value.

        Resampling repeats rows, which biases a distance between distributions upward (and leaves rows out, which
        biases a coverage downward): their spread is kept, their level is not.
        Source: Efron and Tibshirani 1993, chapter 10.
        """
        if not np.isfinite(self.value):
            return np.full_like(self.replicates, self.value)
        return np.asarray(self.replicates + (self.value - self.replicates.mean()))

    def estimate(self, lowest: float = -np.inf, highest: float = np.inf) -> Estimate:
        """The value with the 2.5 % and 97.5 % quantiles of the centred replicates, kept in [lowest, highest].

        The interval holds the value: at the end of what is possible, skewed replicates may lie all beyond it.
        """
        low, high = _quantiles(self.centred)
        return Estimate(self.value, min(self.value, max(lowest, low)), max(self.value, min(highest, high)))


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return float("inf"), float("inf")
    low, high = np.quantile(values, _LEVELS)
    return float(low), float(high)


def difference(a: Resampled, b: Resampled) -> Estimate:
    """a - b of two independent sets of samples, with the interval of the differences of their centred replicates.

    Raises ValueError where the replicates are not as many.
    """
    if not (np.isfinite(a.value) and np.isfinite(b.value)):
        value = 0.0 if a.value == b.value else float(a.value - b.value)
        return Estimate(value, value, value)
    return Estimate(a.value - b.value, *_quantiles(a.centred - b.centred))


def drawn_rows(rows: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.int64]:
    """Bootstrap draws: [replicates, rows] indices below rows, with replacement."""
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.integers(0, rows, (replicates, rows))


def drawn_counts(rows: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.float64]:
    """How often drawn_rows() draws each row: [replicates, rows]."""
    counts = [np.bincount(draw, minlength=rows) for draw in drawn_rows(rows, replicates, seed)]
    return np.array(counts, dtype=np.float64).reshape(replicates, rows)


def half_samples(rows: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.bool_]:
    """Half of the rows each time, without replacement: [replicates, rows].

    For statistics of nearest neighbours, which a row drawn twice makes meaningless. Half of n rows without replacement
    have the variance of n rows: s^2 / m (1 - m / n) at m = n / 2. Source: Shao and Wu 1989, delete-d jackknife.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    order = np.argsort(generator.random((replicates, rows)), axis=1)
    chosen = np.zeros((replicates, rows), dtype=np.bool_)
    np.put_along_axis(chosen, order[:, : rows // 2], True, axis=1)
    return chosen


def resampled_mean(values: NDArray[np.float64], replicates: int = REPLICATES, seed: int = 0) -> Resampled:
    """The mean of one value a sample, [rows], and its bootstrap replicates."""
    drawn = drawn_counts(len(values), replicates, seed)
    return Resampled(float(values.mean()), drawn @ values / len(values))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], rows: int, replicates: int = REPLICATES, seed: int = 0
) -> Estimate:
    """statistic(indices) on all rows, with a 95 % interval from resampled rows (see Resampled.centred)."""
    values = np.array([statistic(draw) for draw in drawn_rows(rows, replicates, seed)])
    return Resampled(statistic(np.arange(rows)), values).estimate()
