"""Small studies for tests: networks of four tokens, and a driver that is started as a process to be killed."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.scaling.budget import StudyBudget
from smalti.scaling.executors import Ended, LocalProcesses
from smalti.scaling.spec import ScalingSpec
from smalti.scaling.sweep import open_study, run_study
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


def main(folder: str) -> None:
    """Run the tiny study into a folder in two processes at a time, one thread each."""
    executor = LocalProcesses(2, 1)
    study = open_study(tiny_spec(), Path(folder), BUDGET, executor, say=lambda text: print(text, flush=True))
    complete = run_study(study, executor, say=lambda text: print(text, flush=True))
    print("complete" if complete else "more is left", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
