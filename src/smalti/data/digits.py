"""The bundled digits: 10,000 rows of MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), shuffled once. See NOTICE."""

from importlib.resources import as_file, files

import numpy as np
import torch

from smalti.data.rows import PicturesInMemory

TRAINING_ROWS = 9000  # rows 9000 and on are held out


def load_digits() -> tuple[PicturesInMemory, PicturesInMemory]:
    """(9,000 rows to train on, 1,000 held-out rows), 1 x 28 x 28, labels 0 .. 9."""
    with as_file(files("smalti.data") / "digits-10k.npz") as path, np.load(path) as archive:
        images = torch.from_numpy(archive["images"])[:, None]
        labels = torch.from_numpy(archive["labels"]).long()
    return (
        PicturesInMemory(images[:TRAINING_ROWS], labels[:TRAINING_ROWS]),
        PicturesInMemory(images[TRAINING_ROWS:], labels[TRAINING_ROWS:]),
    )
