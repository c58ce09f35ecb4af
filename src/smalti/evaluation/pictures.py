"""Judging a run of any pictures: accuracy where they have classes, and the metrics of features."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.evaluation.cards import Card
from smalti.evaluation.features import FeatureNetwork, NamedFeatures, judge_feature_network, pixel_features
from smalti.evaluation.intervals import Estimate, resampled_mean
from smalti.evaluation.judge import Judge, held_out_accuracy, judge_features, load_class_judge
from smalti.evaluation.measuring import DataRows, Measured, Measuring, data_rows, drawing_of, measure, nearest_picture
from smalti.evaluation.pretrained_features import pretrained_feature_network
from smalti.pipeline import Pipeline, PipelineOutput, load
from smalti.run_folder import RunFolder, write_json
from smalti.sampling.guided import GuidanceOptions


@dataclass(frozen=True)
class PicturesReport:
    """A run's cards. judge_held_out_accuracy, accuracy: of the judge of the data's classes, where it has any."""

    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    num_images: int
    judge_held_out_accuracy: float | None = None
    accuracy: Estimate | None = None

    def text(self) -> str:
        """The report in lines for a person."""
        lines = []
        if self.accuracy is not None:
            a = self.accuracy
            lines = [
                f"judge: {self.judge_held_out_accuracy:.2%} on held-out rows",
                f"judge accuracy: {a.value:.1%}  (95 %: {a.low:.1%} .. {a.high:.1%})",
            ]
        return "\n".join([*lines, *(card.text() for card in self.cards), *self.notes])


def feature_network(
    measuring: Measuring, shape: tuple[int, int, int], judged_by: Callable[[], NamedFeatures]
) -> FeatureNetwork:
    """The feature network that is asked for. judged_by: the features of the data's judge, where those are."""
    if measuring.features == "judge":
        return judged_by()
    if measuring.features == "pixels":
        return pixel_features(shape)
    return pretrained_feature_network(measuring.features, measuring.weights)


def measure_run(
    pipe: Pipeline,
    run: Path,
    output: PipelineOutput,
    rows: DataRows,
    network: FeatureNetwork,
    measuring: Measuring,
    guidance_scale: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """The cards of a run's samples; draws RUN/nearest.png where memorisation is measured."""
    drawing = drawing_of(pipe, run, output, guidance_scale)
    samples = output.tensor.cpu()
    measured = measure(samples, network, rows, measuring, drawing, progress=progress)
    picture = nearest_picture(samples, rows.training, measured)
    if picture is not None:
        picture.save(run / "nearest.png")
    return measured


def evaluate_pictures(
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
) -> PicturesReport:
    """Draw num_images samples of a run without prompts (of its classes in turn, where it has any) and measure them.

    Writes RUN/evaluation.json and RUN/nearest.png. The arguments after measuring are those of a pipeline call. Raises
    UserError where num_images is below 10, and where features of a judge are asked for of pictures without classes.
    """
    measuring = measuring or Measuring()
    if num_images < 10:
        raise UserError(f"num_images={num_images} must be at least 10")
    pipe = load(run, checkpoint=checkpoint).on_process(process)
    pipe.plan(**sampling)  # a mistake in the settings shows before a judge is trained
    rows = data_rows(pipe)
    judge = _class_judge(pipe, rows, progress)
    network = feature_network(measuring, rows.training.shape, lambda: _judge_features(judge, run))
    labels = torch.arange(num_images) % pipe.num_classes if pipe.num_classes else None
    output = pipe(
        labels,
        num_images=None if labels is not None else num_images,
        seed=seed,
        progress=progress,
        guidance_scale=guidance_scale,
        guidance=guidance,
        batch_size=100,
        **sampling,
    )
    measured = measure_run(pipe, run, output, rows, network, measuring, guidance_scale, progress)
    report = PicturesReport(measured.cards, measured.notes, num_images, *_accuracy(judge, output.tensor, labels, rows))
    write_json(RunFolder(run).path / "evaluation.json", asdict(report))
    return report


def _class_judge(pipe: Pipeline, rows: DataRows, progress: Callable[[int, int], None] | None) -> Judge | None:
    """The judge of the run's classes; None where it has fewer than two, or its pictures do not fit in memory."""
    if pipe.num_classes < 2 or not isinstance(rows.training, PicturesInMemory) or rows.training.class_labels is None:
        return None
    return load_class_judge(rows.training, pipe.num_classes, progress)


def _judge_features(judge: Judge | None, run: Path) -> NamedFeatures:
    if judge is None:
        raise UserError(
            f"features=judge: {run} has no classes for a judge to learn; take inception, dinov2 or clip, or pixels, "
            "which need no download"
        )
    return judge_feature_network(judge)


def _accuracy(
    judge: Judge | None, samples: Tensor, labels: Tensor | None, rows: DataRows
) -> tuple[float | None, Estimate | None]:
    """(the judge's accuracy on held-out rows, that on samples); None without a judge or held-out rows."""
    if judge is None or labels is None or not len(rows.held_out):
        return None, None
    _, predicted = judge_features(judge, samples)
    right = (predicted == labels).double().numpy()
    return held_out_accuracy(judge, rows.held_out), resampled_mean(right, 1000).estimate(0.0, 1.0)
