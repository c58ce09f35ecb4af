"""What is trained on, as rows: a picture (or its latents), its class label, its captions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


class TrainingRows(Protocol):
    """Rows to train on or to hold out.

    shape: [channels, height, width] of every row. class_labels: int64 [rows], None where there are no classes.
    captions: the captions of each row, () for a row without; None where no row has any.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...  # noqa: D102
    @property
    def class_labels(self) -> Tensor | None: ...  # noqa: D102
    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def read(self, indices: Tensor, draw: int | None = None) -> Tensor:
        """What the network denoises, float32 [len(indices), channels, height, width], at int64 indices.

        draw: the address of what is random in a row (a latent's noise, a flip): training passes its step. None: nothing
        is drawn, for validation. Rows without randomness read the same either way.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same rows, read to another device."""
        ...


@dataclass(frozen=True)
class PicturesInMemory:
    """Pictures as uint8 [rows, channels, height, width], with what is known of them (see TrainingRows)."""

    images: Tensor
    class_labels: Tensor | None = None
    captions: Sequence[tuple[str, ...]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor, draw: int | None = None) -> Tensor:
        """Pictures as float32 in [-1, 1], [len(indices), channels, height, width], at int64 indices."""
        return to_signed_unit(self.images[indices])

    def labelled(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures as read() gives them, their class labels [len(indices)]) of rows that have labels."""
        assert self.class_labels is not None
        return self.read(indices), self.class_labels[indices]

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device."""
        labels = None if self.class_labels is None else self.class_labels.to(device)
        return replace(self, images=self.images.to(device), class_labels=labels)


def to_signed_unit(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 0 .. 255, rounded to the nearest."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
