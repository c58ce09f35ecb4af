"""Adaptive integration of the probability-flow ODE: Dormand-Prince 5(4), with a step size of its own for each sample.

The one solver that is not a table: where it evaluates depends on what it saw.
"""

import torch
from torch import Tensor

from smalti.diffusion.prediction import convert_prediction, per_sample
from smalti.diffusion.processes import Process
from smalti.errors import UserError
from smalti.rng import widest_float
from smalti.types import Condition, Denoiser

# Source: Dormand and Prince 1980, table 2 (RK5(4)7M): nodes, stages, and the difference of the two results' weights.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _LEAST_FACTOR, _MOST_FACTOR = 0.9, 0.2, 5.0
_FIRST_STEP = 0.01  # share of the way; the controller finds its own from there
_MOST_CALLS = 100_000


class _Field:
    """dx/dt of the probability flow at a time of its own for each row; counts network calls."""

    def __init__(self, process: Process, denoiser: Denoiser, cond: Condition | None) -> None:
        self.process, self.denoiser, self.cond, self.calls = process, denoiser, cond, 0

    def estimate(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """x0 of the given rows of the batch."""
        self.calls += 1
        return self.denoiser(x, t, None if self.cond is None else self.cond.map(lambda value: value[rows]))

    def velocity(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps. Source: SiT (Ma et al. 2024), eq. 4."""
        return convert_prediction("x0", "velocity", self.process, t, x, self.estimate(x, t, rows))


def solve_adaptive(
    process: Process,
    denoiser: Denoiser,
    x: Tensor,
    cond: Condition | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_start: float | None = None,
    t_end: float | None = None,
) -> tuple[Tensor, int]:
    """The probability-flow ODE from x [batch, ...] at t_start to t_end; returns x there and the network calls made.

    t_start: by default the process's noisiest time. t_end: by default 0, which the ODE is followed to process.t_min
    for; from there one first-order step goes to the estimate. An error of atol + rtol |x| is allowed a step (root
    mean square over the sample's elements). Each sample has its own steps, so it does not depend on its batch mates;
    calls are those of the slowest. Raises UserError for tolerances <= 0, times out of order, x that is not finite, and
    processes that are a table of steps.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value > 0.0:
            raise UserError(f"{name}={value} must be above 0")
    if process.discrete:
        raise UserError(f"process {process.name!r} is a table of steps: solve_adaptive needs a continuous one")
    start = process.t_max if t_start is None else t_start
    end = 0.0 if t_end is None else t_end
    if not 0.0 <= end < start <= 1.0:
        raise UserError(f"t_start={start}, t_end={end}: needed is 0 <= t_end < t_start <= 1")
    if not bool(torch.isfinite(x).all()):
        raise UserError("x has entries that are NaN or infinite: needed are finite numbers")
    field = _Field(process, denoiser, cond)
    last = max(end, process.t_min) if end == 0.0 else end
    if start > last:
        x = _integrate(field, x, start, last, rtol, atol)
    if end == 0.0:
        t = torch.full((len(x),), min(start, last), dtype=widest_float(x.device), device=x.device)
        x = field.estimate(x, t, torch.arange(len(x), device=x.device))
    return x, field.calls


def _integrate(field: _Field, x: Tensor, start: float, end: float, rtol: float, atol: float) -> Tensor:
    """Rows that are not at the end yet make a trial step together; each keeps or refuses its own."""
    x = x.clone()
    t = torch.full((len(x),), start, dtype=widest_float(x.device), device=x.device)
    step = torch.full_like(t, _FIRST_STEP * (start - end))
    slope = field.velocity(x, t, torch.arange(len(x), device=x.device))
    live = torch.arange(len(x), device=x.device)
    while len(live) and field.calls < _MOST_CALLS:
        x_live, t_live = x[live], t[live]
        h = torch.minimum(step[live], t_live - end)
        slopes = [slope[live]]
        trial = x_live
        for node, weights in zip(_NODES, _STAGES, strict=True):
            trial = x_live - per_sample(h, x) * _sum(weights, slopes)
            slopes.append(field.velocity(trial, t_live - node * h, live))
        # The fifth-order result is the last stage, and its slope the next step's first (FSAL).
        allowed = atol + rtol * torch.maximum(x_live.abs(), trial.abs())
        error = (per_sample(h, x) * _sum(_ERROR, slopes) / allowed).square().flatten(1).mean(1).sqrt().to(t.dtype)
        # Hairer, Norsett, Wanner 1993, section II.4, eq. 4.13. A NaN is a refused step.
        factor = (_SAFETY * error.clamp(min=1e-10) ** -0.2).clamp(_LEAST_FACTOR, _MOST_FACTOR).nan_to_num(_LEAST_FACTOR)
        kept = error <= 1.0
        rows = live[kept]
        x[rows], slope[rows] = trial[kept], slopes[-1][kept]
        arrived = kept & (h >= t_live - end)
        t[rows] = torch.where(arrived, end, t_live - h)[kept]
        step[live] = h * factor
        live = live[~arrived]
    if len(live):
        raise UserError(f"rtol={rtol}, atol={atol}: not reached in {_MOST_CALLS} network calls; take larger ones")
    return x


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight != 0.0:
            total = total.add(slope, alpha=weight)
    return total
