"""What is measured of a contender's pictures: the judge's accuracy, Frechet and kernel distance, with intervals."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.data.digits import load_digits
from smalti.data.rows import to_signed_unit
from smalti.evaluation.cards import Card, Drawing, Extractor, Reference, make_card
from smalti.evaluation.features import extractor_of, judge_feature_network, reference_of
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.intervals import Estimate, Features
from smalti.evaluation.judge import Judge, held_out_accuracy, judge_features, load_judge
from smalti.evaluation.metrics import metric_named, resample

_NORMAL_QUANTILE = 1.959964  # of 97.5 %


def proportion(right: int, count: int) -> Estimate:
    """A share with its 95 % interval, which has a width also where all are right or none.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    z2 = _NORMAL_QUANTILE**2
    share = right / count
    centre = (right + z2 / 2) / (count + z2)
    half = _NORMAL_QUANTILE * math.sqrt(count) / (count + z2) * math.sqrt(share * (1 - share) + z2 / (4 * count))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


@dataclass(frozen=True)
class DigitsYardstick:
    """The judge, and the features of the held-out digits that distances are measured to."""

    judge: Judge
    real: Features
    held_out_accuracy: float
    extractor: Extractor
    reference: Reference

    def figures(self, pictures: Tensor, labels: Tensor) -> dict[str, Estimate]:
        """accuracy, fd and kid of pictures [count, 1, 28, 28] in [-1, 1] that were asked for with labels [count]."""
        features, predicted = judge_features(self.judge, pictures)
        drawn = features.double().numpy()
        return {
            "accuracy": proportion(int((predicted == labels).sum()), len(labels)),
            **{name: metric_named(name).estimate(resample(name, drawn, self.real)) for name in ("fd", "kid")},
        }

    def cards(self, figures: dict[str, Estimate], count: int, drawing: Drawing) -> list[Card]:
        """figures() of count pictures as cards, which say what they depend on."""
        return [make_card(key, e, count, self.reference, self.extractor, drawing) for key, e in figures.items()]

    def floor(self, count: int) -> float:
        """The Frechet distance of as many training pictures: what drawing could at best reach."""
        training, _ = load_digits()
        features, _ = judge_features(self.judge, to_signed_unit(training.images[:count]))
        return frechet_distance(features.double().numpy(), self.real)


def digits_yardstick() -> DigitsYardstick:
    """The bundled judge, trained first where it is not cached."""
    judge = load_judge()
    _, held_out = load_digits()
    real, _ = judge_features(judge, to_signed_unit(held_out.images))
    return DigitsYardstick(
        judge,
        real.double().numpy(),
        held_out_accuracy(judge, held_out),
        extractor_of(judge_feature_network(judge)),
        reference_of("held-out digits", held_out),
    )


def labels_of(count: int) -> Tensor:
    """0, 1, ... 9, 0 ...: the same for every contender."""
    return torch.arange(count) % 10
