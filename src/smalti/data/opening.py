"""From a source's config to rows to train on: what can be read is kept, the rest is counted and named."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.data.decode import UnreadablePicture, fit_picture, grey_or_rgb, picture_size
from smalti.data.listing import Listing, Skipped
from smalti.data.on_demand import PicturesOnDemand, fitted_picture
from smalti.data.rows import PicturesInMemory, TrainingRows
from smalti.data.sources import DataConfig, list_pictures
from smalti.types import UserError

MEMORY_LIMIT = 2**30  # bytes of pictures at the target's size that are decoded once and kept
_HEADER = 2**16  # bytes that hold a picture's header, nearly always
_CHUNK = 32  # pictures a task of the pool

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OpenedRows:
    """A source, opened. sizes: int64 [training rows, 2], the (height, width) the pictures had; for buckets.

    skipped: (key, reason) of what cannot be used. held_out may be empty: where the config's share is 0, or there is but
    one picture.
    """

    training: TrainingRows
    held_out: TrainingRows
    class_names: tuple[str, ...]
    skipped: Skipped
    sizes: Tensor
    held_out_sizes: Tensor


def open_rows(
    config: DataConfig,
    channels: int,
    image_size: tuple[int, int],
    *,
    needs_captions: bool = False,
    needs_labels: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> OpenedRows:
    """The rows of a source at (height, width), 1 or 3 channels; progress(done, total) is called on the way.

    Rows that take up to memory_limit bytes at that size are decoded now and kept; of more, only the headers are read
    now, and the pictures when a batch asks for them. Raises UserError where the source is missing or empty, no picture
    can be read, or captions or labels are needed and no picture has any.
    """
    if channels not in (1, 3):
        raise UserError(f"model.in_channels={channels}: pictures have 1 (grey) or 3 (RGB) channels")
    listing = list_pictures(config)
    if needs_captions and listing.captions is None:
        raise UserError(
            f"{listing.origin} has no captions, and this network is trained on text: write metadata.jsonl beside the "
            'pictures, a line a picture: {"file_name": "a.png", "text": "a cat"}'
        )
    if needs_labels and listing.class_labels is None:
        raise UserError(
            f"{listing.origin} has no classes: sort the pictures into a folder a class, or set num_classes=0"
        )
    num_bytes = len(listing) * channels * image_size[0] * image_size[1]
    if listing.pixels is not None:
        images, sizes = _fit_pixels(listing.pixels, channels, image_size)
        failures: dict[int, str] = {}
    elif num_bytes <= memory_limit:
        images, sizes, failures = _decode_all(listing, channels, image_size, progress)
    else:
        images = None
        sizes, failures = _read_headers(listing, progress)
    if len(failures) == len(listing):
        row, reason = next(iter(failures.items()))
        raise UserError(f"{listing.origin}: none of {len(listing)} pictures can be read; {listing.keys[row]}: {reason}")
    readable = torch.ones(len(listing), dtype=torch.bool)
    readable[list(failures)] = False

    def rows_where(chosen: Tensor) -> TrainingRows:
        rows = chosen.nonzero()[:, 0]
        labels = None if listing.class_labels is None else listing.class_labels[rows]
        captions = None if listing.captions is None else [listing.captions[row] for row in rows.tolist()]
        if images is not None:
            return PicturesInMemory(images[rows], labels, captions)
        return PicturesOnDemand(listing, rows, channels, image_size, labels, captions)

    held_out = readable & listing.held_out
    training = readable & ~listing.held_out
    if not training.any():  # all that could be trained on is corrupt
        training, held_out = held_out, training
    return OpenedRows(
        training=rows_where(training),
        held_out=rows_where(held_out),
        class_names=listing.class_names,
        skipped=listing.skipped + tuple((listing.keys[row], reason) for row, reason in sorted(failures.items())),
        sizes=sizes[training],
        held_out_sizes=sizes[held_out],
    )


def _fit_pixels(pixels: Tensor, channels: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(pictures at the target's size, their sizes) of a source that holds them decoded. Raises UserError, not
    UnreadablePicture: they are all of one size."""
    sizes = torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    try:
        if tuple(pixels.shape[2:]) != image_size:
            pixels = torch.stack([fit_picture(picture, *image_size) for picture in pixels])
        return grey_or_rgb(pixels, channels), sizes
    except UnreadablePicture as error:
        raise UserError(f"model.image_size={image_size}: {error}") from None


def _in_pool(count: int, task: Callable[[int], str | None], progress: Progress | None) -> dict[int, str]:
    """task(row) for every row, in threads (decoding releases the interpreter's lock): row -> why it failed."""
    failures: dict[int, str] = {}

    def chunk(start: int) -> None:
        for row in range(start, min(start + _CHUNK, count)):
            try:
                task(row)
            except (UnreadablePicture, OSError) as error:
                failures[row] = str(error)

    starts = range(0, count, _CHUNK)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, warnings.catch_warnings():
        # Pillow warns of what is damaged or too large, which is collected here. The threads share these filters.
        warnings.filterwarnings("ignore", module="PIL")
        for start, _ in zip(starts, pool.map(chunk, starts), strict=True):
            if progress is not None:
                progress(min(start + _CHUNK, count), count)
    return failures


def picture_size_of_row(listing: Listing, row: int) -> tuple[int, int]:
    """(height, width) of a row's picture, upright, from its file's first part. Raises UnreadablePicture or OSError."""
    try:
        return picture_size(listing.read_bytes(row, _HEADER))
    except UnreadablePicture:
        return picture_size(listing.read_bytes(row, None))  # a header behind long metadata, or at the end (TIFF)


def _decode_all(
    listing: Listing, channels: int, image_size: tuple[int, int], progress: Progress | None
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """(pictures uint8 [rows, channels, height, width], their sizes, why some could not be read)."""
    images = torch.empty(len(listing), channels, *image_size, dtype=torch.uint8)
    sizes = torch.zeros(len(listing), 2, dtype=torch.int64)

    def decode(row: int) -> None:
        sizes[row] = torch.tensor(picture_size_of_row(listing, row))
        images[row] = fitted_picture(listing, row, channels, image_size)

    return images, sizes, _in_pool(len(listing), decode, progress)


def _read_headers(listing: Listing, progress: Progress | None) -> tuple[Tensor, dict[int, str]]:
    """(sizes of the pictures, why some headers could not be read)."""
    sizes = torch.zeros(len(listing), 2, dtype=torch.int64)

    def measure(row: int) -> None:
        sizes[row] = torch.tensor(picture_size_of_row(listing, row))

    return sizes, _in_pool(len(listing), measure, progress)


def caption_lengths(captions: Sequence[tuple[str, ...]] | None) -> list[int]:
    """Characters of every caption, sorted."""
    return sorted(len(caption) for row in captions or () for caption in row)
