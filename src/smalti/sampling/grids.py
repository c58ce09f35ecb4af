"""Inference time grids: which t the steps of a solver begin and end at."""

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.diffusion.processes import Process
from smalti.types import UserError, unknown_name

Spacing = Literal["time", "lambda", "quadratic"]


def spacings() -> tuple[str, ...]:
    """The known spacings."""
    return get_args(Spacing)


def log_snr_at(process: Process, t: float) -> float:
    """lambda(t) in float64, -inf and inf at the ends."""
    return float(process.log_snr(torch.tensor(t, dtype=torch.float64)))


def time_grid(
    process: Process,
    num_inference_steps: int,
    spacing: str = "time",
    t_start: float | None = None,
    t_end: float | None = None,
) -> NDArray[np.float64]:
    """num_inference_steps + 1 falling times, from t_start (default: process.t_max) to t_end (default: 0).

    "time" and "quadratic" space t evenly and by squares. "lambda" spaces the half-log-SNR evenly; with t_end at 0,
    where it is infinite, the last step goes from process.t_min to 0.
    Raises UserError for steps < 1 and for times out of order.
    """
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps} must be at least 1")
    start = process.t_max if t_start is None else t_start
    end = 0.0 if t_end is None else t_end
    if not 0.0 <= end < start <= 1.0:
        raise UserError(f"t_start={start}, t_end={end}: needed is 0 <= t_end < t_start <= 1")
    if spacing == "time":
        return np.linspace(start, end, num_inference_steps + 1)
    if spacing == "quadratic":
        return np.asarray(np.linspace(start**0.5, end**0.5, num_inference_steps + 1) ** 2)
    if spacing == "lambda":
        start = min(start, process.t_max)
        last = end if end > 0.0 else process.t_min
        intervals = num_inference_steps if end > 0.0 else num_inference_steps - 1
        log_snrs = np.linspace(log_snr_at(process, start), log_snr_at(process, last), intervals + 1)
        times = process.t_of_log_snr(torch.tensor(log_snrs)).numpy()
        times[0] = start
        if end > 0.0:
            times[-1] = end
            return np.asarray(times)
        return np.append(times, 0.0)
    raise unknown_name("spacing", spacing, spacings())
