"""Least Huber loss of logarithms: the law's fit from many starts, and the refits of many replicates at once.

The five constants are theta = (ln of each term of L(N, D) at the runs' mean ln N and ln D, alpha, beta), the losses in
units of their geometric mean: so the units of N, D and L change nothing, and the constants hardly hang together.
x and y are ln N and ln D less their means [runs], z is ln L less its mean [..., runs], theta is [..., 5].
"""

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from smalti.scaling.intervals import Values

Theta = Values
Rows = NDArray[np.intp]  # which replicates
PARAMETERS = 5
_LOWEST = np.array([-30.0, -30.0, -30.0, 1e-3, 1e-3])
_HIGHEST = np.array([5.0, 5.0, 5.0, 3.0, 3.0])
_SCALES = np.array([1.0, 1.0, 1.0, 0.3, 0.3])
_FIRST_THRESHOLD = 1e-3  # Hoffmann et al. 2022, section 3.3
_EFFICIENT = 1.345  # thresholds in standard deviations: 95 % of least squares' efficiency where noise is normal (Huber)
_MEDIAN_OF_NORMAL = 0.6745
_REFIT_STEPS = 100
_POLISHED = 3  # of the starts, by SciPy
_CONVERGED = 1e-9
_NO_GAIN = 1e-12  # of the cost


def log_sum(terms: Values) -> tuple[Values, Values]:
    """ln of the sum of exp(terms [..., terms]), and each term's share of the sum, its derivative."""
    largest = terms.max(axis=-1, keepdims=True)
    exps = np.exp(terms - largest)
    total = exps.sum(axis=-1, keepdims=True)
    return (largest + np.log(total))[..., 0], exps / total


def log_residuals(theta: Theta, x: Values, y: Values, z: Values) -> tuple[Values, Values]:
    """Residuals of ln L [..., runs] and their derivatives by theta [..., runs, 5]."""
    e, a, b, alpha, beta = (theta[..., i, None] for i in range(PARAMETERS))
    log_loss, shares = log_sum(np.stack([e + 0 * x, a - alpha * x, b - beta * y], axis=-1))
    by_exponents = np.stack([-shares[..., 1] * x, -shares[..., 2] * y], axis=-1)
    return log_loss - z, np.concatenate([shares, by_exponents], axis=-1)


def _starts() -> Theta:
    """Shares of the three terms at the runs' mean, and exponents: 20 starts [20, 5]."""
    shares = ((0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6), (0.01, 0.5, 0.5))
    exponents = itertools.product((0.2, 0.8), repeat=2)
    return np.array([[*np.log(share), *powers] for powers, share in itertools.product(exponents, shares)])


def _descend(start: Theta, x: Values, y: Values, z: Values, threshold: float) -> tuple[float, Theta]:
    """(cost, theta) of the minimum that a start leads to."""
    from scipy.optimize import least_squares

    found = least_squares(
        lambda theta: log_residuals(theta, x, y, z)[0],
        start,
        jac=lambda theta: log_residuals(theta, x, y, z)[1],
        bounds=(_LOWEST, _HIGHEST),
        loss="huber",
        f_scale=threshold,
        x_scale=_SCALES,
        max_nfev=300,
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )
    return float(found.cost), found.x


def robust_scale(residuals: Values) -> float:
    """The standard deviation of residuals [runs] by their median size, those fitted to naught left out.

    Source: Huber and Ronchetti, Robust Statistics, 2nd ed., section 7.8: the median of all but as many as constants.
    """
    return float(np.median(np.sort(np.abs(residuals))[PARAMETERS - 1 :]) / _MEDIAN_OF_NORMAL)


def least_huber(x: Values, y: Values, z: Values) -> tuple[float, Theta, float]:
    """(cost, theta, threshold) of the best fit.

    Hoffmann et al.'s threshold finds the scale of the residuals; the fit is made with the threshold that suits that
    scale, as theirs throws a third of the information away where noise is normal. Both fits are made from every start.
    """
    starts = _starts()
    every = np.broadcast_to(z, (len(starts), len(z)))
    costs, screened = law_refits(starts, x, y, every, _FIRST_THRESHOLD)
    scale = robust_scale(log_residuals(screened[np.argmin(costs)], x, y, z)[0])
    threshold = max(_FIRST_THRESHOLD, _EFFICIENT * scale)
    costs, screened = law_refits(starts, x, y, every, threshold)
    nearest = screened[np.argsort(costs, kind="stable")[:_POLISHED]]
    cost, theta = min((_descend(start, x, y, z, threshold) for start in nearest), key=lambda found: found[0])
    return cost, theta, threshold


def _huber(residuals: Values, threshold: float) -> Values:
    """SciPy's Huber cost, summed over runs [...]."""
    size = np.abs(residuals)
    costs: Values = np.where(size <= threshold, residuals**2 / 2, threshold * (size - threshold / 2))
    return np.asarray(costs.sum(axis=-1))


def law_refits(start: Theta, x: Values, y: Values, z: Values, threshold: float) -> tuple[Values, Theta]:
    """(cost [replicates], theta [replicates, 5]) of the losses z [replicates, runs], from starts [replicates, 5]."""
    return refits(start, lambda theta, rows: log_residuals(theta, x, y, z[rows]), threshold, _LOWEST, _HIGHEST)


def refits(
    start: Theta,
    residuals_of: Callable[[Theta, Rows], tuple[Values, Values]],
    threshold: float,
    lowest: Theta,
    highest: Theta,
) -> tuple[Values, Theta]:
    """(cost [replicates], theta [replicates, constants]) of the nearest minimum to each replicate's start.

    residuals_of gives residuals [rows, values] and their derivatives [rows, values, constants] of some replicates;
    constants stay within lowest and highest [constants]. Levenberg and Marquardt's steps with Huber's weights, for all
    replicates at once, each until it is settled: the same minima as SciPy's, which takes about fifty times as long one
    by one.
    """
    theta = np.clip(start, lowest, highest)
    rows = np.arange(len(theta))
    cost, damping = _huber(residuals_of(theta, rows)[0], threshold), np.full(len(theta), 1e-3)
    for _ in range(_REFIT_STEPS):
        residuals, jacobian = residuals_of(theta[rows], rows)
        weights = np.minimum(1, threshold / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[..., None]
        gradient = np.einsum("rnp,rn->rp", weighted, residuals)
        normal = np.matmul(weighted.swapaxes(1, 2), jacobian)
        held = ((theta[rows] <= lowest) & (gradient > 0)) | ((theta[rows] >= highest) & (gradient < 0))
        normal *= ~(held[:, :, None] | held[:, None, :])
        ridge = damping[rows, None] * np.einsum("rpp->rp", normal) + 1e-12 + held
        systems = normal + ridge[:, :, None] * np.eye(theta.shape[1])
        steps = np.linalg.solve(systems, (gradient * ~held)[..., None])[..., 0]
        tried = np.clip(theta[rows] - steps, lowest, highest)
        tried_cost = _huber(residuals_of(tried, rows)[0], threshold)
        better = tried_cost <= cost[rows]
        still = np.abs(tried - theta[rows]).max(axis=-1) < _CONVERGED
        no_gain = better & (damping[rows] < 1) & (cost[rows] - tried_cost <= _NO_GAIN * cost[rows])
        theta[rows[better]], cost[rows[better]] = tried[better], tried_cost[better]
        damping[rows] = np.clip(np.where(better, damping[rows] / 5, damping[rows] * 4), 1e-12, 1e12)
        rows = rows[~(still | no_gain)]
        if len(rows) == 0:
            break
    return cost, theta
