"""What a study has done in processes of its own: train a run, draw and judge its pictures, time steps.

Each takes and gives plain JSON, so that it runs in a child process and on a Ray cluster alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smalti.config import RunConfig, from_json, to_json
from smalti.errors import UserError

TaskKind = Literal["train", "score", "speed"]
_PROBE_STEPS = 6


@dataclass(frozen=True)
class Task:
    """One thing to be done. key: of its result; folder: its run directory; samples: to draw, of kind "score"."""

    kind: TaskKind
    key: str
    folder: Path
    config: RunConfig
    samples: int = 0
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """As perform takes it."""
        return {
            "kind": self.kind,
            "folder": str(self.folder),
            "config": to_json(self.config),
            "samples": self.samples,
            "device": self.device,
        }


def perform(task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Do a task; what its row is to say, None where it was asked to stop before its end."""
    folder, device = Path(task["folder"]), str(task["device"])
    config = from_json(RunConfig, task["config"])
    if task["kind"] == "speed":
        return _time(config, folder)
    return _train(config, folder, device) if task["kind"] == "train" else _score(folder, int(task["samples"]), device)


def _time(config: RunConfig, folder: Path) -> dict[str, Any]:
    import shutil

    from smalti.comparison.budget import time_steps

    shutil.rmtree(folder, ignore_errors=True)
    step, besides = time_steps(config, folder, _PROBE_STEPS)
    shutil.rmtree(folder)
    return {"step_seconds": step, "run_seconds": max(0.0, besides)}


def _train(config: RunConfig, folder: Path, device: str) -> dict[str, Any] | None:
    """Train a run, or go on with it. status: finished, diverged or failed; a loss of its own is only in the first."""
    from smalti.pipeline import load
    from smalti.run_folder import RunFolder, read_record
    from smalti.training.display import SilentDisplay
    from smalti.training.failure import TrainingDiverged
    from smalti.training.health import mean_interval
    from smalti.training.loop import train
    from smalti.training.validation import objective_of_run
    from smalti.types import Backbone

    if RunFolder(folder).failure.exists():  # the process was killed between the divergence and its row
        return {"status": "diverged", "error": "the loss was not finite"}
    try:
        result = train(config, folder, resume=True, device=device, display=SilentDisplay())
    except TrainingDiverged as error:
        return {"status": "diverged", "error": str(error)}
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    if result.outcome == "interrupted":
        return None
    backbone = load(folder).backbone
    assert isinstance(backbone, Backbone)
    try:
        held_out = mean_interval(objective_of_run(folder, device)(backbone))
    except UserError as error:
        return {"status": "failed", "error": f"{error}, so that there is no loss to fit"}
    if not math.isfinite(held_out.mean):
        return {"status": "diverged", "error": f"held-out loss {held_out.mean}"}
    record = read_record(result.folder)
    return {
        "status": "finished",
        "loss": held_out.mean,
        "low": held_out.low,
        "high": held_out.high,
        "training_rows_loss": objective_of_run(folder, device, "training")(backbone).mean().item(),
        "seconds": round(result.seconds, 1),
        "threads": record["threads"],
    }


def _score(folder: Path, samples: int, device: str) -> dict[str, Any]:
    """Draw pictures of a run of the digits as its recipe does, and judge them."""
    import time

    from smalti.comparison.budget import SAMPLING_BATCH
    from smalti.comparison.scores import digits_yardstick, labels_of
    from smalti.pipeline import load
    from smalti.recipes import recipe

    pipe = load(folder, device=device)
    labels = labels_of(samples)
    sampling = recipe(pipe.config.recipe).sampling  # the run's own is of two steps, for its picture
    began = time.perf_counter()
    output = pipe(labels, num_inference_steps=sampling.num_inference_steps, batch_size=SAMPLING_BATCH)
    figures = digits_yardstick().figures(output.tensor, labels)
    return {
        "samples": samples,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": pipe.config.sampling.guidance_scale,
        "seconds": round(time.perf_counter() - began, 1),
        **{
            name: {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            for name, estimate in figures.items()
        },
    }
