"""Judging a run of the digits: accuracy and Frechet distance of its samples, with intervals."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalti.data.digits import load_digits
from smalti.data.rows import to_signed_unit
from smalti.errors import UserError
from smalti.evaluation.cards import Card
from smalti.evaluation.features import judge_feature_network
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.intervals import Estimate, bootstrap
from smalti.evaluation.judge import held_out_accuracy, judge_features, load_judge
from smalti.evaluation.measuring import DataRows, Measuring
from smalti.evaluation.pictures import feature_network, measure_run
from smalti.pipeline import load
from smalti.run_folder import RunFolder, finite_json, write_json
from smalti.sampling.guided import GuidanceOptions


@dataclass(frozen=True)
class DigitsReport:
    """What the judge says of a run's samples."""

    judge_held_out_accuracy: float
    accuracy: Estimate
    frechet: Estimate
    frechet_of_real_digits: float  # as many training rows against the held-out rows: the floor
    num_images: int
    network_calls: int
    process: str
    solver: str
    guidance_scale: float
    guidance: GuidanceOptions
    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The report in lines for a person."""
        a, f = self.accuracy, self.frechet
        return "\n".join(
            [
                f"judge: {self.judge_held_out_accuracy:.2%} on held-out digits",
                f"samples: {self.num_images} class-conditional, {self.solver} on {self.process}, "
                f"{self.network_calls} network calls, guidance {self.guidance_scale:g}{_differences(self.guidance)}",
                f"judge accuracy: {a.value:.1%}  (95 %: {a.low:.1%} .. {a.high:.1%})",
                f"judge Frechet distance: {f.value:.2f}  (95 %: {f.low:.2f} .. {f.high:.2f}; "
                f"real digits: {self.frechet_of_real_digits:.2f})",
                *(card.text() for card in self.cards),
                *self.notes,
            ]
        )


def _differences(guidance: GuidanceOptions) -> str:
    """The options that are not their defaults, as the end of a line."""
    plain = asdict(GuidanceOptions())
    return "".join(f", {name} {value}" for name, value in asdict(guidance).items() if value != plain[name])


def evaluate_run(
    run: Path,
    *,
    num_images: int = 1000,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    measuring: Measuring | None = None,
    guidance_scale: float | None = None,
    guidance: GuidanceOptions | None = None,
    process: str | None = None,
    **sampling: Any,
) -> DigitsReport:
    """Draw num_images samples of a run (labels 0, 1, ... 9, 0, ...) and judge them.

    Writes RUN/evaluation.json and RUN/nearest.png. measuring: the cards to make beside the judge's report. process:
    what to sample on, where it is not the one trained on. The other arguments after measuring are those of a pipeline
    call; None takes the run's own. Raises UserError where the run does not draw digits.
    """
    if num_images < 100:
        raise UserError(f"num_images={num_images} must be at least 100: the distance needs its covariances")
    pipe = load(run, checkpoint=checkpoint)
    if pipe.config.num_classes != 10:
        raise UserError(f"{run} is not conditional on the ten digits: nothing to judge")
    pipe = pipe.on_process(process)
    pipe.plan(**sampling)  # a mistake in the settings shows before a judge is trained
    measuring = measuring or Measuring()
    training_rows, held_out = load_digits()
    judge = load_judge(progress=progress)
    network = feature_network(measuring, training_rows.shape, lambda: judge_feature_network(judge))
    labels = torch.arange(num_images) % 10
    output = pipe(
        labels,
        seed=seed,
        progress=progress,
        guidance_scale=guidance_scale,
        guidance=guidance,
        batch_size=100,
        **sampling,
    )
    features, predicted = judge_features(judge, output.tensor)
    real, _ = judge_features(judge, to_signed_unit(held_out.images))
    floor, _ = judge_features(judge, to_signed_unit(training_rows.images[:num_images]))
    rows = DataRows(training_rows, held_out, "the bundled digits")
    measured = measure_run(pipe, run, output, rows, network, measuring, guidance_scale, progress)
    sample_features, real_features = features.double().numpy(), real.double().numpy()
    right = (predicted == labels).numpy()
    report = DigitsReport(
        judge_held_out_accuracy=held_out_accuracy(judge, held_out),
        accuracy=bootstrap(lambda rows: float(np.mean(right[rows])), num_images, replicates=1000),
        frechet=bootstrap(lambda rows: frechet_distance(sample_features[rows], real_features), num_images),
        frechet_of_real_digits=frechet_distance(floor.double().numpy(), real_features),
        num_images=num_images,
        network_calls=output.plan.num_calls,
        process=pipe.process.name,
        solver=output.plan.solver,
        guidance_scale=pipe.scale_or_default(guidance_scale, conditional=True),
        guidance=guidance or pipe.config.sampling.guidance,
        cards=measured.cards,
        notes=measured.notes,
    )
    write_json(RunFolder(run).path / "evaluation.json", finite_json(asdict(report)))
    return report
