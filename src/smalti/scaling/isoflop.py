"""IsoFLOP parabolas: runs of one budget and several sizes, ln loss as a parabola in ln N, its minimum the best size.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), section 3.2. Three or four runs say little of their own noise, so its
size is taken from the residuals of all slices together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smalti.errors import UserError
from smalti.scaling.intervals import Interval, Values, noise_widths, percentile_interval
from smalti.scaling.law import Runs
from smalti.scaling.power import FittedPower, fitted_power

_CONSTANTS = 3  # of a parabola
_NOISE = 3  # stream of random numbers
_NEAREST, _FARTHEST = 2.0, 16.0  # sizes to add, times the slice's last
_REPLICATES_REACH = math.log(100.0)  # beyond a slice's sizes, where a replicate's parabola has its minimum far out


@dataclass(frozen=True)
class Slice:
    """Runs that were planned for one budget, by size: n, d, loss and flops [runs]."""

    budget: float
    n: Values
    d: Values
    loss: Values
    flops: Values

    @property
    def mean_flops(self) -> float:
        """The FLOPs that its runs took, their geometric mean."""
        return float(np.exp(np.log(self.flops).mean()))

    def __str__(self) -> str:
        return f"slice {self.budget:.3g} FLOPs"


@dataclass(frozen=True)
class Minimum:
    """The best run of a slice, n, d and loss, or the problem that leaves it without.

    add_n is the size to add where the lowest loss is at the slice's edge. For drawing: ln loss = coefficients . (u^2,
    u, 1), u = ln n - centre. replicates [replicates, 3] are ln n, ln d and ln loss of the minimum.
    """

    slice: Slice
    problem: str | None = None
    add_n: float | None = None
    n: Interval | None = None
    d: Interval | None = None
    loss: Interval | None = None
    centre: float | None = None
    coefficients: tuple[float, float, float] | None = None
    replicates: Values | None = None


@dataclass(frozen=True)
class Frontier:
    """Power laws of compute through the minima of the slices: best parameters n, best pictures d."""

    minima: tuple[Minimum, ...]
    n: FittedPower
    d: FittedPower


def slices(runs: Runs, budgets: Sequence[float]) -> tuple[Slice, ...]:
    """Runs grouped by the budget that each was planned for, one a run; smallest budget first, smallest size first.

    Raises UserError for another count of budgets than of runs.
    """
    if len(budgets) != len(runs):
        raise UserError(f"{len(budgets)} budgets for {len(runs)} runs: give each run's budget")
    planned = np.asarray(budgets, dtype=np.float64)
    groups = []
    for budget in np.unique(planned):
        members = np.flatnonzero(planned == budget)
        members = members[np.lexsort((runs.loss[members], runs.n[members]))]
        groups.append(Slice(float(budget), runs.n[members], runs.d[members], runs.loss[members], runs.flops[members]))
    return tuple(groups)


def minima(
    groups: Sequence[Slice], *, noise: float | None = None, replicates: int = 300, seed: int = 0, level: float = 0.95
) -> tuple[Minimum, ...]:
    """The minimum of each slice, or its problem in words.

    noise is the standard deviation of one run's ln loss, where repeated runs or a fitted law tell it; without it the
    residuals of all parabolas do. Raises UserError where neither tells, as no slice has more than three sizes.
    """
    parabolas = [_parabola(one) for one in groups]
    fitted = [parabola for parabola in parabolas if parabola is not None]
    squares = sum(float((parabola.residuals**2).sum()) for parabola in fitted)
    freedom = sum(len(parabola.residuals) - _CONSTANTS for parabola in fitted)
    if noise is not None:
        scales = np.full(replicates, noise)
    elif freedom > 0:
        scales = noise_widths(freedom, replicates, seed) * math.sqrt(squares / freedom)
    elif fitted:
        raise UserError(
            f"no slice has more than {_CONSTANTS} runs, through which a parabola goes exactly, so that nothing tells "
            "the runs' noise: add a size to a slice, or give noise"
        )
    return tuple(
        Minimum(one, f"{one}: {len(np.unique(one.n))} sizes; a parabola needs {_CONSTANTS}: add some")
        if parabola is None
        else _minimum(one, parabola, scales[:, None] * _drawn(one, replicates, seed), level)
        for one, parabola in zip(groups, parabolas, strict=True)
    )


def frontier(found: Sequence[Minimum]) -> Frontier:
    """The power laws of N_opt and D_opt through the minima of slices, those with problems left out.

    Raises UserError, with the problems, where fewer than two slices have a minimum.
    """
    good = [minimum for minimum in found if minimum.problem is None]
    if len(good) < 2:
        problems = "; ".join(minimum.problem for minimum in found if minimum.problem is not None)
        raise UserError(f"{len(good)} of {len(found)} slices have a minimum, a power law needs 2: {problems}")
    replicates = np.stack([minimum.replicates for minimum in good if minimum.replicates is not None])
    flops = np.array([minimum.slice.mean_flops for minimum in good])
    n = np.array([minimum.n.value for minimum in good if minimum.n is not None])
    d = np.array([minimum.d.value for minimum in good if minimum.d is not None])
    return Frontier(
        tuple(found), fitted_power(flops, n, replicates[:, :, 0].T), fitted_power(flops, d, replicates[:, :, 1].T)
    )


def checked(found: Sequence[Minimum]) -> tuple[Minimum, ...]:
    """The minima as they came. Raises UserError for the first that has a problem."""
    for minimum in found:
        if minimum.problem is not None:
            raise UserError(minimum.problem)
    return tuple(found)


@dataclass(frozen=True)
class _Parabola:
    """ln loss = coefficients . (u^2, u, 1) at u = ln n - centre; residuals [runs]."""

    centre: float
    u: Values
    coefficients: Values
    residuals: Values


def _parabola(one: Slice) -> _Parabola | None:
    if len(np.unique(one.n)) < _CONSTANTS:
        return None
    centre = float(np.log(one.n).mean())
    u = np.log(one.n) - centre
    coefficients = np.polyfit(u, np.log(one.loss), 2)
    return _Parabola(centre, u, coefficients, np.log(one.loss) - np.polyval(coefficients, u))


def _drawn(one: Slice, replicates: int, seed: int) -> Values:
    """Standard normal noise [replicates, runs] of a slice, addressed by its budget."""
    address = int(np.float64(one.budget).view(np.uint64))
    return np.random.default_rng([seed, _NOISE, address]).standard_normal((replicates, len(one.n)))


def _minimum(one: Slice, parabola: _Parabola, noise: Values, level: float) -> Minimum:
    curvature, slope, _ = parabola.coefficients
    drawing = (float(curvature), float(slope), float(parabola.coefficients[2]))
    u = parabola.u
    vertex = float(-slope / (2 * curvature)) if curvature > 0 else math.nan
    at_edge = {0: ("smallest", -1), len(u) - 1: ("largest", 1)}.get(int(np.argmin(one.loss)))
    outside = at_edge is None and not u[0] < vertex < u[-1] and curvature > 0
    if at_edge is not None or outside:
        edge, side = at_edge or (("smallest", -1) if vertex <= u[0] else ("largest", 1))
        last = u[0] if side < 0 else u[-1]
        # As far beyond the parabola's minimum as the last size lies before it.
        step = abs(2 * (vertex - last)) if curvature > 0 and side * (vertex - last) > 0 else 0.0
        add_n = float(np.exp(parabola.centre + last + side * np.clip(step, math.log(_NEAREST), math.log(_FARTHEST))))
        what = f"its lowest loss is at its {edge} size" if at_edge else f"its parabola is lowest beyond its {edge} size"
        last_n = one.n[0] if side < 0 else one.n[-1]
        problem = f"{one}: {what} N={last_n:.3g}: add a size of about N={add_n:.2g}"
        return Minimum(one, problem, add_n, centre=parabola.centre, coefficients=drawing)
    if curvature <= 0:
        problem = f"{one}: its losses do not rise to both sides of a size: add smaller and larger sizes, or repeat runs"
        return Minimum(one, problem, centre=parabola.centre, coefficients=drawing)
    replicates = np.polyfit(u, (np.polyval(parabola.coefficients, u) + noise).T, 2)
    rows = np.concatenate([parabola.coefficients[:, None], replicates], axis=1)
    at = _vertices(rows, float(u[0]) - _REPLICATES_REACH, float(u[-1]) + _REPLICATES_REACH)
    log_d = np.polyval(np.polyfit(u, np.log(one.d), 1), at)
    logs = np.stack([at + parabola.centre, log_d, rows[0] * at**2 + rows[1] * at + rows[2]], axis=1)
    n, d, loss = (percentile_interval(v[0], v[1:], level) for v in np.exp(logs).T)
    return Minimum(one, None, None, n, d, loss, parabola.centre, drawing, logs[1:])


def _vertices(coefficients: Values, lowest: float, highest: float) -> Values:
    """Where parabolas [3, replicates] are lowest within a range; those that open downward at an end of it."""
    curvature, slope, _ = coefficients
    upward = curvature > 0
    inner = -slope / np.where(upward, 2 * curvature, 1.0)
    return np.clip(np.where(upward, inner, np.where(slope > 0, lowest, highest)), lowest, highest)
