"""Inference time grids: which t the steps of a solver begin and end at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.errors import UserError, unknown_name

Times = NDArray[np.float64]


def log_snr_at(process: Process, t: float) -> float:
    """lambda(t) in float64, -inf and inf at the ends."""
    return float(process.log_snr(torch.tensor(t, dtype=torch.float64)))


def times_at(process: Process, log_snrs: Times) -> Times:
    """The t at which lambda takes the given values."""
    return np.asarray(process.t_of_log_snr(torch.tensor(log_snrs)).numpy(), dtype=np.float64)


def _even_time(process: Process, start: float, end: float, intervals: int) -> Times:
    return np.linspace(start, end, intervals + 1)


def _quadratic(process: Process, start: float, end: float, intervals: int) -> Times:
    return np.asarray(np.linspace(start**0.5, end**0.5, intervals + 1) ** 2)


def _beta(process: Process, start: float, end: float, intervals: int) -> Times:
    """Quantiles of Beta(0.6, 0.6) in t, dense at both ends. Source: Lee et al. 2024 (Beta Sampling), section 4."""
    try:
        from scipy.stats import beta
    except ImportError:
        raise UserError("spacing='beta' needs scipy: install smalti[eval]") from None
    return np.asarray(end + (start - end) * beta.ppf(np.linspace(1, 0, intervals + 1), 0.6, 0.6))


def _even_lambda(process: Process, start: float, end: float, intervals: int) -> Times:
    return times_at(process, np.linspace(log_snr_at(process, start), log_snr_at(process, end), intervals + 1))


def _karras(process: Process, start: float, end: float, intervals: int) -> Times:
    """A ramp of s^(1/7), s = sigma / alpha. Source: EDM (Karras et al. 2022), eq. 5."""
    rho = 7.0
    first, last = (math.exp(-log_snr_at(process, t) / rho) for t in (start, end))
    return times_at(process, -rho * np.log(np.linspace(first, last, intervals + 1)))


# sigma / alpha of the 11 nodes of 10 steps for Stable Diffusion 1.5. Source: Sabour et al. 2024 (Align Your Steps).
_AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def _align_your_steps(process: Process, start: float, end: float, intervals: int) -> Times:
    """The published list read as a curve of lambda, followed from start to end (or its own ends, where it is shorter).

    Other counts are interpolated in lambda, as its authors do; its last node stands for t = 0.
    """
    curve = -np.log(_AYS_SD15)
    ends = [log_snr_at(process, start), log_snr_at(process, end) if end > 0.0 else math.inf]
    first, last = np.interp(ends, curve, np.arange(len(curve))).tolist()
    return times_at(process, np.interp(np.linspace(first, last, intervals + 1), np.arange(len(curve)), curve))


@dataclass(frozen=True)
class _Spacing:
    """nodes(process, start, end, intervals) -> intervals + 1 times; whether it needs a finite lambda at both ends."""

    nodes: Callable[[Process, float, float, int], Times]
    finite: bool = False


_SPACINGS: dict[str, _Spacing] = {
    "time": _Spacing(_even_time),
    "quadratic": _Spacing(_quadratic),
    "beta": _Spacing(_beta),
    "lambda": _Spacing(_even_lambda, True),
    "exponential": _Spacing(_even_lambda, True),
    "karras": _Spacing(_karras, True),
    "ays": _Spacing(_align_your_steps),
}


def spacings() -> tuple[str, ...]:
    """The known spacings."""
    return tuple(_SPACINGS)


def time_grid(
    process: Process,
    num_inference_steps: int,
    spacing: str = "time",
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    shift: float = 1.0,
    last_node: float | None = None,
) -> Times:
    """num_inference_steps + 1 falling times, from t_start (default: process.t_max) to t_end (default: 0, the data).

    spacing: "time" and "quadratic" space t evenly and by squares, "beta" by quantiles of Beta(0.6, 0.6). "lambda"
    spaces the half-log-SNR evenly ("exponential", even in ln(sigma / alpha), is the same), "karras" is EDM's ramp in
    sigma / alpha with rho = 7; with t_end at 0, where lambda is infinite, their last step goes from process.t_min to 0,
    and a t_start past process.t_max takes that one's place in the ramp. "ays" is Align Your Steps' list for Stable
    Diffusion 1.5.
    last_node: with t_end at 0, the t that the last step goes from, in place of the spacing's own.
    shift: every node but the two ends is moved by -ln(shift) in lambda, once; above 1 is more steps at high noise.
    Source of the shift: SD3 (Esser et al. 2024), eq. 23, whose s' = k s / (1 + (k - 1) s) this is for rectified flow.
    Raises UserError for an unknown spacing, steps < 1, times out of order, shift <= 0 and a shift past an end.
    """
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps!r} must be a whole number of at least 1")
    if spacing not in _SPACINGS:
        raise unknown_name("spacing", spacing, _SPACINGS)
    kind = _SPACINGS[spacing]
    start = process.t_max if t_start is None else float(t_start)
    end = 0.0 if t_end is None else float(t_end)
    if not 0.0 <= end < start <= 1.0:
        raise UserError(f"t_start={start}, t_end={end}: needed is 0 <= t_end < t_start <= 1")
    if not 0.0 < shift < math.inf:
        raise UserError(f"shift={shift} must be above 0 and finite; 1 is no shift")
    if end == 0.0 and (kind.finite or last_node is not None):
        if num_inference_steps > 1:
            before = process.t_min if last_node is None else last_node
            inner = _nodes(kind, process, start, before, num_inference_steps - 1, f"spacing={spacing!r}")
        else:
            inner = np.array([start])
        times = np.append(inner, 0.0)
    else:
        times = _nodes(kind, process, start, end, num_inference_steps, f"spacing={spacing!r}")
    if shift != 1.0 and num_inference_steps > 1:
        log_snrs = np.array([log_snr_at(process, t) for t in times[1:-1]])
        times[1:-1] = times_at(process, log_snrs - math.log(shift))
        if not np.all(np.diff(times) < 0.0):
            raise UserError(
                f"shift={shift} moves nodes of spacing={spacing!r} past t_start={start} or t_end={end}: "
                "take a shift nearer 1, fewer steps, or a spacing with room there"
            )
    return times


def _nodes(kind: _Spacing, process: Process, start: float, end: float, intervals: int, field: str) -> Times:
    """The spacing's nodes with its ends snapped to start and end, checked to fall."""
    first = min(start, process.t_max) if kind.finite else start
    if kind.finite and not math.isfinite(log_snr_at(process, first)):
        first -= 1e-3  # a table that ends at pure noise
    if not end < first:
        raise UserError(f"t_start={start}: {field} needs a t_start above {end} here")
    times = kind.nodes(process, first, end, intervals)
    times[0], times[-1] = start, end
    if not np.all(np.diff(times) < 0.0):
        raise UserError(f"{field} has no {intervals} falling steps between t_start={start} and {end}: take fewer steps")
    return times


def explicit_grid(times: Sequence[float]) -> Times:
    """Times given by hand as a grid: at least two, falling strictly, within [0, 1]. Raises UserError otherwise."""
    try:
        grid = np.array(times, dtype=np.float64)
    except (TypeError, ValueError):
        grid = np.zeros(0)
    if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) < 0.0) or grid[0] > 1.0 or grid[-1] < 0.0:
        raise UserError(f"times={times!r} must be two or more numbers that fall strictly within [0, 1]")
    return grid
