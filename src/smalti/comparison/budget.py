"""How a time budget becomes training steps and pictures: speeds are measured first, then shared out."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from smalti.comparison.scores import labels_of
from smalti.comparison.spec import FEWEST_SAMPLES, ComparisonSpec
from smalti.config import Budget, RunConfig
from smalti.errors import UserError
from smalti.models.registry import forward_flops
from smalti.pipeline import Pipeline, load
from smalti.training.display import SilentDisplay
from smalti.training.loop import train

SAMPLING_BATCH = 100
SCORED = 200  # pictures that the time of judging is measured with
CURVE_SHARES = (0.25, 0.5, 0.75)  # of training, where the learning curve is measured besides the end
_SAMPLING_SHARE = 0.35  # of the budget: pictures and their judging
_MOST_SAMPLING_SHARE = 0.5  # where the fewest pictures take more than that
_TRAINING_UNTIL = 0.93  # of the budget: what is planned; the rest is for what takes longer than measured
_SAMPLING_UNTIL = 1.08  # of the budget: when pictures are to be judged at the latest, by the speeds measured
_FEWEST_STEPS = 5
_PREVIEW_PICTURES = 40


@dataclass(frozen=True)
class Speed:
    """A contender on this machine. step_seconds: of training; call_seconds: a network call for one picture, guided.

    run_seconds: of what a run does besides steps: opening, validating, saving, a picture at its end.
    """

    step_seconds: float
    call_seconds: float
    step_flops: float
    run_seconds: float = 0.0

    @property
    def seconds_per_flop(self) -> float:
        """Of training."""
        return self.step_seconds / self.step_flops


def training_flops(config: RunConfig) -> float:
    """Operations of a training step: a backward counts two forwards."""
    return 3.0 * forward_flops(config.model, codebook_size=config.codebook_size) * config.loop.batch_size


class StepClock(SilentDisplay):
    """Keeps the moments at which training steps ended."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self.moments.append(time.perf_counter())


def network_steps(pipe: Pipeline, calls: int) -> int:
    """The most solver steps within so many network calls. Raises UserError where even one takes more."""
    for steps in range(calls, 0, -1):
        if pipe.plan(steps).num_calls <= calls:
            return steps
    raise UserError(f"calls={calls}: one step of {pipe.config.sampling.solver} takes more")


def time_steps(config: RunConfig, folder: Path, steps: int) -> tuple[float, float]:
    """Train for a few steps, at least two, into a new folder; seconds of a step, and of the whole run besides steps."""
    clock = StepClock()
    never = 10**9
    probe = replace(
        config,
        budget=Budget("steps", float(steps)),
        loop=replace(config.loop, validate_every=never, preview_every=never, checkpoint_every=never),
        sampling=replace(config.sampling, num_inference_steps=2),
    )
    began = time.perf_counter()
    train(probe, folder, display=clock)
    whole = time.perf_counter() - began
    moments = clock.moments  # from the first step's end: it is slower than the rest
    step = (moments[-1] - moments[0]) / (steps - 1)
    return step, whole - steps * step


def measure_speed(config: RunConfig, folder: Path, steps: int) -> Speed:
    """Train for a few steps, at least two, in a folder that is removed afterwards, and sample twice."""
    shutil.rmtree(folder, ignore_errors=True)
    step, besides = time_steps(config, folder, steps)
    pipe = load(folder)
    calls = 2
    durations = []
    for _ in range(2):
        began = time.perf_counter()
        pipe(labels_of(SAMPLING_BATCH), num_inference_steps=network_steps(pipe, calls), batch_size=SAMPLING_BATCH)
        durations.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    call = min(durations) / (calls * SAMPLING_BATCH)
    preview = _PREVIEW_PICTURES * max(0, config.sampling.num_inference_steps - calls) * call
    return Speed(step, call, training_flops(config), max(0.0, besides) + preview)


@dataclass(frozen=True)
class TrainingPlan:
    """What each contender trains. minutes: each one's time; steps: each one's number of steps; one of them is given.

    samples: pictures at each number of calls, which may become fewer when training took longer than planned.
    """

    samples: int
    steps: dict[str, int] | None = None
    minutes: float | None = None

    def budget(self, name: str) -> Budget:
        """A contender's."""
        if self.steps is not None:
            return Budget("steps", float(self.steps[name]))
        assert self.minutes is not None
        return Budget("minutes", self.minutes)

    def expected_steps(self, name: str, speed: Speed) -> int:
        """About how many steps a contender will take."""
        if self.steps is not None:
            return self.steps[name]
        assert self.minutes is not None
        return max(1, int(60 * self.minutes / speed.step_seconds))


def curve_calls(spec: ComparisonSpec) -> int:
    """Network calls that the learning curve is sampled with: those in the middle of the spec's."""
    return spec.calls[(len(spec.calls) - 1) // 2]


def curve_samples(samples: int) -> int:
    """Pictures at each point of the learning curve; 0 where there would be too few: then there is no curve."""
    share = samples // 40 * 10
    return share if share >= FEWEST_SAMPLES else 0


def sampling_seconds(spec: ComparisonSpec, speeds: Mapping[str, Speed], scoring: float, samples: int) -> float:
    """Of drawing and judging all pictures. scoring: of judging SCORED of them."""
    of_curve = len(CURVE_SHARES) * curve_samples(samples)
    drawn = sum(spec.calls) * samples + curve_calls(spec) * of_curve
    judged = len(speeds) * (len(spec.calls) * samples + of_curve)
    return drawn * sum(speed.call_seconds for speed in speeds.values()) + judged * scoring / SCORED


def most_samples(
    spec: ComparisonSpec, speeds: Mapping[str, Speed], scoring: float, seconds: float, at_most: int
) -> int | None:
    """The most pictures, a multiple of ten, that fit in a time; None where even the fewest do not."""
    for samples in range(at_most // 10 * 10, FEWEST_SAMPLES - 1, -10):
        if sampling_seconds(spec, speeds, scoring, samples) <= seconds:
            return samples
    return None


def plan_training(
    spec: ComparisonSpec, speeds: Mapping[str, Speed], scoring: float, minutes: float, spent: float
) -> TrainingPlan:
    """Share out what is left of the minutes after `spent` seconds.

    Raises UserError for a budget in which contenders would hardly be trained, saying what would do.
    """
    total = 60 * minutes
    samples = most_samples(spec, speeds, scoring, _SAMPLING_SHARE * total, spec.num_samples)
    if samples is None:  # the fewest may take more of a short budget
        samples = most_samples(spec, speeds, scoring, _MOST_SAMPLING_SHARE * total, FEWEST_SAMPLES)
    if samples is None:
        least = sampling_seconds(spec, speeds, scoring, FEWEST_SAMPLES) / _MOST_SAMPLING_SHARE / 60
        raise UserError(
            f"--minutes {minutes:g} is too short here: drawing and judging {FEWEST_SAMPLES} pictures at "
            f"{', '.join(map(str, spec.calls))} calls of each contender needs a budget of {_minutes(least)}"
        )
    besides = sum(speed.run_seconds for speed in speeds.values())
    left = _TRAINING_UNTIL * total - spent - besides - sampling_seconds(spec, speeds, scoring, samples)
    if spec.match == "minutes":
        plan = TrainingPlan(samples, minutes=max(left, 0.0) / len(speeds) / 60 or 1e-9)
    elif spec.match == "parameters":
        steps = int(left / sum(speed.step_seconds for speed in speeds.values()))
        plan = TrainingPlan(samples, steps=dict.fromkeys(speeds, steps))
    else:
        flops = left / sum(speed.seconds_per_flop for speed in speeds.values())
        plan = TrainingPlan(samples, steps={name: int(flops / speed.step_flops) for name, speed in speeds.items()})
    for name, speed in speeds.items():
        if left <= 0 or plan.expected_steps(name, speed) < _FEWEST_STEPS:
            short = _FEWEST_STEPS * sum(s.step_seconds for s in speeds.values()) * len(speeds) + spent + besides
            raise UserError(
                f"--minutes {minutes:g} is too short here: {name} would train fewer than {_FEWEST_STEPS} steps; give "
                f"at least {_minutes(max(2 * minutes, short / (_TRAINING_UNTIL - _MOST_SAMPLING_SHARE) / 60))}"
            )
    return plan


def _minutes(amount: float) -> str:
    return f"{amount:.1f} minutes" if amount < 10 else f"{amount:.0f} minutes"


def samples_after_training(
    spec: ComparisonSpec, speeds: Mapping[str, Speed], scoring: float, minutes: float, spent: float, planned: int
) -> int:
    """How many pictures still fit when training has taken what it took; the fewest where none do."""
    left = _SAMPLING_UNTIL * 60 * minutes - spent
    return most_samples(spec, speeds, scoring, left, planned) or FEWEST_SAMPLES
