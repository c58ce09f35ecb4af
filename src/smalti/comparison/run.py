"""Running a comparison: measure speeds, plan, train, sample, judge. What is done is kept and not done again."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import filelock
import torch

from smalti.checkpoint import list_checkpoints
from smalti.comparison.budget import (
    CURVE_SHARES,
    SAMPLING_BATCH,
    SCORED,
    Speed,
    TrainingPlan,
    curve_calls,
    curve_samples,
    measure_speed,
    network_steps,
    plan_training,
    samples_after_training,
    training_flops,
)
from smalti.comparison.journal import ComparisonFolder, Journal
from smalti.comparison.machine import machine_of
from smalti.comparison.memory import peak_memory
from smalti.comparison.pictures import grid_png
from smalti.comparison.scores import DigitsYardstick, digits_yardstick, labels_of
from smalti.comparison.spec import ComparisonSpec, parameter_count
from smalti.comparison.tokenizers import needs_tokenizer, train_contenders_tokenizer, with_tokenizer
from smalti.config import RunConfig, to_json
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError
from smalti.evaluation.cards import Drawing, card_to_json
from smalti.evaluation.intervals import Estimate
from smalti.models.registry import forward_flops
from smalti.pipeline import load
from smalti.run_folder import RunFolder, read_rows, write_json
from smalti.training.display import SilentDisplay
from smalti.training.failure import TrainingDiverged
from smalti.training.loop import train

FORMAT = 1
Progress = Callable[[str, float], None]
"""Told what is being done, and which share of that is done."""
_PROBE_STEPS = 8  # to measure a contender's speed; three times as many where there is time
_VALIDATED_STEPS = 800  # of a run that is validated on its way
_KEPT = 8  # checkpoints of a run, evenly spread: learning curves and resuming are of them


class _TrainingProgress(SilentDisplay):
    """Passes on how far a contender's training is."""

    def __init__(self, text: str, progress: Progress) -> None:
        self._text, self._progress = text, progress

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self._progress(f"{self._text}: step {step}", progress)


def _say_nothing(text: str, share: float) -> None:
    return None


@contextmanager
def _opened(spec: ComparisonSpec, minutes: float, out: Path, overwrite: bool) -> Iterator[Journal]:
    """The folder's journal, for this process alone; begun anew where there is none."""
    folder = ComparisonFolder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    try:
        lock = filelock.FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{out} is in use by another smalti compare: wait for it, or give another --out") from None
    try:
        if overwrite:
            folder.clear()
        journal = Journal(folder, read_rows(folder.rows))
        start = journal.find("start")
        if start is None:
            if any(folder.runs.glob("*")):
                raise UserError(f"{out} holds runs but no comparison: give another --out, or --overwrite")
            journal.add("start", 0.0, spec=spec.to_json())
        elif start["spec"] != spec.to_json():
            raise UserError(
                f"{out} holds another comparison ({start['spec']['name']}): give another --out, its spec to go on with "
                "it, or --overwrite"
            )
        plan = journal.find("plan")
        if plan is not None and plan["of_minutes"] != minutes:
            raise UserError(
                f"{out} was planned for --minutes {plan['of_minutes']:g}: give that to go on with it, or --overwrite"
            )
        yield journal
    finally:
        lock.release()


def run_comparison(
    spec: ComparisonSpec,
    out: Path,
    *,
    minutes: float,
    overwrite: bool = False,
    yardstick: Callable[[], DigitsYardstick] = digits_yardstick,
    progress: Progress = _say_nothing,
) -> Path:
    """Run a comparison into a folder, or go on with the one there; returns the path of comparison.json.

    minutes: for everything. yardstick: makes what judges the pictures. Raises UserError for what does not fit together
    and for a budget that is too short, KeyboardInterrupt after Ctrl-C, when what was done is kept.
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g} must be above 0")
    configs = spec.configs()
    with _opened(spec, minutes, out, overwrite) as journal:
        began = time.perf_counter()
        progress("the judge", 0.0)
        judge = yardstick()
        judge_seconds = time.perf_counter() - began
        configs = _with_tokenizers(spec, configs, journal, minutes, progress)
        speeds, scoring = _speeds(configs, journal, minutes, judge, judge_seconds, progress)
        plan = _plan(spec, journal, speeds, scoring, minutes)
        for number, (name, config) in enumerate(configs.items()):
            text = f"training {name} ({number + 1} of {len(configs)})"
            _train(name, config, plan, speeds[name], journal, text, progress)
        samples = _samples(spec, journal, speeds, scoring, minutes, plan)
        trained = [name for name in configs if not _training(journal, name).get("diverged")]
        for name in trained:
            _score(name, spec, samples, judge, journal, progress)
        progress("writing", 0.0)
        path = journal.folder.comparison
        write_json(path, _gathered(spec, configs, journal, minutes, samples, judge))
    return path


def _with_tokenizers(
    spec: ComparisonSpec,
    configs: Mapping[str, RunConfig],
    journal: Journal,
    minutes: float,
    progress: Progress,
) -> dict[str, RunConfig]:
    """The configs, those of learned tokens with a tokenizer that is trained now or was in an earlier session."""
    found = dict(configs)
    for contender in spec.contenders:
        name, config = contender.name, configs[contender.name]
        if not needs_tokenizer(config):
            continue
        folder = journal.folder.tokenizers / name
        if journal.find("tokenizer", name=name) is None:
            folder.parent.mkdir(exist_ok=True)

            def say(share: float, name: str = name) -> None:
                progress(f"training the tokenizer of {name}", share)

            trained = train_contenders_tokenizer(config, folder, contender.tokenizer_share * minutes, say)
            journal.add("tokenizer", trained["seconds"], name=name, **trained)
        found[name] = with_tokenizer(config, folder)
    return found


def _training(journal: Journal, name: str) -> dict[str, Any]:
    row = journal.find("training", name=name)
    assert row is not None
    return row


def _speeds(
    configs: Mapping[str, RunConfig],
    journal: Journal,
    minutes: float,
    judge: DigitsYardstick,
    judge_seconds: float,
    progress: Progress,
) -> tuple[dict[str, Speed], float]:
    """Each contender's speed, and the seconds of judging one set of pictures. judge_seconds: spent on making it."""
    row = journal.find("scoring")
    if row is None:
        began = time.perf_counter()
        noise = torch.rand(SCORED, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
        judge.figures(noise, labels_of(SCORED))
        scoring = time.perf_counter() - began
        row = journal.add("scoring", judge_seconds + scoring, seconds=scoring)
    speeds = {}
    for number, (name, config) in enumerate(configs.items()):
        progress(f"measuring the speed of {name}", number / len(configs))
        found = journal.find("speed", name=name)
        if found is None:
            began = time.perf_counter()
            speed = measure_speed(
                config, journal.folder.path / "probe", _PROBE_STEPS if minutes < 5 else 3 * _PROBE_STEPS
            )
            found = journal.add("speed", time.perf_counter() - began, name=name, **asdict(speed))
        speeds[name] = Speed(**{field.name: found[field.name] for field in fields(Speed)})
    return speeds, float(row["seconds"])


def _plan(
    spec: ComparisonSpec, journal: Journal, speeds: Mapping[str, Speed], scoring: float, minutes: float
) -> TrainingPlan:
    row = journal.find("plan")
    if row is None:
        plan = plan_training(spec, speeds, scoring, minutes, journal.spent)
        row = journal.add("plan", 0.0, of_minutes=minutes, **asdict(plan))
    return TrainingPlan(row["samples"], row["steps"], row["minutes"])


def _train(
    name: str,
    config: RunConfig,
    plan: TrainingPlan,
    speed: Speed,
    journal: Journal,
    text: str,
    progress: Progress,
) -> None:
    """Train a contender, or go on with it where a killed process left it."""
    if journal.find("training", name=name) is not None:
        return
    steps = plan.expected_steps(name, speed)
    every = max(1, steps // _KEPT)
    # A validation takes as long as some five steps: often in a long run, in a short one only at its end.
    validate_every = every if steps >= _VALIDATED_STEPS else 10**9
    loop = replace(
        config.loop,
        validate_every=validate_every,
        checkpoint_every=every,
        preview_every=10**9,
        keep_checkpoints=_KEPT + 2,
    )
    config = replace(config, budget=plan.budget(name), loop=loop)
    folder = RunFolder(journal.folder.runs / name)
    resumed = bool(read_rows(folder.timing))
    began = time.perf_counter()
    diverged, result = None, None
    with peak_memory() as memory:
        try:
            result = train(config, folder.path, resume=True, display=_TrainingProgress(text, progress))
        except TrainingDiverged as error:
            diverged = str(error)
    if result is not None and result.outcome == "interrupted":
        raise KeyboardInterrupt
    seconds = result.seconds if result is not None else time.perf_counter() - began
    journal.add(
        "training",
        # A killed session's time is in the run's clock, though not in a row of the journal.
        max(seconds, time.perf_counter() - began),
        name=name,
        steps=result.step if result is not None else None,
        seconds=seconds,
        peak_bytes=memory.bytes,
        resumed=resumed,
        diverged=diverged,
    )


def _samples(
    spec: ComparisonSpec,
    journal: Journal,
    speeds: Mapping[str, Speed],
    scoring: float,
    minutes: float,
    plan: TrainingPlan,
) -> int:
    row = journal.find("samples")
    if row is None:
        count = samples_after_training(spec, speeds, scoring, minutes, journal.spent, plan.samples)
        row = journal.add("samples", 0.0, count=count)
    return int(row["count"])


def _curve_checkpoints(run: Path, steps: int) -> dict[float, str]:
    """The checkpoint nearest to each share of the training that the learning curve is measured at."""
    saved = {path.name: int(path.name.removeprefix("step_")) for path in list_checkpoints(RunFolder(run).checkpoints)}
    nearest = {share: min(saved, key=lambda name: abs(saved[name] - share * steps)) for share in CURVE_SHARES}
    return {share: name for share, name in nearest.items() if saved[name] < steps}


def _score(
    name: str,
    spec: ComparisonSpec,
    samples: int,
    judge: DigitsYardstick,
    journal: Journal,
    progress: Progress,
) -> None:
    """Sample a contender at each number of calls and judge that; then its learning curve."""
    run = journal.folder.runs / name
    total = int(_training(journal, name)["steps"])
    for calls in spec.calls:
        if journal.find("score", name=name, calls=calls) is None:
            text = f"sampling {name} at {calls} calls"
            began = time.perf_counter()
            values = _drawn_and_judged(run, None, calls, samples, judge, text, progress, with_grid=True)
            journal.add("score", time.perf_counter() - began, name=name, calls=calls, **values)
    count = curve_samples(samples)
    for share, checkpoint in _curve_checkpoints(run, total).items() if count else ():
        if journal.find("curve", name=name, share=share) is None:
            text = f"sampling {name} after {share:.0%} of its training"
            began = time.perf_counter()
            values = _drawn_and_judged(run, checkpoint, curve_calls(spec), count, judge, text, progress)
            step = int(checkpoint.removeprefix("step_"))
            journal.add("curve", time.perf_counter() - began, name=name, share=share, step=step, **values)


def _drawn_and_judged(
    run: Path,
    checkpoint: str | None,
    calls: int,
    samples: int,
    judge: DigitsYardstick,
    text: str,
    progress: Progress,
    with_grid: bool = False,
) -> dict[str, Any]:
    """Figures, seconds and memory of so many pictures; the same labels and seeds for every contender."""
    labels = labels_of(samples)
    progress(text, 0.0)
    with peak_memory() as memory:
        pipe = load(run, checkpoint=checkpoint)
        steps = network_steps(pipe, calls)
        began = time.perf_counter()
        output = pipe(
            labels,
            num_inference_steps=steps,
            batch_size=SAMPLING_BATCH,
            progress=lambda done, total: progress(text, done / total),
        )
        seconds = time.perf_counter() - began
    figures: dict[str, Estimate] = judge.figures(output.tensor, labels)
    assert isinstance(pipe.backbone, torch.nn.Module)
    drawing = Drawing(
        run=run.name,
        weights=fingerprint("network", dict(pipe.backbone.state_dict())),
        process=pipe.process.name,
        solver=pipe.config.sampling.solver,
        network_calls=output.plan.num_calls,
        guidance_scale=pipe.config.sampling.guidance_scale,
        seed=0,
    )
    grid = {"grid": grid_png(output.tensor)} if with_grid else {}
    return {
        "samples": samples,
        "steps": steps,
        "seconds": seconds,
        "seconds_per_picture": seconds / samples,
        "peak_bytes": memory.bytes,
        "network_calls": output.plan.num_calls,
        "figures": {key: asdict(estimate) for key, estimate in figures.items()},
        "cards": [card_to_json(card) for card in judge.cards(figures, samples, drawing)],
        **grid,
    }


def _gathered(
    spec: ComparisonSpec,
    configs: Mapping[str, RunConfig],
    journal: Journal,
    minutes: float,
    samples: int,
    judge: DigitsYardstick,
) -> dict[str, Any]:
    """The body of comparison.json."""
    contenders = []
    for contender in spec.contenders:
        name, config = contender.name, configs[contender.name]
        training = {k: v for k, v in _training(journal, name).items() if k not in ("kind", "name", "spent")}
        step_flops = training_flops(config)
        contenders.append({
            "name": name,
            "recipe": contender.recipe,
            "set": list(contender.set),
            "architecture": config.model.kind,
            "process": getattr(config, "process", None),
            "parameters": parameter_count(config),
            "forward_flops": forward_flops(config.model, codebook_size=config.codebook_size),
            "training_flops": None if training["steps"] is None else step_flops * training["steps"],
            "images": None if training["steps"] is None else training["steps"] * config.loop.batch_size,
            "training": training,
            "tokenizer": journal.find("tokenizer", name=name),
            "losses": _losses(journal.folder.runs / name),
            "config": to_json(config),
        })  # fmt: skip
    scores = [row for row in journal.rows if row["kind"] == "score"]
    curves = [row for row in journal.rows if row["kind"] == "curve"]
    plain = [{k: v for k, v in row.items() if k not in ("kind", "spent")} for row in (*scores, *curves)]
    return {
        "format": FORMAT,
        "spec": spec.to_json(),
        "minutes": minutes,
        "seconds": round(journal.spent, 1),
        "finished": time.strftime("%Y-%m-%d"),
        "machine": machine_of(next(iter(configs.values()))),
        "samples": samples,
        "curve": {"calls": curve_calls(spec), "samples": curve_samples(samples)},
        "judge": {"held_out_accuracy": judge.held_out_accuracy, "real_fd": judge.floor(samples)},
        "contenders": contenders,
        "scores": plain[: len(scores)],
        "curves": plain[len(scores) :],
    }


def _losses(run: Path) -> list[list[float]]:
    """[step, validation loss] of a run."""
    rows = read_rows(RunFolder(run).metrics)
    return [[row["step"], row["validation_loss"]] for row in rows if row.get("validation_loss") is not None]
