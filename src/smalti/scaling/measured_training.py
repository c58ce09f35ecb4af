"""What a run's steps and the things between them take on this machine: measured by training it for a moment."""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from smalti.config import Budget, LoopConfig, RunConfig
from smalti.training.display import SilentDisplay
from smalti.training.forward import repays_compilation
from smalti.training.loop import train

_UNHURRIED = 3  # steps at the beginning that are slower than the rest
FEWEST_STEPS = _UNHURRIED + 2


@dataclass(frozen=True)
class MeasuredTraining:
    """Seconds: of a step, of what comes before the first, and of each validation, drawn grid and checkpoint."""

    step: float
    opening: float
    validation: float
    grid: float
    checkpoint: float

    def run_seconds(self, loop: LoopConfig, steps: int) -> float:
        """Of a whole run: its end has a validation, a grid and a checkpoint whatever its number of steps."""
        events = (
            (loop.validate_every, self.validation),
            (loop.preview_every, self.grid),
            (loop.checkpoint_every, self.checkpoint),
        )
        return self.opening + steps * self.step + sum(-(-steps // every) * seconds for every, seconds in events)


class _Enough(Exception):
    """Ends a run whose steps have been timed."""


class _Clock(SilentDisplay):
    """Keeps when steps, the last validation and the last grid ended. until: the step that is enough."""

    def __init__(self, until: int | None = None) -> None:
        self.steps: list[float] = []
        self.validated = self.drawn = 0.0
        self.until = until

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self.steps.append(time.perf_counter())
        if step == self.until:
            raise _Enough

    def message(self, text: str) -> None:
        """After the last step: the verdict of a validation."""
        self.validated = time.perf_counter()

    def picture(self, path: str) -> None:
        """A grid is there."""
        self.drawn = time.perf_counter()

    @property
    def step_seconds(self) -> float:
        """The mean of all but the first steps: those that are logged take longer, and count."""
        first = self.steps[_UNHURRIED - 1]
        return (self.steps[-1] - first) / (len(self.steps) - _UNHURRIED)


def measure_training(config: RunConfig, folder: Path, steps: int = 30, device: str = "cpu") -> MeasuredTraining:
    """Train for a few steps, at least FEWEST_STEPS, in a folder that is removed afterwards.

    Where the run is long enough to be compiled, its compiled steps are timed (the code is kept for the run itself), and
    the time that compiling took belongs to the opening. Raises what train() does.
    """
    assert steps >= FEWEST_STEPS
    shutil.rmtree(folder, ignore_errors=True)
    clock, never = _Clock(), 10**9
    quiet = replace(config.loop, validate_every=never, preview_every=never, checkpoint_every=never, compile=False)
    began = time.perf_counter()
    train(replace(config, budget=Budget("steps", float(steps)), loop=quiet), folder, device=device, display=clock)
    ended = time.perf_counter()
    shutil.rmtree(folder)
    last = clock.steps[-1]
    validated = max(clock.validated, last)
    drawn = max(clock.drawn, validated)
    step, opening = clock.step_seconds, clock.steps[_UNHURRIED - 1] - began - _UNHURRIED * clock.step_seconds
    if config.loop.compile and repays_compilation(config.budget):
        compiled, began = _Clock(until=steps), time.perf_counter()
        with suppress(_Enough):
            train(replace(config, loop=replace(quiet, compile=True)), folder, device=device, display=compiled)
        shutil.rmtree(folder)
        step = compiled.step_seconds
        opening = compiled.steps[_UNHURRIED - 1] - began - _UNHURRIED * step
    return MeasuredTraining(step, max(0.0, opening), validated - last, drawn - validated, ended - drawn)
