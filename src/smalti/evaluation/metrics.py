"""The metrics of features by name: what each says, which way is better, how many rows it needs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smalti.errors import UserError, unknown_name
from smalti.evaluation.frechet import resampled_frechet
from smalti.evaluation.intervals import REPLICATES, Estimate, Features, Resampled
from smalti.evaluation.kernel_distance import resampled_kernel_distance
from smalti.evaluation.manifolds import (
    resampled_coverage,
    resampled_density,
    resampled_precision,
    resampled_recall,
)

_FEWEST = 50  # rows of which nearest neighbours say something


@dataclass(frozen=True)
class Metric:
    """A metric of samples against a reference.

    resampled: (samples, reference, replicates, seed) -> its value and replicates; None for memorisation, which needs
    the training rows too. better: "lower", "higher", or "half" for a share that is best at 0.5. depends_on_count:
    whether its mean over draws changes with the number of samples, so that figures of other numbers do not compare.
    neighbours: its k, where it has one. lowest, highest: what it can be.
    """

    name: str
    title: str
    resampled: Callable[[Features, Features, int, int], Resampled] | None
    better: str
    depends_on_count: bool
    neighbours: int | None = None
    lowest: float = -np.inf
    highest: float = np.inf

    def fewest(self, width: int) -> int:
        """Rows, of the samples and of the reference, below which it is refused, for features of a width."""
        if self.name == "fd":
            return max(width + 1, 100)
        return 10 if self.name == "kid" else _FEWEST

    def estimate(self, resampled: Resampled) -> Estimate:
        """The figure with its interval, within what it can be."""
        return resampled.estimate(self.lowest, self.highest)


def _metrics() -> dict[str, Metric]:
    prdc = {
        "precision": (resampled_precision, 3, False, 1.0),
        "recall": (resampled_recall, 3, True, 1.0),
        "density": (resampled_density, 5, False, np.inf),
        "coverage": (resampled_coverage, 5, True, 1.0),
    }

    def with_neighbours(function: Callable[..., Resampled], k: int) -> Callable[..., Resampled]:
        return lambda samples, reference, replicates, seed: function(samples, reference, k, replicates, seed)

    metrics = [
        Metric("fd", "Frechet distance", resampled_frechet, "lower", True, lowest=0.0),
        Metric("kid", "kernel distance (KID)", resampled_kernel_distance, "lower", False),
    ]
    for name, (function, k, depends_on_count, highest) in prdc.items():
        resampled = with_neighbours(function, k)
        metrics.append(Metric(name, name, resampled, "higher", depends_on_count, k, 0.0, highest))
    metrics.append(Metric("memorisation", "memorisation", None, "half", False, lowest=0.0, highest=1.0))
    metrics.append(Metric("accuracy", "judge accuracy", None, "higher", False, lowest=0.0, highest=1.0))
    metrics.append(Metric("clip_score", "CLIP score", None, "higher", False, lowest=0.0, highest=100.0))
    return {metric.name: metric for metric in metrics}


METRICS = _metrics()
FEATURE_METRICS = tuple(name for name, metric in METRICS.items() if metric.resampled is not None)
"""Those that `resample` takes."""


def metric_named(name: str) -> Metric:
    """The metric of a name. Raises UserError for an unknown one."""
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]


def check_rows(metric: Metric, samples: int, reference: int, width: int) -> None:
    """Raise UserError where there are too few rows for a metric to say anything, with what to do instead."""
    fewest = metric.fewest(width)
    for what, rows in (("samples", samples), ("reference rows", reference)):
        if rows >= fewest:
            continue
        if metric.name != "fd":
            raise UserError(f"metric {metric.name!r} of {rows} {what}: at least {fewest} are needed; add more")
        reason = (
            f"their covariance of {width} features is singular below {width + 1} rows"
            if rows <= width
            else f"below {fewest} rows its bias is larger than what it measures"
        )
        raise UserError(
            f"metric 'fd' of {rows} {what}: at least {fewest} are needed, since {reason}; add more, or ask for 'kid', "
            "which is unbiased at any number"
        )


def resample(
    name: str, samples: Features, reference: Features, replicates: int = REPLICATES, seed: int = 0
) -> Resampled:
    """A metric of samples against a reference, both [rows, width] of one feature network, with its replicates.

    Raises UserError for an unknown metric, too few rows, or widths that differ.
    """
    metric = metric_named(name)
    if metric.resampled is None:
        raise unknown_name("metric of features", name, FEATURE_METRICS)
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f"samples have {samples.shape[1]} features and the reference {reference.shape[1]}: not one net")
    check_rows(metric, len(samples), len(reference), samples.shape[1])
    return metric.resampled(samples, reference, replicates, seed)
