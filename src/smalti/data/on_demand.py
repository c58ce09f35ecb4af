"""Rows whose pictures are read and decoded when a batch asks for them: for what does not fit in memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from smalti.data.decode import Fit, UnreadablePicture, decode_picture, fit_picture
from smalti.data.listing import Listing
from smalti.data.rows import to_signed_unit
from smalti.errors import UserError

_LONGEST_GAP = 100  # rows in a row that cannot be read: then it is not the pictures


@dataclass(frozen=True)
class PicturesOnDemand:
    """Some rows of a listing (see TrainingRows), decoded by `threads` threads when they are read.

    A picture that turns out unreadable gives way to that of the next row that can be read (the first after the last):
    its own label and captions then stand beside another picture, which one row in many bears, and the batch stays a
    function of the files alone. `replaced` collects what was found so: key -> reason.
    """

    listing: Listing
    rows: Tensor  # int64: which of the listing's
    channels: int
    image_size: tuple[int, int]
    class_labels: Tensor | None = None
    captions: Sequence[tuple[str, ...]] | None = None
    device: torch.device | str = "cpu"
    threads: int = 8
    replaced: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        return self.channels, *self.image_size

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Tensor, draw: int | None = None) -> Tensor:
        """Pictures as float32 in [-1, 1], [len(indices), channels, height, width], at int64 indices.

        Raises UserError where 100 pictures in a row cannot be read.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            pictures = list(pool.map(self._picture, indices.tolist()))
        return to_signed_unit(torch.stack(pictures).to(self.device))

    def _picture(self, index: int) -> Tensor:
        for step in range(min(len(self.rows), _LONGEST_GAP)):
            row = int(self.rows[(index + step) % len(self.rows)])
            try:
                return fitted_picture(self.listing, row, self.channels, self.image_size)
            except (UnreadablePicture, OSError) as error:
                self.replaced[self.listing.keys[row]] = reason = str(error)
        raise UserError(f"{self.listing.origin}: {step + 1} pictures in a row cannot be read, the last: {reason}")

    def to(self, device: torch.device | str) -> Self:
        """The same rows, read to another device."""
        labels = None if self.class_labels is None else self.class_labels.to(device)
        return replace(self, device=device, class_labels=labels)


def fitted_picture(listing: Listing, row: int, channels: int, image_size: tuple[int, int]) -> Tensor:
    """A row's picture at the target's size: uint8 [channels, height, width]. Raises UnreadablePicture or OSError."""
    return fitted_file(listing.read_bytes(row, None), channels, image_size, listing.fit)


def fitted_file(content: bytes, channels: int, image_size: tuple[int, int], fit: Fit) -> Tensor:
    """A picture file's bytes at the target's size: uint8 [channels, height, width]. Raises UnreadablePicture."""
    height, width = image_size
    # Twice the target's size is left for the filter that does the rest.
    picture = decode_picture(content, channels, enough=(2 * height, 2 * width))
    return fit_picture(picture, height, width, fit)
