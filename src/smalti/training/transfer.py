"""Does the best learning rate of a narrow network serve a wide one? Loss against rate at several widths, under the
standard parametrisation and muP.

Each cell of the grid is an ordinary run of a few hundred steps, in a folder of its own while it lasts. Its result is a
line of results.jsonl under a key made of the cell's whole config: a study that was killed goes on with the cells that
are missing, inside the cell that it was in, and two processes may share a folder. Source: Yang et al. 2022
(arXiv 2203.03466), section 6.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from smalti.config import Budget, RunConfig, to_json
from smalti.errors import UserError
from smalti.optim.ema import ExponentialEma
from smalti.run_folder import append_row, read_rows
from smalti.training.coordinates import with_learning_rate
from smalti.training.display import SilentDisplay
from smalti.training.failure import TrainingDiverged
from smalti.training.loop import train
from smalti.training.widths import PARAMETRISATIONS, Parametrisation, at_width, check_widths

_RESULTS, _CELLS = "results.jsonl", "cells"
_CHECKPOINT_EVERY = 100  # steps: what a killed cell loses at most
# The loss is that of the mean of about the last ten steps' weights: less noise than the last ones alone, no lag.
_EMA = ExponentialEma(max_decay=0.9)


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    parametrisation: Parametrisation
    width: int
    learning_rate: float
    seed: int = 0  # beside the run's own


@dataclass(frozen=True)
class Grid:
    """What is compared: every width at every learning rate, for so many steps, under both parametrisations.

    seeds: runs that each loss is the mean of.
    """

    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    steps: int
    base_width: int
    keep_heads: bool = False
    seeds: int = 1

    def __post_init__(self) -> None:
        check_widths(self.widths)
        for name in ("steps", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if len(set(self.learning_rates)) != len(self.learning_rates) or len(self.learning_rates) < 2:
            raise UserError("--learning-rates: give at least two different ones")
        if not all(math.isfinite(rate) and rate > 0 for rate in self.learning_rates):
            raise UserError(f"--learning-rates {' '.join(map(str, self.learning_rates))}: all must be above 0")

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, narrow networks first."""
        return [
            Cell(parametrisation, width, rate, seed)
            for seed in range(self.seeds)
            for width in sorted(self.widths)
            for rate in sorted(self.learning_rates)
            for parametrisation in PARAMETRISATIONS
        ]


@dataclass(frozen=True)
class Curve:
    """Loss by learning rate at one width. by_seed: a row for each learning rate, nan where the run diverged."""

    width: int
    learning_rates: tuple[float, ...]
    by_seed: tuple[tuple[float, ...], ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The mean over the seeds at each learning rate; nan where any of them diverged."""
        return tuple(sum(row) / len(row) for row in self.by_seed)

    @property
    def best(self) -> int:
        """Which learning rate has the lowest loss; raises ValueError where every run diverged."""
        return min((i for i, loss in enumerate(self.losses) if math.isfinite(loss)), key=lambda i: self.losses[i])

    @property
    def vertex(self) -> float:
        """log2 of the rate at the lowest point of the parabola through the best loss and its two neighbours, in log2
        rate; of the best itself at an edge of the grid or beside a diverged run."""
        i = self.best
        x = [math.log2(rate) for rate in self.learning_rates]
        if not 0 < i < len(x) - 1 or not math.isfinite(self.losses[i - 1]) or not math.isfinite(self.losses[i + 1]):
            return x[i]
        (x0, x1, x2), (y0, y1, y2) = x[i - 1 : i + 2], self.losses[i - 1 : i + 2]
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        if right == left:
            return x1
        # The slope of the parabola is left at the middle of [x0, x1] and right at the middle of [x1, x2].
        return (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)


@dataclass(frozen=True)
class Transfer:
    """The study's results so far: curves by parametrisation, narrow networks first."""

    grid: Grid
    curves: dict[Parametrisation, tuple[Curve, ...]]
    missing: int  # cells that have not been run

    def moved(self, parametrisation: Parametrisation) -> int:
        """How many grid points the best rate moved from the narrowest to the widest network."""
        curves = self.curves[parametrisation]
        return curves[-1].best - curves[0].best

    def drift(self, parametrisation: Parametrisation) -> float:
        """How many factors of two the lowest point of the curve moved (Curve.vertex)."""
        curves = self.curves[parametrisation]
        return curves[-1].vertex - curves[0].vertex

    def penalty(self, parametrisation: Parametrisation) -> float:
        """What the narrowest network's best rate costs the widest: its loss there over its own lowest, less 1; nan
        where it diverges."""
        narrow, wide = self.curves[parametrisation][0], self.curves[parametrisation][-1]
        return wide.losses[narrow.best] / wide.losses[wide.best] - 1

    def to_json(self, config: RunConfig) -> dict[str, Any]:
        """Grid, losses (null: diverged) and best rates. config: the run that the cells were made of."""
        return {
            "grid": to_json(self.grid),
            "missing": self.missing,
            **{
                name: {
                    "losses": {str(curve.width): list(curve.losses) for curve in curves},
                    "losses_by_seed": {str(curve.width): [list(row) for row in curve.by_seed] for curve in curves},
                    "best": {str(curve.width): curve.learning_rates[curve.best] for curve in curves},
                    "vertex_log2": {str(curve.width): curve.vertex for curve in curves},
                    "moved_grid_points": self.moved(name),
                    "drift_log2": self.drift(name),
                    "penalty": self.penalty(name),
                }
                for name, curves in self.curves.items()
                if not self.missing and all(any(map(math.isfinite, curve.losses)) for curve in curves)
            },
            "config": to_json(config),
        }


class _CellDisplay(SilentDisplay):
    """Passes on how far a cell is, and says nothing."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self._report(progress)


def cell_config(config: RunConfig, grid: Grid, cell: Cell) -> RunConfig:
    """The config of a cell's run. Raises UserError as at_width does."""
    loop = replace(
        config.loop,
        validate_every=grid.steps,
        checkpoint_every=_CHECKPOINT_EVERY,
        preview_every=grid.steps,
        keep_checkpoints=1,
        compile=False,
    )
    sampling = replace(config.sampling, num_inference_steps=2, guidance_scale=1.0)  # of the picture at a run's end
    config = replace(
        config,
        seed=config.seed + cell.seed,
        budget=Budget("steps", float(grid.steps)),
        optimizer=with_learning_rate(config.optimizer, cell.learning_rate),
        ema=_EMA,
        loop=loop,
        sampling=sampling,
    )
    return at_width(config, cell.width, cell.parametrisation, grid.base_width, grid.keep_heads)


def cell_key(config: RunConfig) -> str:
    """The name of a cell's result: a digest of everything that defines its run."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:16]


def read_results(out: Path) -> dict[str, float]:
    """Losses by cell key (nan: diverged). A line that a kill tore is left out, so that its cell is run again."""
    results = {}
    for row in read_rows(out / _RESULTS):
        try:
            results[str(row["key"])] = math.nan if row["loss"] is None else float(row["loss"])
        except (ValueError, TypeError, KeyError):
            continue
    return results


def _run_cell(config: RunConfig, folder: Path, device: str, report: Callable[[float], None]) -> float:
    """Train a cell, or go on with it; the validation loss at its end, nan where it diverged."""
    if (folder / "failure").exists():  # the process was killed between a divergence and its result
        return math.nan
    try:
        result = train(config, folder, resume=True, device=device, display=_CellDisplay(report))
    except TrainingDiverged:
        return math.nan
    if result.outcome == "interrupted":
        raise KeyboardInterrupt
    rows = read_rows(result.folder.metrics)
    loss = next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None)
    if loss is None:
        raise UserError("the data has no held-out rows, so that there is no validation loss to compare")
    return float(loss) if math.isfinite(loss) else math.nan


def run_transfer(
    config: RunConfig,
    grid: Grid,
    out: Path,
    *,
    max_cells: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Transfer:
    """Run the cells that out/results.jsonl lacks, at most max_cells of them, and gather all results.

    progress(done, total) counts steps of all cells. Raises UserError as at_width does and for a folder that cannot be
    written, KeyboardInterrupt after Ctrl-C, when what was trained is kept.
    """
    if max_cells is not None and max_cells < 1:
        raise UserError(f"--max-cells {max_cells} must be at least 1")
    configs = {cell_key(c): c for c in (cell_config(config, grid, cell) for cell in grid.cells())}
    cells = out / _CELLS
    try:
        cells.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    ran = 0
    for key, cell in configs.items():
        if key in read_results(out) or ran == max_cells:
            continue
        try:
            with filelock.FileLock(cells / f"{key}.lock", timeout=0):
                done = read_results(out)
                if key in done:  # by another process, meanwhile
                    continue

                def report(share: float, before: int = sum(k in done for k in configs)) -> None:
                    if progress is not None:
                        progress(round((before + share) * grid.steps), len(configs) * grid.steps)

                loss = _run_cell(cell, cells / key, device, report)
                rate = cell.optimizer.learning_rate
                name = "standard" if cell.parametrisation is None else "mup"
                row = {"key": key, "parametrisation": name, "width": cell.model.width, "learning_rate": rate}  # type: ignore[union-attr]
                append_row(out / _RESULTS, {**row, "seed": cell.seed, "loss": loss})
                shutil.rmtree(cells / key)
                ran += 1
        except filelock.Timeout:
            continue  # another process has it
    return gather(config, grid, out)


def gather(config: RunConfig, grid: Grid, out: Path) -> Transfer:
    """The results that there are."""
    results = read_results(out)
    rates = tuple(sorted(grid.learning_rates))
    keys = {cell: cell_key(cell_config(config, grid, cell)) for cell in grid.cells()}
    curves: dict[Parametrisation, tuple[Curve, ...]] = {
        name: tuple(
            Curve(
                w,
                rates,
                tuple(
                    tuple(results.get(keys[Cell(name, w, rate, seed)], math.nan) for seed in range(grid.seeds))
                    for rate in rates
                ),
            )
            for w in sorted(grid.widths)
        )
        for name in PARAMETRISATIONS
    }
    return Transfer(grid, curves, len({key for key in keys.values() if key not in results}))
