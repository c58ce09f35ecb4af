"""The bundled digits: 10,000 rows of MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), shuffled once. See NOTICE."""

from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import torch
from torch import Tensor

TRAINING_ROWS = 9000  # rows 9000 and on are held out


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures in memory: uint8 [rows, channels, height, width] and their class labels int64 [rows]."""

    images: Tensor
    class_labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures as float32 in [-1, 1] [rows, channels, height, width], labels [rows]) at int64 indices."""
        return to_signed_unit(self.images[indices]), self.class_labels[indices]


def to_signed_unit(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 0 .. 255, rounded to the nearest."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def load_digits() -> tuple[LabelledPictures, LabelledPictures]:
    """(9,000 rows to train on, 1,000 held-out rows), 1 x 28 x 28, labels 0 .. 9."""
    with as_file(files("smalti.data") / "digits-10k.npz") as path, np.load(path) as archive:
        images = torch.from_numpy(archive["images"])[:, None]
        labels = torch.from_numpy(archive["labels"]).long()
    return (
        LabelledPictures(images[:TRAINING_ROWS], labels[:TRAINING_ROWS]),
        LabelledPictures(images[TRAINING_ROWS:], labels[TRAINING_ROWS:]),
    )
