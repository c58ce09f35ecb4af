"""What compute buys: loss or FID along the frontier as a power of compute, with an asymptote and without.

Which of y = k C^-p and y = E + k C^-p holds is chosen by leave-one-out cross-validation. Leaving the last budgets out
would be nearer to what the fit is for, but with a handful of budgets it is one number, which the noise of the last run
decides; leaving one out asks every budget, the last among them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smalti.errors import UserError
from smalti.scaling.huber import Theta, log_sum, refits
from smalti.scaling.intervals import Interval, Values, bootstrap_noise, percentile_interval

_FEWEST = 4
_SAME_BUDGET = 1.05  # budgets closer than this ratio are one
_NO_THRESHOLD = 1e6  # Huber's loss as least squares: a handful of points has no outliers to tell
_ABSENT = -30.0  # ln of an asymptote that is none

# theta = (ln E, ln of k C^-p at the mean ln C, p), y in units of its geometric mean
_LOWEST = np.array([_ABSENT, _ABSENT, -3.0])
_HIGHEST = np.array([5.0, 5.0, 3.0])


@dataclass(frozen=True)
class ComputeCurve:
    """y = asymptote + factor * C^-power, C in FLOPs."""

    asymptote: float
    factor: float
    power: float

    def at(self, flops: Values | float) -> Values:
        """y at budgets in FLOPs."""
        return np.asarray(self.asymptote + self.factor * np.power(flops, -self.power))


@dataclass(frozen=True)
class ComputeFit:
    """A curve fitted to what the budgets reached, and what it would have been had the noise fallen otherwise.

    cv_error is the root of the mean square of ln y's errors at budgets left out; residuals [budgets] are ln of the
    measured over the fitted y.
    """

    curve: ComputeCurve
    replicates: tuple[ComputeCurve, ...]
    cv_error: float
    residuals: Values

    def interval(self, of: Callable[[ComputeCurve], float], level: float = 0.95) -> Interval:
        """The interval of a number that follows from the curve, such as `lambda curve: curve.power`."""
        return percentile_interval(of(self.curve), np.array([of(curve) for curve in self.replicates]), level)

    def at(self, flops: float, level: float = 0.95) -> Interval:
        """The interval of y at a budget in FLOPs."""
        return self.interval(lambda curve: float(curve.at(flops)), level)


@dataclass(frozen=True)
class ComputeLaw:
    """Both fits, and whether cross-validation chose the one with an asymptote."""

    power: ComputeFit
    with_asymptote: ComputeFit
    asymptote_chosen: bool

    @property
    def chosen(self) -> ComputeFit:
        """The fit of the smaller cross-validation error."""
        return self.with_asymptote if self.asymptote_chosen else self.power


def fit_compute(flops: Values, y: Values, *, name: str = "loss", replicates: int = 300, seed: int = 0) -> ComputeLaw:
    """Both curves, fitted by least squares of ln y to a value y for each budget [budgets].

    Intervals are those of each curve as if it were the true one: which one is true they do not say. Raises UserError
    for fewer than four budgets, and for values that are not finite and above 0.
    """
    flops, y = np.asarray(flops, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(flops) != len(y):
        raise UserError(f"{len(flops)} budgets and {len(y)} values of {name}: give one each")
    for what, values in (("flops", flops), (name, y)):
        for bad in values[~(np.isfinite(values) & (values > 0))][:1]:
            raise UserError(f"{what}={bad:g} must be finite and above 0 for a power law of compute: leave it out")
    order = np.lexsort((y, flops))
    budgets = 1 + int((np.diff(np.log(flops[order])) > np.log(_SAME_BUDGET)).sum()) if len(flops) else 0
    if budgets < _FEWEST:
        raise UserError(f"{budgets} budgets are too few to fit {name} to compute: give {_FEWEST} or more")
    x, z = np.log(flops[order]), np.log(y[order])
    power, with_asymptote = (_fit(x, z, constants, replicates, seed) for constants in (2, 3))
    return ComputeLaw(power, with_asymptote, with_asymptote.cv_error < power.cv_error)


def _fit(x: Values, z: Values, constants: int, replicates: int, seed: int) -> ComputeFit:
    """The fit of ln y to ln C, sorted, of 2 constants (no asymptote) or 3."""
    centre_x, centre_z = float(x.mean()), float(z.mean())
    x, z = x - centre_x, z - centre_z
    theta = _best(x, z, constants)
    residuals, jacobian = _residuals(theta[None], x, z)
    noise, _ = bootstrap_noise(-residuals[0], jacobian[0, :, -constants:], replicates, seed)
    again = _refitted(np.tile(theta, (replicates, 1)), x, residuals[0] + z + noise, constants)
    left_out = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        without = _best(x[others], z[others], constants)
        left_out.append(float(_residuals(without[None], x[i : i + 1], z[i : i + 1])[0][0, 0]))
    curves = [_curve(one, centre_x, centre_z, constants) for one in (theta, *again)]
    return ComputeFit(curves[0], tuple(curves[1:]), float(np.sqrt(np.mean(np.square(left_out)))), -residuals[0])


def _residuals(theta: Theta, x: Values, z: Values) -> tuple[Values, Values]:
    """Residuals of ln y [replicates, budgets] and their derivatives by theta [replicates, budgets, 3]."""
    e, k, p = (theta[:, i, None] for i in range(3))
    log_y, shares = log_sum(np.stack([e + 0 * x, k - p * x], axis=-1))
    return log_y - z, np.concatenate([shares, -(shares[..., 1] * x)[..., None]], axis=-1)


def _refitted(start: Theta, x: Values, z: Values, constants: int) -> Theta:
    """theta [replicates, 3] nearest to starts, the asymptote held at none for 2 constants."""
    lowest, highest = _LOWEST.copy(), _HIGHEST.copy()
    if constants == 2:
        highest[0] = _ABSENT
    each = np.broadcast_to(z, (len(start), z.shape[-1]))
    _, theta = refits(start, lambda theta, rows: _residuals(theta, x, each[rows]), _NO_THRESHOLD, lowest, highest)
    return theta


def _best(x: Values, z: Values, constants: int) -> Theta:
    """theta [3] of the lowest cost, from asymptotes of several shares of y and several powers."""
    starts = np.array([[np.log(e), np.log(1 - e), p] for e in (1e-6, 0.3, 0.7, 0.95) for p in (-0.1, 0.05, 0.3, 1.0)])
    found = _refitted(starts if constants == 3 else starts[:1], x, z, constants)  # without asymptote all lead to one
    costs = (_residuals(found, x, z)[0] ** 2).sum(axis=1)
    return np.asarray(found[np.argmin(costs)])


def _curve(theta: Theta, centre_x: float, centre_z: float, constants: int) -> ComputeCurve:
    asymptote = float(np.exp(theta[0] + centre_z)) if constants == 3 else 0.0
    return ComputeCurve(asymptote, float(np.exp(theta[1] + centre_z + theta[2] * centre_x)), float(theta[2]))
