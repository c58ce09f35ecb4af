"""What training reads from a cache (cache.py): latents drawn from moments, text features."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from smalti import rng
from smalti.data.cache import Cache, Entry, text_key
from smalti.data.filling import Encode, FillReport, fill_cache
from smalti.data.latents import LatentStatistics, measure_latents, sample_moments
from smalti.errors import UserError
from smalti.types import Condition

MOMENTS = "moments"  # the name of a picture's tensor in its entry
EncodeCaptions = Callable[[Sequence[str]], Condition]


@dataclass(frozen=True)
class CachedLatents:
    """TrainingRows of latents: drawn anew at each reading from the moments in the cache, then normalised.

    shape: channels, height and width of the latents. keys: a row's entry. flipped_keys: the entry of its mirror image;
    a row is then read from either, half the time each. seed: of the noise and the flips.
    """

    cache: Cache
    shape: tuple[int, int, int]
    keys: Sequence[str]
    statistics: LatentStatistics
    flipped_keys: Sequence[str] | None = None
    class_labels: Tensor | None = None
    captions: Sequence[tuple[str, ...]] | None = None
    seed: int = 0
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, indices: Tensor, draw: int | None = None) -> Tensor:
        """Normalised latents, float32 [len(indices), channels, height, width], at int64 indices.

        draw: addresses the noise and the flip of each row, with the seed and the row's index; None: the latents' means,
        not flipped. Raises CacheDamage where an entry's bytes are not those that were written.
        """
        rows = indices.cpu()
        keys = [self.keys[i] for i in rows.tolist()]
        if draw is not None and self.flipped_keys is not None:
            flipped = rng.uniform(seed=self.seed, purpose="data/flip", index=rows, call=draw) < 0.5
            keys = [self.flipped_keys[i] if f else key for i, f, key in zip(rows.tolist(), flipped, keys, strict=True)]
        moments = torch.stack([self.cache.read(key)[MOMENTS] for key in keys]).float()
        # Made on the CPU whatever the device, so that all devices read the same latents.
        if draw is None or moments.shape[1] == self.shape[0]:
            eps = torch.zeros(len(keys), *self.shape)
        else:
            eps = rng.normal(self.shape, seed=self.seed, purpose="data/latent", index=rows, call=draw)
        return self.statistics.normalise(sample_moments(moments, eps)).to(self.device)

    def to(self, device: torch.device | str) -> Self:
        """The same rows, read to another device; the cache stays where it is."""
        labels = None if self.class_labels is None else self.class_labels.to(device)
        return replace(self, class_labels=labels, device=device)


def measure_cached_latents(
    cache: Cache, keys: Sequence[str], latent_channels: int, max_pictures: int = 4096
) -> LatentStatistics:
    """measure_latents() of cached pictures: of all, or of max_pictures of them, evenly spread."""
    stride = -(-len(keys) // max_pictures)
    return measure_latents((cache.read(key)[MOMENTS] for key in keys[::stride]), latent_channels)


@dataclass(frozen=True)
class CachedText:
    """The features of captions by one text encoder, given by its fingerprint."""

    cache: Cache
    encoder: str

    def read(self, captions: Sequence[str]) -> Condition:
        """The captions' features, joined into a batch; raises UserError for a caption that is not in the cache."""
        return joined_condition([self.cache.read(text_key(caption, self.encoder)) for caption in captions])


@dataclass(frozen=True)
class _EncodeCaptions:
    """A text encoder's maker as one of cache entries."""

    make: Callable[[], EncodeCaptions]

    def __call__(self) -> Encode[str]:
        encode = self.make()
        return lambda captions: condition_entries(encode(captions))


def cache_text(
    folder: Path, captions: Iterable[str], encoder: str, make_encode: Callable[[], EncodeCaptions], **options: Any
) -> tuple[CachedText, FillReport]:
    """The captions' features, encoded where the cache lacks them.

    encoder: the text encoder's fingerprint. make_encode: makes the function that encodes captions as a batch; called
    once in each process that encodes, and not at all where nothing is missing. options: of fill_cache.
    """
    wanted = {text_key(caption, encoder): caption for caption in captions}
    report = fill_cache(folder, wanted, _EncodeCaptions(make_encode), **options)
    return CachedText(Cache(folder), encoder), report


def condition_entries(cond: Condition) -> list[dict[str, Tensor]]:
    """Cache entries of the rows of a condition, as a text encoder gives it for a batch of captions."""
    present = {f.name: value for f in fields(cond) if (value := getattr(cond, f.name)) is not None}
    (rows,) = {len(value) for value in present.values()}
    return [{name: value[i].cpu() for name, value in present.items()} for i in range(rows)]


def joined_condition(entries: Sequence[Entry]) -> Condition:
    """condition_entries() undone. Token sequences of unequal length are padded at the end with zeros and masked."""
    lengths = [len(entry["text_embeds"]) for entry in entries if "text_embeds" in entry]
    if len(set(lengths)) > 1:
        entries = [_padded(entry, max(lengths)) for entry in entries]
    if len({frozenset(entry) for entry in entries}) != 1:
        raise UserError("captions whose cached features have different fields cannot be joined")
    return Condition(**{name: torch.stack([entry[name] for entry in entries]) for name in entries[0]})


def _padded(entry: Entry, length: int) -> Entry:
    embeds = entry["text_embeds"]
    mask = entry.get("text_mask", torch.ones(len(embeds), dtype=torch.bool))
    surplus = length - len(embeds)
    return {
        **entry,
        "text_embeds": torch.cat([embeds, embeds.new_zeros(surplus, *embeds.shape[1:])]),
        "text_mask": torch.cat([mask, mask.new_zeros(surplus)]),
    }
