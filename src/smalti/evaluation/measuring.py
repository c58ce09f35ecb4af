"""Measuring samples against the rows of a run's data: which metrics, in whose features, as cards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.data.fingerprint import fingerprint
from smalti.data.opening import open_rows
from smalti.data.rows import TrainingRows
from smalti.errors import UserError, unknown_name
from smalti.evaluation.cards import Card, Drawing, Reference, make_card
from smalti.evaluation.features import (
    FeatureNetwork,
    extractor_of,
    features_of,
    pixel_features,
    reference_of,
    rows_features,
)
from smalti.evaluation.intervals import REPLICATES, Features
from smalti.evaluation.memorisation import Memorisation, memorisation
from smalti.evaluation.metrics import FEATURE_METRICS, METRICS, check_rows, resample
from smalti.images import grid_picture
from smalti.pipeline import Pipeline, PipelineOutput

MEASURED = (*FEATURE_METRICS, "memorisation")
_MOST_ROWS = 50_000  # of the training rows that are read
_ENOUGH_HELD_OUT = 500
_SHOWN = 16
FeatureName = Literal["judge", "pixels", "inception", "dinov2", "clip"]


@dataclass(frozen=True)
class Measuring:
    """What to measure. metrics: () for all that there are rows for. weights: of a pretrained feature network.

    reference: None for held-out rows, or training rows where fewer than 500 are held out. Raises UserError for an
    unknown metric, and for weights that would not be read.
    """

    features: FeatureName = "judge"
    weights: str | None = None
    metrics: tuple[str, ...] = ()
    reference: Literal["held-out", "training"] | None = None

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in MEASURED:
                raise unknown_name("metric", name, MEASURED)
        if self.features in ("judge", "pixels") and self.weights is not None:
            raise UserError(f"weights={self.weights!r} has no effect with features={self.features}: leave it out")


@dataclass(frozen=True)
class DataRows:
    """The rows that samples are measured against, at the samples' size. origin: where they come from, in words."""

    training: TrainingRows
    held_out: TrainingRows
    origin: str


def data_rows(pipe: Pipeline) -> DataRows:
    """A run's rows as pixels, at the size of the pictures that its pipeline draws. Errors as open_rows'."""
    channels, height, width = pipe.picture_shape
    opened = open_rows(pipe.config.data, channels, (height, width))
    return DataRows(opened.training, opened.held_out, pipe.config.data.kind)


def drawing_of(pipe: Pipeline, run: Path, output: PipelineOutput, guidance_scale: float | None) -> Drawing:
    """What cards say of how the samples were drawn."""
    backbone = pipe.backbone
    weights = fingerprint("weights", backbone.state_dict()) if isinstance(backbone, torch.nn.Module) else ""
    scale = pipe.scale_or_default(guidance_scale, output.class_labels is not None or output.prompts is not None)
    plan = output.plan
    return Drawing(str(run), weights, pipe.process.name, plan.solver, plan.num_calls, scale, output.seeds[0])


@dataclass(frozen=True)
class Measured:
    """Cards of samples; notes: what was left out, and why. in_features, in_pixels: the nearest training rows, where
    memorisation was measured."""

    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()
    in_features: Memorisation | None = None
    in_pixels: Memorisation | None = None

    def text(self) -> str:
        """A line a card, then the notes."""
        return "\n".join([*(card.text() for card in self.cards), *self.notes])


def measure(
    samples: Tensor,
    network: FeatureNetwork,
    rows: DataRows,
    measuring: Measuring,
    drawing: Drawing | None = None,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure pictures [samples, channels, height, width] in [-1, 1] against rows.

    What measuring names is measured or refused; where it names nothing, what there are too few rows for is left out
    with a note. Raises UserError for what is refused.
    """
    kept, reference_rows = _reference_rows(rows, measuring.reference)
    names, notes = _possible(measuring.metrics, len(samples), len(reference_rows), len(rows.held_out), network.width)
    wanted = [name for name in names if name != "memorisation"]
    sample_features = features_of(network, samples, progress=progress)
    extractor, cards = extractor_of(network), []
    if wanted:
        reference = reference_of(f"{kept} rows of {rows.origin}", reference_rows, _MOST_ROWS)
        real = rows_features(network, reference_rows, _MOST_ROWS, progress)
        for name in wanted:
            estimate = METRICS[name].estimate(resample(name, sample_features, real, replicates, seed))
            cards.append(make_card(name, estimate, len(samples), reference, extractor, drawing))
    found: list[Memorisation] = []
    if "memorisation" in names:
        known = _copied_from(rows)
        for space in (network, pixel_features(rows.training.shape)):
            if found and space.fingerprint == network.fingerprint:
                found.append(found[0])
                break
            features = sample_features if not found else features_of(space, samples)
            found.append(_memorised(space, features, rows, replicates, seed, progress))
            share = METRICS["memorisation"].estimate(found[-1].share)
            cards.append(make_card("memorisation", share, len(samples), known, extractor_of(space), drawing))
    return Measured(tuple(cards), tuple(notes), *found)


def _reference_rows(rows: DataRows, chosen: Literal["held-out", "training"] | None) -> tuple[str, TrainingRows]:
    if chosen is None:
        chosen = "held-out" if len(rows.held_out) >= min(_ENOUGH_HELD_OUT, len(rows.training)) else "training"
    return ("held-out", rows.held_out) if chosen == "held-out" else ("training", rows.training)


def _possible(
    asked: Sequence[str], samples: int, reference: int, held_out: int, width: int
) -> tuple[list[str], list[str]]:
    """(metrics that can be taken, why others cannot); of those asked for all. Raises UserError where one cannot."""
    names, notes = [], []
    for name in asked or MEASURED:
        rows = held_out if name == "memorisation" else reference
        try:
            check_rows(METRICS[name], samples, min(rows, _MOST_ROWS), width)
        except UserError as error:
            if asked:
                raise
            notes.append(f"left out: {error}")
        else:
            names.append(name)
    return names, notes


def _copied_from(rows: DataRows) -> Reference:
    """What memorisation is measured against: training rows, beside held-out ones; both are in the fingerprint."""
    training = reference_of(f"training rows of {rows.origin}", rows.training, _MOST_ROWS)
    held_out = reference_of("", rows.held_out, _MOST_ROWS)
    return replace(training, fingerprint=f"{training.fingerprint[:32]}{held_out.fingerprint[:32]}")


def _memorised(
    space: FeatureNetwork,
    samples: Features,
    rows: DataRows,
    replicates: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Memorisation:
    training = rows_features(space, rows.training, _MOST_ROWS, progress)
    held_out = rows_features(space, rows.held_out, _MOST_ROWS)
    return memorisation(samples, training, held_out, replicates, seed)


def nearest_picture(samples: Tensor, training: TrainingRows, measured: Measured) -> Image.Image | None:
    """The samples nearest to a training row, each above its nearest row by features and by pixels.

    None where memorisation was not measured. Left to right: the eight nearest by features, the eight by pixels.
    """
    if measured.in_features is None or measured.in_pixels is None:
        return None
    half = _SHOWN // 2
    chosen = np.concatenate([measured.in_features.worst[:half], measured.in_pixels.worst[:half]])
    lines = [samples[torch.from_numpy(chosen)]]
    for found in (measured.in_features, measured.in_pixels):
        lines.append(training.read(torch.from_numpy(found.nearest[chosen])).to(samples))
    return grid_picture(torch.nan_to_num(torch.cat(lines)), len(chosen), zoom=2)
