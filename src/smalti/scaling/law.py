"""The scaling law of a family of runs, L(N, D) = E + A / N^alpha + B / D^beta, with intervals.

N is a network's parameters, D the pictures that it is trained on, L its held-out loss. Training on a picture costs
k N^gamma FLOPs, so that a budget C buys k N^gamma D = C; language models have gamma = 1 and k = 6 a token. Sources:
Hoffmann et al. 2022 ("Chinchilla", arXiv 2203.15556), eq. 2 and section 3.3; Besiroglu et al. 2024 (arXiv 2404.10102),
who found that paper's intervals too narrow by far, hence the bootstrap.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smalti.errors import UserError
from smalti.scaling.huber import PARAMETERS, Theta, law_refits, least_huber, log_residuals
from smalti.scaling.intervals import Interval, Values, bootstrap_noise, check_level, log_prediction, percentile_interval

_SAME_BUDGET = 1.05  # budgets closer than this ratio are one


@dataclass(frozen=True)
class Runs:
    """What was measured, a value each run: parameters n, pictures d, held-out loss, and FLOPs of the whole training.

    Arrays [runs]. Raises UserError for what no law can be fitted to.
    """

    n: Values
    d: Values
    loss: Values
    flops: Values

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("n", "d", "loss", "flops")}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{lengths}: give n, d, loss and flops one value each run")
        for name in lengths:
            values = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, values)
            for i in np.flatnonzero(~(np.isfinite(values) & (values > 0)))[:1]:
                raise UserError(
                    f"run {i} of {len(values)} (n={self.n[i]:g}, d={self.d[i]:g}): {name}={values[i]:g} must be finite "
                    "and above 0: leave failed runs out, and shift a loss that can be negative"
                )
        if len(self.loss) <= PARAMETERS:
            raise UserError(
                f"{len(self.loss)} runs are too few for a law of {PARAMETERS} constants: give {PARAMETERS + 1} or "
                "more, of several sizes and budgets"
            )
        if self.flops.max() < _SAME_BUDGET * self.flops.min():
            raise UserError(
                f"all {len(self.flops)} runs cost about {self.flops.mean():.3g} FLOPs: a law needs several budgets; "
                "add runs of 10 times more or fewer"
            )
        for name, values in (("sizes (n)", self.n), ("lengths (d)", self.d)):
            if (found := len(np.unique(values))) < 3:
                raise UserError(f"the runs are of {found} {name}: a law needs 3 or more")

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class Cost:
    """FLOPs of training on one picture: factor * N^power."""

    factor: float
    power: float

    @classmethod
    def of(cls, runs: Runs) -> "Cost":
        """Least squares on ln(flops / d) against ln n."""
        log_n = np.log(runs.n)
        power, at_zero = np.polyfit(log_n - log_n.mean(), np.log(runs.flops / runs.d), 1)
        return cls(float(np.exp(at_zero - power * log_n.mean())), float(power))

    def pictures(self, n: Values | float, flops: Values | float) -> Values:
        """Pictures that a budget trains networks of n parameters on."""
        return np.asarray(flops / (self.factor * np.power(n, self.power)))

    def misfit(self, runs: Runs) -> float:
        """The largest relative distance of a run's FLOPs from the fitted cost: 0.1 is 10 %."""
        return float(np.max(np.abs(runs.flops / (self.factor * runs.n**self.power * runs.d) - 1)))


@dataclass(frozen=True)
class Law:
    """L(N, D) = e + a / N^alpha + b / D^beta."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n: Values | float, d: Values | float) -> Values:
        """The loss of networks of n parameters on d pictures."""
        return np.asarray(self.e + self.a * np.power(n, -self.alpha) + self.b * np.power(d, -self.beta))

    def best(self, flops: float, cost: Cost) -> tuple[float, float]:
        """(N, D) of the lowest loss that a budget buys: N^(alpha + gamma beta) = alpha a / (gamma beta b) (C / k)^beta.

        Source: Hoffmann et al. 2022, eq. 4, there for gamma = 1 and k = 6; the zero of dL/dN on the budget's line.
        """
        gamma_beta = cost.power * self.beta
        log_n = np.log(self.alpha * self.a / (gamma_beta * self.b)) + self.beta * np.log(flops / cost.factor)
        n = float(np.exp(log_n / (self.alpha + gamma_beta)))
        return n, float(cost.pictures(n, flops))

    def n_exponent(self, cost: Cost) -> float:
        """p of N_opt = constant * C^p."""
        return self.beta / (self.alpha + cost.power * self.beta)

    def d_exponent(self, cost: Cost) -> float:
        """p of D_opt = constant * C^p."""
        return self.alpha / (self.alpha + cost.power * self.beta)


@dataclass(frozen=True)
class FittedLaw:
    """A law fitted to runs, and what it would have been had the noise fallen otherwise: its bootstrap replicates.

    residuals [runs] are ln of the measured over the fitted loss; huber_cost is their Huber loss, which the law
    minimises; replicate_scales [replicates] is the standard deviation of one run's ln L in each replicate.
    """

    runs: Runs
    law: Law
    cost: Cost
    replicates: tuple[Law, ...]
    residuals: Values
    replicate_scales: Values
    huber_cost: float

    def interval(self, of: Callable[[Law], float], level: float = 0.95) -> Interval:
        """The interval of a number that follows from the law, such as `lambda law: law.alpha`."""
        return percentile_interval(of(self.law), np.array([of(law) for law in self.replicates]), level)

    def band(self, of: Callable[[Law], Values], level: float = 0.95) -> tuple[Values, Values]:
        """The (low, high) ends of a curve that follows from the law, pointwise."""
        check_level(level)
        low, high = np.quantile([of(law) for law in self.replicates], [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def predict_loss(self, n: float, d: float, level: float = 0.95) -> Interval:
        """The interval of the loss of one new run: the law's own uncertainty and the scatter of runs about it."""
        means = np.log([float(law.loss(n, d)) for law in self.replicates])
        return log_prediction(float(self.law.loss(n, d)), means, self.replicate_scales, level)


def fit_law(runs: Runs) -> Law:
    """The law of least Huber loss on ln L, from many starts. Source: Hoffmann et al. 2022, eq. 3."""
    x, y, z = _centred(runs)
    return _law(least_huber(x, y, z)[1], runs)


def fit(runs: Runs, *, replicates: int = 300, seed: int = 0) -> FittedLaw:
    """The law, the runs' cost, and bootstrap replicates of the law.

    A replicate adds noise to the fitted losses: residuals drawn anew, each divided by sqrt(1 - leverage), which fitting
    has shrunk it by, and all of them by a draw of sqrt(chi^2 / degrees of freedom), so that a few runs give Student's
    intervals and not the normal ones. Runs' order does not matter. Source: Davison and Hinkley 1997, algorithm 6.3.
    Raises UserError for fewer than 20 replicates.
    """
    if replicates < 20:
        raise UserError(f"replicates={replicates} are too few for intervals: give 20 or more, as 300")
    order = np.lexsort((runs.loss, runs.d, runs.n))
    runs_in_order = Runs(runs.n[order], runs.d[order], runs.loss[order], runs.flops[order])
    x, y, z = _centred(runs_in_order)
    cost, theta, threshold = least_huber(x, y, z)
    residuals, jacobian = log_residuals(theta, x, y, z)
    noise, scales = bootstrap_noise(-residuals, jacobian, replicates, seed)
    _, thetas = law_refits(np.broadcast_to(theta, (replicates, PARAMETERS)), x, y, residuals + z + noise, threshold)
    law = _law(theta, runs)
    return FittedLaw(
        runs=runs,
        law=law,
        cost=Cost.of(runs),
        replicates=tuple(_law(theta, runs) for theta in thetas),
        residuals=np.log(runs.loss / law.loss(runs.n, runs.d)),
        replicate_scales=scales,
        huber_cost=cost,
    )


def _centred(runs: Runs) -> tuple[Values, Values, Values]:
    """ln n, ln d and ln loss, each less its mean."""
    x, y, z = (np.log(values) for values in (runs.n, runs.d, runs.loss))
    return x - x.mean(), y - y.mean(), z - z.mean()


def _law(theta: Theta, runs: Runs) -> Law:
    """The law of constants that were fitted to centred logarithms."""
    alpha, beta = float(theta[3]), float(theta[4])
    log_n, log_d, log_loss = (float(np.log(values).mean()) for values in (runs.n, runs.d, runs.loss))
    shifts = (log_loss, log_loss + alpha * log_n, log_loss + beta * log_d)
    e, a, b = (float(np.exp(constant + shift)) for constant, shift in zip(theta[:3], shifts, strict=True))
    return Law(e, a, b, alpha, beta)
