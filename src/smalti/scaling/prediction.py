"""The best run of a budget that was not measured: its size, its length and its loss, with intervals."""

import math
from dataclasses import dataclass

from smalti.errors import UserError
from smalti.scaling.intervals import Interval
from smalti.scaling.law import FittedLaw

_FARTHEST = 100.0  # times the largest measured budget, beyond which a prediction is warned of
_SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class Prediction:
    """The best run that a budget buys.

    n parameters, d pictures; loss is the law's at that run, run_loss what one such run will have: the same value, with
    the scatter of runs in its interval. extrapolation is the budget over the largest measured.
    """

    flops: float
    n: Interval
    d: Interval
    loss: Interval
    run_loss: Interval
    extrapolation: float
    level: float
    warning: str | None


def predict(fitted: FittedLaw, flops: float, *, level: float = 0.95) -> Prediction:
    """The best run of a budget in FLOPs. Raises UserError for a budget that is not finite and above 0."""
    _check(flops=flops)
    n, d = fitted.law.best(flops, fitted.cost)
    extrapolation = float(flops / fitted.runs.flops.max())
    return Prediction(
        flops=float(flops),
        n=fitted.interval(lambda law: law.best(flops, fitted.cost)[0], level),
        d=fitted.interval(lambda law: law.best(flops, fitted.cost)[1], level),
        loss=fitted.interval(lambda law: float(law.loss(n, d)), level),
        run_loss=fitted.predict_loss(n, d, level),
        extrapolation=extrapolation,
        level=level,
        warning=None if extrapolation <= _FARTHEST else _warning(flops, extrapolation),
    )


def flops_from_hours(hours: float, peak_flops_per_second: float, mfu: float) -> float:
    """FLOPs that device hours buy, at the device's peak and the share of it that training uses (mfu, in (0, 1])."""
    _check(hours=hours, peak_flops_per_second=peak_flops_per_second, mfu=mfu)
    if mfu > 1:
        raise UserError(f"mfu={mfu:g} must not be above 1: it is the share of the peak that training uses, as 0.4")
    return hours * _SECONDS_AN_HOUR * peak_flops_per_second * mfu


def flops_from_money(money: float, price_per_hour: float, peak_flops_per_second: float, mfu: float) -> float:
    """FLOPs that money buys, at a price of one device's hour in the same currency."""
    _check(money=money, price_per_hour=price_per_hour)
    return flops_from_hours(money / price_per_hour, peak_flops_per_second, mfu)


def _check(**amounts: float) -> None:
    for name, amount in amounts.items():
        if not (math.isfinite(amount) and amount > 0):
            raise UserError(f"{name}={amount:g} must be finite and above 0")


def _warning(flops: float, extrapolation: float) -> str:
    return (
        f"{flops:.3g} FLOPs are {extrapolation:.0f} times the largest measured budget: the intervals hold only if the "
        f"law does that far out; measure a run of {flops / _FARTHEST:.2g} FLOPs or more first"
    )
