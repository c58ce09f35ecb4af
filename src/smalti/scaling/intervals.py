"""Values with the interval that their bootstrap replicates give them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smalti.errors import UserError

Values = NDArray[np.float64]


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
