"""Small studies for tests: networks of four tokens, and a driver that is started as a process to be killed."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smalti.config import to_json
from smalti.run_folder import append_row, write_json
from smalti.scaling.budget import StudyBudget
from smalti.scaling.executors import Ended, LocalProcesses
from smalti.scaling.grid import Cell, describe_cell
from smalti.scaling.law import Law
from smalti.scaling.spec import ScalingSpec
from smalti.scaling.sweep import Study, open_study, run_study
from smalti.scaling.tasks import Task, perform

TINY = ("patch_size=14", "depth=1", "model.width=32", "model.num_heads=4", "batch_size=4", "precision=float32")


def tiny_spec(**changes: Any) -> ScalingSpec:
    """Four widths, two slices and a held-out run, a second or two each."""
    settings: dict[str, Any] = dict(
        name="tiny", set=TINY, widths=(16, 24, 32, 40), base_width=32, slices=2, sizes_per_slice=3, compute_range=2.0,
        samples=0,
    )  # fmt: skip
    return ScalingSpec(**{**settings, **changes})


BUDGET = StudyBudget("flops", 4e9)


@dataclass(frozen=True)
class Finished:
    """A task that has ended."""

    end: Ended

    def ended(self) -> Ended:
        """At once."""
        return self.end

    def stop(self) -> None:
        """Nothing is left to stop."""


@dataclass
class InThisProcess:
    """Performs a task when it is started; answers: by width, instead of training."""

    slots: int = 1
    answers: Mapping[int, dict[str, Any] | Ended] = field(default_factory=dict)
    started: list[Task] = field(default_factory=list)

    def start(self, task: Task) -> Finished:
        """Done when this returns."""
        self.started.append(task)
        answer = self.answers.get(getattr(task.config.model, "width"))  # noqa: B009 (several kinds of model)
        if answer is None:
            return Finished(Ended(perform(task.to_json())))
        return Finished(answer if isinstance(answer, Ended) else Ended(dict(answer)))


LAW = Law(e=0.15, a=2.0e3, b=30.0, alpha=1.0, beta=0.65)


def write_study(folder: Path, spec: ScalingSpec, smallest: float, loss: Callable[[Cell], float | None]) -> None:
    """A study that was run to its end, with losses that a function gives: None of a run that diverged."""
    study = Study(spec, folder, smallest, spec.sizes())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", to_json(spec))
    plan = {"smallest": smallest, "budgets": spec.budgets(smallest), "slots": 2, "times": None}
    write_json(folder / "plan.json", {**plan, "budget": {"unit": "seconds", "amount": 3600.0}})
    while missing := [cell for cell in study.layout().cells if (cell.budget, cell.size.width) not in written(study)]:
        value = loss(missing[-1])
        result = {"status": "diverged", "error": "the loss was not finite"} if value is None else {
            "status": "finished", "loss": value, "low": value - 0.01, "high": value + 0.01,
            "training_rows_loss": 0.99 * value, "seconds": 60.0, "threads": 1,
        }  # fmt: skip
        add_row(study, "train", missing[-1], result)
    known = study.layout()
    for number, cell in enumerate([*(part.best for part in known.slices), known.held_out]):
        if cell is not None and spec.samples:
            fd = 8.0 + 12.0 * 2.0**-number
            score = {"fd": {"value": fd, "low": fd - 3, "high": fd + 3}, "samples": spec.samples, "seconds": 9.0}
            add_row(study, "score", cell, score)


def written(study: Study) -> set[tuple[float, int]]:
    """Budget and width of the runs that have a row."""
    return {(row["budget"], row["width"]) for row in study.rows()}


def add_row(study: Study, kind: str, cell: Cell, result: dict[str, Any]) -> None:
    """A result as a sweep writes it."""
    known = {"kind": kind, "key": f"{cell.slice_number}-{cell.size.width}", **describe_cell(cell)}
    held_out = cell.slice_number == study.spec.slices
    append_row(study.folder / "results.jsonl", {**known, "held_out": held_out, **result})


def law_with_noise(noise: float = 0.004, held_out: float = 1.0) -> Callable[[Cell], float]:
    """The losses of LAW with noise; that of the held-out run times a factor."""

    def loss(cell: Cell) -> float:
        draw = np.random.default_rng([cell.slice_number, cell.size.width]).standard_normal()
        factor = held_out if cell.slice_number == 4 else math.exp(noise * draw)
        return float(LAW.loss(cell.size.parameters, cell.images)) * factor

    return loss


def main(folder: str) -> None:
    """Run the tiny study into a folder in two processes at a time, one thread each."""
    executor = LocalProcesses(2, 1)
    study = open_study(tiny_spec(), Path(folder), BUDGET, executor, say=lambda text: print(text, flush=True))
    complete = run_study(study, executor, say=lambda text: print(text, flush=True))
    print("complete" if complete else "more is left", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
