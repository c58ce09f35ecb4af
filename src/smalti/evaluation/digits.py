"""Judging a run of the digits: accuracy and Frechet distance of its samples, with intervals."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalti.data.digits import load_digits, to_signed_unit
from smalti.evaluation.frechet import Estimate, bootstrap, frechet_distance
from smalti.evaluation.judge import held_out_accuracy, judge_features, load_judge
from smalti.pipeline import load
from smalti.run_folder import RunFolder, write_json
from smalti.types import UserError


@dataclass(frozen=True)
class DigitsReport:
    """What the judge says of a run's samples."""

    judge_held_out_accuracy: float
    accuracy: Estimate
    frechet: Estimate
    frechet_of_real_digits: float  # as many training rows against the held-out rows: the floor
    num_images: int
    network_calls: int
    solver: str
    guidance_scale: float

    def text(self) -> str:
        """The report in lines for a person."""
        a, f = self.accuracy, self.frechet
        return "\n".join(
            [
                f"judge: {self.judge_held_out_accuracy:.2%} on held-out digits",
                f"samples: {self.num_images} class-conditional, {self.solver}, {self.network_calls} network calls, "
                f"guidance {self.guidance_scale:g}",
                f"judge accuracy: {a.value:.1%}  (95 %: {a.low:.1%} .. {a.high:.1%})",
                f"judge Frechet distance: {f.value:.2f}  (95 %: {f.low:.2f} .. {f.high:.2f}; "
                f"real digits: {self.frechet_of_real_digits:.2f})",
            ]
        )


def evaluate_run(
    run: Path,
    *,
    num_images: int = 1000,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    num_inference_steps: int | None = None,
    solver: str | None = None,
    spacing: str | None = None,
    solver_options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
) -> DigitsReport:
    """Draw num_images samples of a run (labels 0, 1, ... 9, 0, ...) and judge them; writes RUN/evaluation.json.

    solver_options: what Pipeline.plan takes beside the named fields.
    Raises UserError where the run does not draw digits.
    """
    if num_images < 100:
        raise UserError(f"num_images={num_images} must be at least 100: the distance needs its covariances")
    pipe = load(run, checkpoint=checkpoint)
    if pipe.config.model.num_classes != 10:
        raise UserError(f"{run} is not conditional on the ten digits: nothing to judge")
    judge = load_judge(progress=progress)
    training_rows, held_out = load_digits()
    labels = torch.arange(num_images) % 10
    output = pipe(
        labels,
        seed=seed,
        progress=progress,
        num_inference_steps=num_inference_steps,
        solver=solver,
        spacing=spacing,
        guidance_scale=guidance_scale,
        batch_size=100,
        **(solver_options or {}),
    )
    features, predicted = judge_features(judge, output.tensor)
    real, _ = judge_features(judge, to_signed_unit(held_out.images))
    floor, _ = judge_features(judge, to_signed_unit(training_rows.images[:num_images]))
    sample_features, real_features = features.double().numpy(), real.double().numpy()
    right = (predicted == labels).numpy()
    report = DigitsReport(
        judge_held_out_accuracy=held_out_accuracy(judge, held_out),
        accuracy=bootstrap(lambda rows: float(np.mean(right[rows])), num_images, replicates=1000),
        frechet=bootstrap(lambda rows: frechet_distance(sample_features[rows], real_features), num_images),
        frechet_of_real_digits=frechet_distance(floor.double().numpy(), real_features),
        num_images=num_images,
        network_calls=output.plan.num_calls,
        solver=output.plan.solver,
        guidance_scale=pipe.config.sampling.guidance_scale if guidance_scale is None else guidance_scale,
    )
    write_json(RunFolder(run).path / "evaluation.json", asdict(report))
    return report
