"""From a source's config to rows to train on: what can be read is kept, the rest is counted and named."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.data.buckets import Size, assign_buckets
from smalti.data.decode import UnreadablePicture, fit_picture, grey_or_rgb, picture_size
from smalti.data.listing import Listing, Skipped
from smalti.data.on_demand import PicturesOnDemand, fitted_picture
from smalti.data.rows import PicturesInMemory, TrainingRows
from smalti.data.sources import DataConfig, list_pictures
from smalti.errors import UserError

MEMORY_LIMIT = 2**30  # bytes of pictures at the target's size that are decoded once and kept
_HEADER = 2**16  # bytes that hold a picture's header, nearly always
_CHUNK = 32  # pictures a task of the pool

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OpenedRows:
    """A source, opened. sizes: int64 [training rows, 2], the (height, width) the pictures had.

    skipped: (key, reason) of what cannot be used. held_out may be empty: where the config's share is 0, or there is but
    one picture.
    """

    training: TrainingRows
    held_out: TrainingRows
    class_names: tuple[str, ...]
    skipped: Skipped
    sizes: Tensor
    held_out_sizes: Tensor


@dataclass(frozen=True)
class OpenedBuckets:
    """A source, opened at several sizes. training and held_out: the rows of each size, of those sizes that have any.

    enlarged: (key, factor) of the pictures that grow more than asked for to fill their size.
    """

    training: tuple[TrainingRows, ...]
    held_out: tuple[TrainingRows, ...]
    class_names: tuple[str, ...]
    skipped: Skipped
    enlarged: tuple[tuple[str, float], ...]


def open_rows(
    config: DataConfig,
    channels: int,
    image_size: Size,
    *,
    needs_captions: bool = False,
    needs_labels: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> OpenedRows:
    """The rows of a source at (height, width), 1 or 3 channels. progress(done, total) is called while headers are read,
    and again while pictures are decoded.

    Rows that take up to memory_limit bytes at that size are decoded now and kept; of more, only the headers are read
    now, and the pictures when a batch asks for them. Raises UserError where the source is missing or empty, no picture
    can be read, or captions or labels are needed and no picture has any.
    """
    listing = _checked_listing(config, channels, needs_captions, needs_labels)
    decoded: _Decoded | None = None
    if listing.pixels is not None:
        decoded, failures = _Decoded(_fit_pixels(listing.pixels, channels, image_size)), dict[int, str]()
        sizes = torch.tensor(listing.pixels.shape[2:]).expand(len(listing), 2)
    else:
        sizes, failures = _read_headers(listing, progress)
        if len(listing) * channels * image_size[0] * image_size[1] <= memory_limit:
            decoded, later = _decode(listing, _readable(listing, failures), channels, image_size, progress)
            failures |= later
    training, held_out = _two_parts(listing, _readable(listing, failures))
    return OpenedRows(
        training=_rows_where(training, listing, channels, image_size, decoded),
        held_out=_rows_where(held_out, listing, channels, image_size, decoded),
        class_names=listing.class_names,
        skipped=_all_skipped(listing, failures),
        sizes=sizes[training],
        held_out_sizes=sizes[held_out],
    )


def open_buckets(
    config: DataConfig,
    channels: int,
    buckets: Sequence[Size],
    *,
    needs_captions: bool = False,
    needs_labels: bool = False,
    max_enlargement: float = 1.5,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> OpenedBuckets:
    """The rows of a source in aspect-ratio buckets (see data/buckets.py), each at the size that suits it best.

    Pictures that must grow more than max_enlargement-fold are kept, and listed. Memory and errors as for open_rows.
    """
    listing = _checked_listing(config, channels, needs_captions, needs_labels)
    sizes, failures = _read_headers(listing, progress)
    bucket, enlargement = assign_buckets(sizes.clamp(min=1), buckets)
    numbers = bucket[_readable(listing, failures)].unique().tolist()
    decoded: dict[int, _Decoded] = {}
    areas = torch.tensor([height * width for height, width in buckets])
    if int(areas[bucket].sum()) * channels <= memory_limit:
        for number in numbers:
            chosen = _readable(listing, failures) & (bucket == number)
            decoded[number], later = _decode(listing, chosen, channels, buckets[number], progress)
            failures |= later
    readable = _readable(listing, failures)

    def parts(chosen: Tensor) -> tuple[TrainingRows, ...]:
        rows = {number: chosen & (bucket == number) for number in numbers}
        return tuple(
            _rows_where(mine, listing, channels, buckets[number], decoded.get(number))
            for number, mine in rows.items()
            if mine.any()
        )

    training, held_out = _two_parts(listing, readable)
    grown = (readable & (enlargement > max_enlargement)).nonzero()[:, 0].tolist()
    return OpenedBuckets(
        training=parts(training),
        held_out=parts(held_out),
        class_names=listing.class_names,
        skipped=_all_skipped(listing, failures),
        enlarged=tuple((listing.keys[row], float(enlargement[row])) for row in grown),
    )


@dataclass(frozen=True)
class _Decoded:
    """Pictures in memory, uint8 [pictures, channels, height, width]; place: which of them is a listing's row's (None:
    the row's own number)."""

    images: Tensor
    place: Tensor | None = None


def _checked_listing(config: DataConfig, channels: int, needs_captions: bool, needs_labels: bool) -> Listing:
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
    return listing


def _readable(listing: Listing, failures: Mapping[int, str]) -> Tensor:
    """Which rows can be read: bool [rows]. Raises UserError where none can."""
    if len(failures) == len(listing):
        row, reason = min(failures.items())
        raise UserError(f"{listing.origin}: none of {len(listing)} pictures can be read; {listing.keys[row]}: {reason}")
    readable = torch.ones(len(listing), dtype=torch.bool)
    readable[list(failures)] = False
    return readable


def _two_parts(listing: Listing, readable: Tensor) -> tuple[Tensor, Tensor]:
    """(rows to train on, held-out rows), bool [rows] each. If only held-out rows can be read, they are trained on."""
    training, held_out = readable & ~listing.held_out, readable & listing.held_out
    return (training, held_out) if training.any() else (held_out, training)


def _all_skipped(listing: Listing, failures: Mapping[int, str]) -> Skipped:
    return listing.skipped + tuple((listing.keys[row], reason) for row, reason in sorted(failures.items()))


def _rows_where(
    chosen: Tensor, listing: Listing, channels: int, image_size: Size, decoded: _Decoded | None
) -> TrainingRows:
    """The chosen rows, bool [rows], in memory if they have been decoded, else read on demand."""
    rows = chosen.nonzero()[:, 0]
    labels = None if listing.class_labels is None else listing.class_labels[rows]
    captions = None if listing.captions is None else [listing.captions[row] for row in rows.tolist()]
    if decoded is None:
        return PicturesOnDemand(listing, rows, channels, image_size, labels, captions)
    return PicturesInMemory(decoded.images[rows if decoded.place is None else decoded.place[rows]], labels, captions)


def _fit_pixels(pixels: Tensor, channels: int, image_size: Size) -> Tensor:
    """The pictures of a source that holds them decoded, at the target's size. They are all of one size, so a size that
    does not do is a UserError."""
    try:
        if tuple(pixels.shape[2:]) != image_size:
            pixels = torch.stack([fit_picture(picture, *image_size) for picture in pixels])
        return grey_or_rgb(pixels, channels)
    except UnreadablePicture as error:
        raise UserError(f"model.image_size={image_size}: {error}") from None


def _in_pool(count: int, task: Callable[[int], None], progress: Progress | None) -> dict[int, str]:
    """task(0), task(1), ... in threads (decoding releases the interpreter's lock): which of them failed, and why."""
    failures: dict[int, str] = {}

    def chunk(start: int) -> None:
        for number in range(start, min(start + _CHUNK, count)):
            try:
                task(number)
            except (UnreadablePicture, OSError) as error:
                failures[number] = str(error)

    starts = range(0, count, _CHUNK)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, warnings.catch_warnings():
        # Pillow warns of what is damaged or too large, which is collected here. The threads share these filters.
        warnings.filterwarnings("ignore", module="PIL")
        for start, _ in zip(starts, pool.map(chunk, starts), strict=True):
            if progress is not None:
                progress(min(start + _CHUNK, count), count)
    return failures


def _read_headers(listing: Listing, progress: Progress | None) -> tuple[Tensor, dict[int, str]]:
    """(upright sizes of the pictures int64 [rows, 2], why some headers could not be read)."""
    sizes = torch.zeros(len(listing), 2, dtype=torch.int64)

    def measure(row: int) -> None:
        try:
            size = picture_size(listing.read_bytes(row, _HEADER))
        except UnreadablePicture:  # perhaps a header behind long metadata, or at the end (TIFF)
            size = picture_size(listing.read_bytes(row, None))
        sizes[row] = torch.tensor(size)

    return sizes, _in_pool(len(listing), measure, progress)


def _decode(
    listing: Listing, chosen: Tensor, channels: int, image_size: Size, progress: Progress | None
) -> tuple[_Decoded, dict[int, str]]:
    """(the chosen rows' pictures, why some could not be read, by row)."""
    rows = chosen.nonzero()[:, 0].tolist()
    images = torch.empty(len(rows), channels, *image_size, dtype=torch.uint8)

    def decode(number: int) -> None:
        images[number] = fitted_picture(listing, rows[number], channels, image_size)

    failures = _in_pool(len(rows), decode, progress)
    place = torch.cumsum(chosen, 0) - 1
    return _Decoded(images, place), {rows[number]: reason for number, reason in failures.items()}
