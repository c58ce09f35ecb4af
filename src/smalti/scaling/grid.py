"""Which runs a study consists of: a function of the spec, its smallest budget and the results so far.

A slice's sizes stand around the best size that the slices below it point to; where its lowest loss lies at an edge,
the next size is added, so that each slice brackets its minimum wherever the widths allow it. All is decided by results
alone and slice by slice, so that a study that goes on after a kill, or in two processes, plans the same runs.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smalti.config import Budget, RunConfig, to_json
from smalti.scaling.spec import ScalingSpec, Size
from smalti.training.widths import at_width

FEWEST_STEPS = 100  # of a run: in fewer, the warm-up and the averages are most of it
# Hoffmann et al. 2022 trained best with about 20 tokens a parameter, so that C = 6 N x 20 N: where the first slice's
# sizes stand before anything was measured.
_FLOPS_PER_SQUARED_PARAMETER = 120.0
_NEVER = 10**9
_FEWEST_FOR_PARABOLA = 3
_VALIDATIONS, _CHECKPOINTS = 4, 10  # in a run


@dataclass(frozen=True)
class Cell:
    """One run. slice_number counts from the smallest budget; the one after the last slice is the held-out run's."""

    slice_number: int
    budget: float
    size: Size

    @property
    def steps(self) -> int:
        """Of training."""
        return self.size.steps(self.budget)

    @property
    def images(self) -> int:
        """That it is trained on, repetitions counted."""
        return self.steps * self.size.batch_size

    @property
    def flops(self) -> float:
        """Of training: the budget but for the rounding to whole steps."""
        return self.images * self.size.flops_per_image


@dataclass(frozen=True)
class Slice:
    """The runs of one budget that are wanted so far. losses: by width, of those that finished."""

    number: int
    budget: float
    cells: tuple[Cell, ...]
    losses: Mapping[int, float]
    complete: bool  # all have a result, and no size needs to be added
    edge: str | None = None  # what keeps a complete slice from bracketing its minimum
    first_widths: tuple[int, ...] = ()  # those that it began with, before it grew

    @property
    def best(self) -> Cell | None:
        """The finished run of the lowest loss."""
        finished = [cell for cell in self.cells if cell.size.width in self.losses]
        return min(finished, key=lambda cell: self.losses[cell.size.width], default=None)


@dataclass(frozen=True)
class Layout:
    """The study so far: slices from the smallest budget up, and the held-out run once its size is known."""

    slices: tuple[Slice, ...]
    held_out: Cell | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All runs known so far; the held-out one first, as it takes longest."""
        return (*([self.held_out] if self.held_out else []), *(cell for part in self.slices for cell in part.cells))


def cell_config(config: RunConfig, cell: Cell, base_width: int) -> RunConfig:
    """The config of a run. Its warm-up is a share of its steps, as a fixed one would fill the shortest."""
    steps = cell.steps
    loop = replace(
        config.loop,
        validate_every=max(1, steps // _VALIDATIONS),
        checkpoint_every=max(1, steps // _CHECKPOINTS),
        preview_every=_NEVER,
        keep_checkpoints=1,
    )
    warmup = min(config.schedule.warmup_steps, steps // 10)
    config = replace(
        config,
        budget=Budget("steps", float(steps)),
        schedule=replace(config.schedule, warmup_steps=warmup),
        loop=loop,
        sampling=replace(config.sampling, num_inference_steps=2),  # of the picture at a run's end
    )
    return at_width(config, cell.size.width, "mup", base_width)


def cell_key(config: RunConfig) -> str:
    """The name of a run's result: a digest of everything that defines it."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:16]


def affordable(sizes: Sequence[Size], budget: float) -> tuple[Size, ...]:
    """The sizes that train for long enough at a budget; the smallest one always."""
    return tuple(size for size in sizes if size is sizes[0] or size.steps(budget) >= FEWEST_STEPS)


def sizes_around(sizes: Sequence[Size], parameters: float, count: int) -> tuple[Size, ...]:
    """So many neighbouring sizes, those whose middle lies nearest to a number of parameters, on a logarithmic scale."""
    logs = [math.log(size.parameters) for size in sizes]
    count = min(count, len(sizes))
    starts = range(len(sizes) - count + 1)
    start = min(starts, key=lambda i: abs(sum(logs[i : i + count]) / count - math.log(parameters)))
    return tuple(sizes[start : start + count])


def _grown(
    known: Sequence[Size], losses: Mapping[int, float], ladder: Sequence[Size]
) -> tuple[Size | None, str | None]:
    """The size to add to a slice whose results are in, if any, and what is wrong where its minimum is at an edge."""
    finished = [size for size in known if size.width in losses]
    if not finished:
        return None, "no run of it finished"
    best = min(finished, key=lambda size: losses[size.width])
    for at_edge, step, word in ((known[0], -1, "smallest"), (known[-1], 1, "largest")):
        if best is at_edge:
            place = ladder.index(best) + step
            if 0 <= place < len(ladder):
                return ladder[place], None
            return None, f"its lowest loss is at its {word} size, width {best.width}"
    return None, None


def _slice(
    spec: ScalingSpec,
    number: int,
    budget: float,
    sizes: Sequence[Size],
    parameters: float,
    results: Mapping[tuple[int, int], float | None],
) -> Slice:
    ladder = affordable(sizes, budget)
    known = list(sizes_around(ladder, parameters, spec.sizes_per_slice))
    first = tuple(size.width for size in known)
    while True:
        cells = tuple(Cell(number, budget, size) for size in known)
        done = {size.width: results[number, size.width] for size in known if (number, size.width) in results}
        losses = {width: loss for width, loss in done.items() if loss is not None}
        if len(done) < len(known):
            return Slice(number, budget, cells, losses, complete=False, first_widths=first)
        added, edge = _grown(known, losses, ladder)
        if added is None:
            return Slice(number, budget, cells, losses, complete=True, edge=edge, first_widths=first)
        known = sorted([*known, added], key=lambda size: size.width)


def _as_begun(part: Slice, results: Mapping[tuple[int, int], float | None]) -> Slice | None:
    """The slice of the sizes that it began with; None until all of them ended."""
    if any((part.number, width) not in results for width in part.first_widths):
        return None
    cells = tuple(cell for cell in part.cells if cell.size.width in part.first_widths)
    losses = {width: loss for width, loss in part.losses.items() if width in part.first_widths}
    return replace(part, cells=cells, losses=losses)


def lowest_point(part: Slice) -> float | None:
    """The parameters at the lowest point of the parabola through a slice's losses, by the logarithm of parameters; the
    best run's where there is no such point between the sizes, None where no run finished."""
    if part.best is None:
        return None
    logs = [math.log(cell.size.parameters) for cell in part.cells if cell.size.width in part.losses]
    losses = [part.losses[cell.size.width] for cell in part.cells if cell.size.width in part.losses]
    if len(logs) >= _FEWEST_FOR_PARABOLA:
        curvature, slope, _ = np.polyfit(logs, losses, 2)
        if curvature > 0 and logs[0] < -slope / (2 * curvature) < logs[-1]:
            return float(math.exp(-slope / (2 * curvature)))
    return float(part.best.size.parameters)


def layout(
    spec: ScalingSpec, sizes: Sequence[Size], smallest: float, results: Mapping[tuple[int, int], float | None]
) -> Layout:
    """The runs that are wanted, given the results so far. smallest: the smallest budget, in FLOPs.

    results: loss by (slice number, width) of runs that ended, None where they failed. A slice begins when the sizes
    that the one below began with have ended, around what these point to: it need not wait for those that are added.
    The held-out run's size is chosen from the first two slices in the same way, so that it trains beside the others.
    """
    budgets = spec.budgets(smallest)
    parameters = math.sqrt(smallest / _FLOPS_PER_SQUARED_PARAMETER)
    slices: list[Slice] = []
    pointed: list[tuple[float | None, float]] = []
    for number, budget in enumerate(budgets[:-1]):
        part = _slice(spec, number, budget, sizes, parameters, results)
        slices.append(part)
        begun = _as_begun(part, results)
        if begun is None:
            break
        lowest = lowest_point(begun)
        pointed.append((lowest, budget))
        parameters = (lowest or parameters) * math.sqrt(spec.ratio)  # N_opt ~ C^0.5 (Hoffmann et al. 2022, table 2)
    held_out = None
    if len(pointed) >= 2:
        guesses = [lowest * math.sqrt(budgets[-1] / budget) for lowest, budget in pointed[:2] if lowest is not None]
        if guesses:
            (size,) = sizes_around(affordable(sizes, budgets[-1]), guesses[-1], 1)
            held_out = Cell(spec.slices, budgets[-1], size)
    return Layout(tuple(slices), held_out)


def expected_layout(spec: ScalingSpec, sizes: Sequence[Size], smallest: float) -> Layout:
    """The runs of a study whose every slice has its minimum where it is looked for: what a plan shows beforehand."""
    results: dict[tuple[int, int], float | None] = {}
    while True:
        planned = layout(spec, sizes, smallest, results)
        missing = [c for c in planned.cells if (c.slice_number, c.size.width) not in results]
        if not [cell for cell in missing if cell is not planned.held_out]:
            return planned
        for cell in missing:
            best = math.sqrt(cell.budget / _FLOPS_PER_SQUARED_PARAMETER)
            results[cell.slice_number, cell.size.width] = math.log(cell.size.parameters / best) ** 2


def describe_cell(cell: Cell) -> dict[str, Any]:
    """What a result's row says of its run."""
    return {
        "slice": cell.slice_number,
        "budget": cell.budget,
        "width": cell.size.width,
        "parameters": cell.size.parameters,
        "images": cell.images,
        "steps": cell.steps,
        "flops": cell.flops,
    }
