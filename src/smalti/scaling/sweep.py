"""Run a study into a folder, or go on with the one there.

spec.json     the study                             runs/KEY/       each run's directory
plan.json     its smallest budget, how it was found  locks/KEY.lock  held by the process that has the run
results.jsonl a row for each run or scoring that ended, failed ones too

A run's key is a digest of its whole config. What was not finished when a process or the machine died is gone on with
from its newest checkpoint; several processes may work in one folder, on one machine or, where the file system carries
locks, on several.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from smalti.config import RunConfig, to_json
from smalti.data.sources.digits import DigitsData
from smalti.errors import UserError
from smalti.run_folder import append_row, read_json, read_rows, write_json
from smalti.scaling.budget import StepTimes, StudyBudget, smallest_budget, times_from_json
from smalti.scaling.executors import Ended, Executor, Running
from smalti.scaling.grid import Cell, Layout, cell_config, cell_key, describe_cell, expected_layout, layout
from smalti.scaling.spec import ScalingSpec, Size, read_spec
from smalti.scaling.tasks import Task

RESULTS, PLAN, SPEC = "results.jsonl", "plan.json", "spec.json"
_ATTEMPTS = 3  # of a run whose process died
_POLL_SECONDS = 0.2
_LEAST_PATIENCE = 60.0  # seconds that any run is given, whatever was planned
Say = Callable[[str], None]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Study:
    """A study in its folder: what is planned, and what was found so far."""

    spec: ScalingSpec
    folder: Path
    smallest: float
    sizes: tuple[Size, ...]

    def rows(self) -> list[dict[str, Any]]:
        """All results, in the order of their ends."""
        return read_rows(self.folder / RESULTS)

    def layout(self) -> Layout:
        """The runs that are wanted, as far as results tell."""
        results = {
            (row["slice"], row["width"]): row["loss"] if row["status"] == "finished" else None
            for row in self.rows()
            if row["kind"] == "train"
        }
        return layout(self.spec, self.sizes, self.smallest, results)

    def config(self, cell: Cell) -> RunConfig:
        """A run's."""
        return cell_config(self.spec.config(), cell, self.spec.base_width)

    def run_folder(self, key: str) -> Path:
        """A run's directory."""
        return self.folder / "runs" / key


def read_study(folder: Path) -> Study:
    """The study in a folder. Raises UserError where there is none."""
    if not (folder / PLAN).exists():
        raise UserError(f"{folder} holds no scaling study: run one with `smalti scaling run digits --out {folder}`")
    spec = read_spec(folder / SPEC)
    return Study(spec, folder, float(read_json(folder / PLAN)["smallest"]), spec.sizes())


def read_step_times(folder: Path) -> StepTimes | None:
    """The step times that a study's plan was made with; None of a study planned in FLOPs."""
    times = read_json(folder / PLAN).get("times")
    return None if times is None else times_from_json(times)


def _judged(spec: ScalingSpec) -> bool:
    return bool(spec.samples) and isinstance(spec.config().data, DigitsData)


def measure_steps(spec: ScalingSpec, executor: Executor, device: str, folder: Path) -> StepTimes:
    """Time steps of the smallest, a middle and the largest size, in as many processes at a time as runs will be.

    folder: for what they write, which is removed again.
    """
    sizes = spec.sizes()
    chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    seconds, besides = [], []
    for size in chosen:
        config = cell_config(spec.config(), Cell(0, 1.0, size), spec.base_width)
        tasks = [
            Task("speed", f"speed-{slot}", folder / f"speed-{slot}", config, device=device)
            for slot in range(executor.slots)
        ]
        results = _all_results([executor.start(task) for task in tasks])
        seconds.append(sum(result["step_seconds"] for result in results) / len(results))
        besides.append(max(result["run_seconds"] for result in results))
    return StepTimes(tuple(s.flops_per_image * s.batch_size for s in chosen), tuple(seconds), max(besides))


def _all_results(running: Sequence[Running]) -> list[dict[str, Any]]:
    waiting, results = list(running), []
    try:
        while waiting:
            for task in list(waiting):
                ended = task.ended()
                if ended is None:
                    continue
                waiting.remove(task)
                if ended.result is None:
                    raise UserError(f"measuring this machine's speed failed: {ended.died}")
                results.append(ended.result)
            time.sleep(_POLL_SECONDS)
    finally:
        for task in waiting:
            task.stop()
    return results


def open_study(
    spec: ScalingSpec, folder: Path, budget: StudyBudget, executor: Executor, device: str = "cpu", say: Say = print
) -> Study:
    """Begin a study in a folder, or open the one there. Its plan is made once, by whoever is first.

    Raises UserError for a folder that holds another study or cannot be written, and for a budget that is too small.
    """
    sizes = spec.sizes()
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror}") from None
    with filelock.FileLock(folder / "locks" / "plan.lock"):
        if (folder / PLAN).exists():
            study = read_study(folder)
            if study.spec != spec:
                raise UserError(
                    f"{folder} holds another study ({study.spec.name}): give another --out, or its spec to go on"
                )
            return study
        times = None
        if budget.unit == "seconds":
            say(f"measuring the speed of training steps, {executor.slots} at a time")
            times = measure_steps(spec, executor, device, folder / "runs")
        smallest = smallest_budget(spec, sizes, budget, times, executor.slots)
        write_json(folder / SPEC, to_json(spec))
        plan = {"smallest": smallest, "budgets": spec.budgets(smallest), "budget": asdict(budget)}
        write_json(folder / PLAN, {**plan, "slots": executor.slots, "times": None if times is None else asdict(times)})
    return Study(spec, folder, smallest, sizes)


def _wanted(study: Study, device: str) -> tuple[dict[str, tuple[Task, Cell]], Layout]:
    """What is still to be done and can begin, by key, trainings before scorings; and the study so far."""
    rows = study.rows()
    known = study.layout()
    done = {(row["kind"], row["key"]) for row in rows}
    finished = {row["key"] for row in rows if row["kind"] == "train" and row["status"] == "finished"}
    trainings, scorings = {}, {}
    frontier = [part.best for part in known.slices if part.complete] + [known.held_out]
    for cell in known.cells:
        config = study.config(cell)
        key = cell_key(config)
        folder = study.run_folder(key)
        if ("train", key) not in done:
            trainings[key] = (Task("train", key, folder, config, device=device), cell)
        elif cell in frontier and key in finished and _judged(study.spec) and ("score", key) not in done:
            scorings[key] = (Task("score", key, folder, config, study.spec.samples, device), cell)
    return {**trainings, **scorings}, known


@dataclass
class _Held:
    """A task that runs, and the lock on it. seconds: that it was seen to run; patience: after which it is stopped."""

    task: Task
    cell: Cell
    running: Running
    lock: filelock.BaseFileLock
    patience: float
    seconds: float = 0.0


@contextmanager
def _stopping(held: dict[str, _Held]) -> Iterator[None]:
    """Stops what runs and opens its locks when the context ends, however it does."""
    try:
        yield
    finally:
        for one in held.values():
            one.running.stop()
            one.lock.release()


def run_study(
    study: Study,
    executor: Executor,
    *,
    device: str = "cpu",
    max_runs: int | None = None,
    give_up: float = math.inf,
    say: Say = print,
    progress: Progress = lambda share: None,
) -> bool:
    """Do all that the study lacks; returns whether it is complete: other processes may still have runs, or max_runs
    trainings are done. give_up: a run that takes so many times what was planned for it is stopped and kept as such.
    say: told of each end; progress: told the share of the training FLOPs that is done.

    KeyboardInterrupt stops the runs, which save themselves; the same call goes on with them. Raises UserError for
    give_up not above 1.
    """
    if not give_up > 1:
        raise UserError(f"give_up={give_up:g} must be above 1: times what was planned for a run")
    times = read_step_times(study.folder)
    held: dict[str, _Held] = {}
    deaths: dict[str, int] = {}
    begun = 0
    read = -1
    wanted: dict[str, tuple[Task, Cell]] = {}
    with _stopping(held):
        while True:
            if (size := _results_size(study)) != read:
                read, (wanted, known) = size, _wanted(study, device)
                progress(_share(study, known, wanted))
            if not wanted and not held:
                return True
            for key, (task, cell) in wanted.items():
                if key in held or len(held) >= executor.slots:
                    continue
                if task.kind == "train" and max_runs is not None and begun >= max_runs:
                    continue
                lock = filelock.FileLock(study.folder / "locks" / f"{key}.lock", timeout=0)
                try:
                    lock.acquire()
                except filelock.Timeout:
                    continue  # another process has it
                if _results_size(study) != read:  # and may have ended it just now
                    lock.release()
                    break
                patience = math.inf if times is None else max(_LEAST_PATIENCE, give_up * times.run(cell))
                held[key] = _Held(task, cell, executor.start(task), lock, patience)
                begun += task.kind == "train"
            if not held and max_runs is not None and begun >= max_runs:
                return False
            before = time.monotonic()
            time.sleep(_POLL_SECONDS)
            # While a machine sleeps, its runs do not take long.
            passed = min(time.monotonic() - before, 2 * _POLL_SECONDS)
            for key, one in list(held.items()):
                one.seconds += passed
                _look_after(study, key, held, deaths, say, one)


def _results_size(study: Study) -> int:
    results = study.folder / RESULTS
    return results.stat().st_size if results.exists() else 0


def _look_after(study: Study, key: str, held: dict[str, _Held], deaths: dict[str, int], say: Say, one: _Held) -> None:
    """Keep the result of a task that ended; one whose process died may be tried again."""
    ended = one.running.ended()
    if ended is None:
        if one.seconds < one.patience:
            return
        one.running.stop()
        error = f"it took {one.seconds:.0f} s, and still had steps to go: more than it was to be given"
        ended = Ended({"status": "stopped", "error": error, "seconds": round(one.seconds, 1)})
    result = ended.result
    if ended.died is not None:
        deaths[key] = deaths.get(key, 0) + 1
        say(f"{describe(one.cell)}: {ended.died}" + (": going on with it" if deaths[key] < _ATTEMPTS else ""))
        if deaths[key] >= _ATTEMPTS:
            result = {"status": "failed", "error": f"{ended.died}, {_ATTEMPTS} times"}
    if result is not None:
        append_row(study.folder / RESULTS, {
            "kind": one.task.kind, "key": key, "held_out": one.cell.slice_number == study.spec.slices,
            **describe_cell(one.cell), **result,
        })  # fmt: skip
        say(f"{describe(one.cell)}: {_outcome(one.task, result)}")
    one.lock.release()
    del held[key]


def describe(cell: Cell) -> str:
    """A run in words."""
    return f"{cell.budget:.2g} FLOPs, width {cell.size.width} ({cell.size.parameters:,} parameters)"


def _outcome(task: Task, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['status']}: {result['error']}"
    if task.kind == "train":
        return f"loss {result['loss']:.4f} after {result['seconds']:.0f} s"
    return f"Frechet distance {result['fd']['value']:.1f} of {result['samples']} pictures"


def _share(study: Study, known: Layout, wanted: dict[str, tuple[Task, Cell]]) -> float:
    total = sum(cell.flops for cell in expected_layout(study.spec, study.sizes, study.smallest).cells)
    missing = {cell for task, cell in wanted.values() if task.kind == "train"}
    done = sum(cell.flops for cell in known.cells if cell not in missing)
    return min(1.0, done / total)
