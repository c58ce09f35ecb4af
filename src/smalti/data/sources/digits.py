"""The bundled digits as a source."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from smalti.data.digits import load_digits
from smalti.data.listing import Listing, pgm_bytes

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitsData:
    """The 10,000 digits that smalti carries (see data/digits.py): 1 x 28 x 28, ten classes."""

    kind: ClassVar[str] = "digits"


def list_digits(config: DigitsData) -> Listing:
    """The bundled digits, each with two captions; the last 1,000 are held out."""
    training, held_out = load_digits()
    assert training.class_labels is not None
    assert held_out.class_labels is not None
    pixels = torch.cat([training.images, held_out.images])
    labels = torch.cat([training.class_labels, held_out.class_labels])
    captions = [(f"the digit {name}", f"a handwritten {i}") for i, name in enumerate(_NAMES)]
    return Listing(
        origin="the bundled digits",
        keys=[f"{i:05}" for i in range(len(pixels))],
        read_bytes=lambda row, limit: pgm_bytes(pixels[row])[:limit],
        held_out=torch.arange(len(pixels)) >= len(training),
        class_labels=labels,
        class_names=tuple(str(i) for i in range(10)),
        captions=[captions[label] for label in labels.tolist()],
        pixels=pixels,
    )
