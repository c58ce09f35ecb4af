"""From a source of pictures to rows of latents: encoded once, kept in a cache (data/cache.py)."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smalti.autoencoders.protocol import Autoencoder
from smalti.autoencoders.registry import AutoencoderConfig, load_autoencoder
from smalti.data.cache import Cache, Entry, picture_key
from smalti.data.cached_rows import MOMENTS, CachedLatents, measure_cached_latents
from smalti.data.decode import UnreadablePicture
from smalti.data.filling import Encode, FillReport, fill_cache
from smalti.data.latents import LatentStatistics
from smalti.data.listing import Listing, Skipped
from smalti.data.on_demand import fitted_file, fitted_picture
from smalti.data.rows import to_signed_unit
from smalti.data.sources import DataConfig, list_pictures
from smalti.errors import UserError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OpenedLatents:
    """A source's pictures as latents. autoencoder: what made them, and decodes them. held_out may be empty.

    statistics: of the training rows; both parts are normalised by them. skipped: (key, reason) of what cannot be used.
    """

    training: CachedLatents
    held_out: CachedLatents
    statistics: LatentStatistics
    autoencoder: Autoencoder
    class_names: tuple[str, ...]
    skipped: Skipped
    report: FillReport


@dataclass(frozen=True)
class _Picture:
    """A picture to encode: its row in the listing, its name there, the SHA-256 of its file."""

    row: int
    name: str
    content: str
    flipped: bool


def open_latents(
    folder: Path,
    data: DataConfig,
    config: AutoencoderConfig,
    image_size: tuple[int, int],
    *,
    flips: bool = False,
    seed: int = 0,
    statistics: LatentStatistics | None = None,
    jobs: int = 1,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    autoencoder: Autoencoder | None = None,
    reading: Progress | None = None,
    encoding: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> OpenedLatents:
    """The latents of a source's pictures at (height, width), encoded where the cache in folder lacks them.

    flips: also those of the mirror images, which are not the mirror images of the latents. seed: of the noise and flips
    of the rows. statistics: as an earlier call measured them, for a run that goes on. jobs: processes that encode.
    autoencoder: the config's, where it has been loaded already.
    reading and encoding are called with (done, total) while files are read to find their addresses, and while pictures
    are encoded; waiting() when another process is filling the cache. Raises UserError for a source or an autoencoder
    that is not there or does not fit, and where no picture can be read.
    """
    autoencoder = autoencoder or load_autoencoder(config, device)
    if autoencoder is None:
        raise UserError("autoencoder=pixels makes no latents: there is nothing to cache")
    if autoencoder.in_channels not in (1, 3):
        raise UserError(f"the autoencoder takes {autoencoder.in_channels} channels: pictures have 1 or 3")
    if any(side % autoencoder.factor for side in image_size):
        raise UserError(f"image_size={image_size}: the autoencoder's factor of {autoencoder.factor} must divide both")
    height, width = (side // autoencoder.factor for side in image_size)
    listing = list_pictures(data)
    contents, unread = _contents(listing, reading)
    transform = {"size": list(image_size), "channels": autoencoder.in_channels, "fit": listing.fit}
    address = partial(picture_key, encoder=autoencoder.fingerprint, transform=transform)
    keys = {row: address(content) for row, content in contents.items()}
    flipped_keys = {row: address(content, flipped=True) for row, content in contents.items()} if flips else {}
    wanted: dict[str, _Picture] = {}
    for row, content in contents.items():
        wanted.setdefault(keys[row], _Picture(row, listing.keys[row], content, False))
        if flips:  # beside the picture itself, so that both are decoded at once
            wanted.setdefault(flipped_keys[row], _Picture(row, listing.keys[row], content, True))
    encoder = _PictureEncoder(data, config, autoencoder.in_channels, image_size, device)
    make_encode = encoder if jobs > 1 else partial(encoder.encode_with, autoencoder, listing)
    report = fill_cache(
        folder, wanted, make_encode, jobs=jobs, batch_size=batch_size, progress=encoding, waiting=waiting
    )
    cache = Cache(folder)
    empty = [row for row, key in keys.items() if not cache.tensor_names(key)]
    skipped = {**unread, **{row: _reason(listing, row, autoencoder.in_channels, image_size) for row in empty}}
    usable = [row for row in keys if row not in skipped]
    if not usable:
        row, reason = next(iter(skipped.items()))
        raise UserError(f"{listing.origin}: none of {len(listing)} pictures can be read; {listing.keys[row]}: {reason}")
    training = [row for row in usable if not listing.held_out[row]]
    held_out = [row for row in usable if listing.held_out[row]]
    if not training:  # all that could be trained on is corrupt
        training, held_out = held_out, []
    statistics = statistics or measure_cached_latents(
        cache, [keys[row] for row in training], autoencoder.latent_channels
    )

    def rows(chosen: Sequence[int]) -> CachedLatents:
        labels, captions = listing.class_labels, listing.captions
        return CachedLatents(
            cache,
            (autoencoder.latent_channels, height, width),
            [keys[row] for row in chosen],
            statistics,
            [flipped_keys[row] for row in chosen] if flips else None,
            None if labels is None else labels[torch.tensor(chosen, dtype=torch.int64)],
            None if captions is None else [captions[row] for row in chosen],
            seed,
            device,
        )

    reasons = tuple((listing.keys[row], reason) for row, reason in sorted(skipped.items()))
    return OpenedLatents(
        rows(training), rows(held_out), statistics, autoencoder, listing.class_names, listing.skipped + reasons, report
    )


def _contents(listing: Listing, progress: Progress | None) -> tuple[dict[int, str], dict[int, str]]:
    """(row -> SHA-256 of its file, row -> why it could not be read)."""
    contents: dict[int, str] = {}
    unread: dict[int, str] = {}

    def digest(row: int) -> str | OSError:
        try:
            return hashlib.sha256(listing.read_bytes(row, None)).hexdigest()
        except OSError as error:
            return error

    chunk = 1024  # the pool's queue would otherwise hold a task for every picture
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(listing), chunk):
            rows = range(start, min(start + chunk, len(listing)))
            for row, result in zip(rows, pool.map(digest, rows), strict=True):
                if isinstance(result, OSError):
                    unread[row] = str(result)
                else:
                    contents[row] = result
            if progress is not None:
                progress(rows.stop, len(listing))
    return contents, unread


def _reason(listing: Listing, row: int, channels: int, image_size: tuple[int, int]) -> str:
    """Why a picture cannot be used."""
    try:
        fitted_picture(listing, row, channels, image_size)
    except (UnreadablePicture, OSError) as error:
        return str(error)
    return "it could not be read when it was cached"


@dataclass(frozen=True)
class _PictureEncoder:
    """Makes the encode function of a process from what can be sent to it. A picture that is none has an empty entry."""

    data: DataConfig
    config: AutoencoderConfig
    channels: int
    image_size: tuple[int, int]
    device: torch.device | str

    def __call__(self) -> Encode[_Picture]:
        autoencoder = load_autoencoder(self.config, self.device)
        assert autoencoder is not None
        return self.encode_with(autoencoder, list_pictures(self.data))

    def encode_with(self, autoencoder: Autoencoder, listing: Listing) -> Encode[_Picture]:
        """The encode function, with what it needs at hand."""
        return partial(self._encode, autoencoder, listing)

    @torch.no_grad()
    def _encode(self, autoencoder: Autoencoder, listing: Listing, items: Sequence[_Picture]) -> list[Entry]:
        pictures = {item.row: item for item in items}
        pixels = {row: self._pixels(listing, item) for row, item in pictures.items()}
        views = [p.flip(-1) if item.flipped else p for item in items if (p := pixels[item.row]) is not None]
        if not views:
            return [{} for _ in items]
        moments = iter(autoencoder.encode_moments(to_signed_unit(torch.stack(views)).to(self.device)).float().cpu())
        return [{} if pixels[item.row] is None else {MOMENTS: next(moments)} for item in items]

    def _pixels(self, listing: Listing, item: _Picture) -> Tensor | None:
        """uint8 [channels, height, width]; None for what is no picture."""
        content = listing.read_bytes(item.row, None) if item.row < len(listing) else b""
        if hashlib.sha256(content).hexdigest() != item.content:
            raise UserError(f"{item.name} has changed while it was cached: run again when the pictures are at rest")
        try:
            return fitted_file(content, self.channels, self.image_size, listing.fit)
        except UnreadablePicture:
            return None
