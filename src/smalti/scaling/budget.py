"""How much compute a study's smallest budget may have, so that all of it fits in a time or in a number of FLOPs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from smalti.errors import UserError
from smalti.scaling.grid import Cell, Layout, expected_layout
from smalti.scaling.spec import ScalingSpec, Size

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AMOUNT = re.compile(r"(?P<number>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_PLANNED_SHARE = 0.85  # of the time: the rest is for sizes that slices turn out to need, and for slower steps
_VALIDATION_STEPS = 25  # a run's validations and the loss on its training rows take about as long as so many steps
_SCORE_STEPS_A_SAMPLE = 0.3  # and a drawn and judged picture as long as so many
_LEAST, _MOST, _FACTOR = 1e6, 1e24, 1.02  # smallest budgets that are tried


@dataclass(frozen=True)
class StudyBudget:
    """What a study may take: seconds of time, or training FLOPs of all its runs."""

    unit: Literal["seconds", "flops"]
    amount: float


def parse_budget(text: str) -> StudyBudget:
    """ "60min", "2h", "90s", or FLOPs: "1e15", "1e15flops". Raises UserError for anything else."""
    match = _AMOUNT.fullmatch(text.strip())
    unit = match["unit"].lower() if match else ""
    try:
        amount = float(match["number"]) if match else math.nan
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0) or unit not in ("", "flops", "flop", *_SECONDS):
        raise UserError(f"--budget {text!r} must be a time such as 60min or 2h, or training FLOPs such as 1e15")
    if unit in _SECONDS:
        return StudyBudget("seconds", amount * _SECONDS[unit])
    return StudyBudget("flops", amount)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a training step by its FLOPs, a straight line between measured sizes, and of a run besides steps."""

    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    run_seconds: float

    def step(self, size: Size) -> float:
        """Of a size; beyond the measured ones in proportion to FLOPs."""
        flops = size.flops_per_image * size.batch_size
        if flops <= self.flops[0]:
            return self.seconds[0]
        for x0, x1, y0, y1 in zip(self.flops, self.flops[1:], self.seconds, self.seconds[1:], strict=False):
            if flops <= x1:
                return y0 + (y1 - y0) * (flops - x0) / (x1 - x0)
        return self.seconds[-1] * flops / self.flops[-1]

    def run(self, cell: Cell) -> float:
        """Of a run, its validations among it."""
        return self.run_seconds + (cell.steps + _VALIDATION_STEPS) * self.step(cell.size)


def study_seconds(layout: Layout, spec: ScalingSpec, times: StepTimes, slots: int) -> float:
    """Of a study with so many runs at a time: its work shared out, or its longest chain where that takes longer.

    A slice waits for the one below it, and the held-out run for the first two.
    """
    work, chain, before_held_out = 0.0, 0.0, 0.0
    for part in layout.slices:
        seconds = [times.run(cell) for cell in part.cells]
        work += sum(seconds)
        chain += max(max(seconds), sum(seconds) / slots)
        if part.number < 2:
            before_held_out = chain
    if layout.held_out is not None:
        work += times.run(layout.held_out)
        chain = max(chain, before_held_out + times.run(layout.held_out))
    scored = [c for c in [*(part.best for part in layout.slices), layout.held_out] if c is not None]
    work += sum(spec.samples * _SCORE_STEPS_A_SAMPLE * times.step(cell.size) for cell in scored)
    return max(chain, work / slots)


def smallest_budget(
    spec: ScalingSpec, sizes: tuple[Size, ...], budget: StudyBudget, times: StepTimes | None, slots: int
) -> float:
    """The largest FLOPs of the smallest slice with which the whole study fits. times: of this machine, for a time.

    Raises UserError where even runs of the fewest steps do not fit, saying what would do.
    """

    def cost(smallest: float) -> float:
        planned = expected_layout(spec, sizes, smallest)
        if budget.unit == "flops":
            return sum(cell.flops for cell in planned.cells)
        assert times is not None
        return study_seconds(planned, spec, times, slots) / _PLANNED_SHARE

    # The smallest slice must hold a parabola: three sizes that train for long enough.
    third = sorted(size.flops_per_image * size.batch_size for size in sizes)[2]
    low = math.log(max(_LEAST, 100 * third))
    least = cost(math.exp(low))
    if least > budget.amount:
        needed = f"{least / 60:.0f}min" if budget.unit == "seconds" else f"{least:.1e}"
        raise UserError(
            f"--budget is too small: {spec.slices} slices over a {spec.compute_range:g}x range of compute need at "
            f"least {needed} here; give that, or a study of fewer slices, narrower widths or a smaller compute_range"
        )
    high = math.log(_MOST)
    while high - low > math.log(_FACTOR):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(math.exp(middle)) <= budget.amount else (low, middle)
    return math.exp(low)


def times_from_json(body: Mapping[str, object]) -> StepTimes:
    """From the plan's file."""
    from smalti.config import from_json

    times = from_json(StepTimes, body)
    assert isinstance(times, StepTimes)
    return times
