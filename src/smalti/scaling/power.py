"""Power laws of compute, y = factor * C^power, with their bootstrap replicates."""

from dataclasses import dataclass

import numpy as np

from smalti.scaling.intervals import Interval, Values, percentile_interval


@dataclass(frozen=True)
class Power:
    """y = factor * C^power, C in FLOPs."""

    factor: float
    power: float

    def at(self, flops: Values | float) -> Values:
        """y at budgets in FLOPs."""
        return np.asarray(self.factor * np.power(flops, self.power))


@dataclass(frozen=True)
class FittedPower:
    """A power law of compute, and what it would have been had the noise fallen otherwise."""

    law: Power
    replicates: tuple[Power, ...]

    def power(self, level: float = 0.95) -> Interval:
        """The interval of the exponent."""
        return percentile_interval(self.law.power, np.array([power.power for power in self.replicates]), level)

    def at(self, flops: float, level: float = 0.95) -> Interval:
        """The interval of y at a budget in FLOPs."""
        values = np.array([float(power.at(flops)) for power in self.replicates])
        return percentile_interval(float(self.law.at(flops)), values, level)


def fitted_power(flops: Values, y: Values, replicates: Values) -> FittedPower:
    """Least squares of ln y [budgets] on ln C, the same for replicates of ln y [replicates, budgets].

    Where replicates scatter unlike at the budgets, those that scatter less weigh more.
    """
    log_flops = np.log(flops)
    centre = log_flops.mean()
    spread = replicates.std(axis=0)
    weights = 1 / np.maximum(spread, 1e-9 + 1e-3 * spread.max())
    rows = np.concatenate([np.log(y)[None], replicates])
    powers, at_centre = np.polyfit(log_flops - centre, rows.T, 1, w=weights)
    laws = [Power(float(np.exp(c - p * centre)), float(p)) for p, c in zip(powers, at_centre, strict=True)]
    return FittedPower(laws[0], tuple(laws[1:]))
