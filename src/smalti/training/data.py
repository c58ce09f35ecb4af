"""From a run's config to what it trains on: rows that fit the network, and captions as the network reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.autoencoders.caching import Progress, open_latents
from smalti.autoencoders.protocol import Tokenizer
from smalti.autoencoders.registry import Pixels, TokenizerConfig, load_autoencoder, load_tokenizer
from smalti.conditioning.encoders import TextEncoder, build_text_encoder
from smalti.conditioning.tiny import CaptionTokenizer, TinyTextConfig, train_tokenizer
from smalti.config import BucketConfig, RunConfig
from smalti.data.buckets import make_buckets
from smalti.data.cached_rows import cache_text
from smalti.data.latents import LatentStatistics
from smalti.data.listing import Skipped
from smalti.data.opening import OpenedRows, open_buckets, open_rows
from smalti.data.rows import TrainingRows
from smalti.data.tokens import tokenized
from smalti.errors import UserError
from smalti.models.unet import UNetConfig
from smalti.pipeline import Decoder, latent_decoder, read_statistics, read_tokenizer
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, cache_folder, write_text
from smalti.training.display import TrainingDisplay

_NAMED = 5  # skipped files that are named one by one


@dataclass(frozen=True)
class RunData:
    """What a run trains on: rows of each size (one, without buckets).

    skipped: (name, reason) of pictures that cannot be used; enlarged: (name, factor) of those that must grow. On
    latents also what decodes them, and their statistics; of tokens their tokenizer.
    """

    training: tuple[TrainingRows, ...]
    held_out: tuple[TrainingRows, ...]
    skipped: Skipped
    enlarged: tuple[tuple[str, float], ...] = ()
    decode: Decoder | None = None
    statistics: LatentStatistics | None = None
    tokenizer: Tokenizer | None = None

    @property
    def num_training(self) -> int:
        """Rows to train on, of all sizes."""
        return sum(len(rows) for rows in self.training)

    @property
    def num_held_out(self) -> int:
        """Rows held out, of all sizes."""
        return sum(len(rows) for rows in self.held_out)


def open_run_data(
    config: RunConfig, device: torch.device, run: Path | None = None, progress: Progress | None = None
) -> RunData:
    """A run's pictures at its network's size, or their latents, encoded where the cache lacks them, or their tokens.

    run: a run that is gone on with, whose latents keep their statistics. progress(done, total) is called while pictures
    are decoded or encoded. Raises UserError where they cannot be opened or lack labels or captions.
    """
    if isinstance(config.autoencoder, Pixels) and config.buckets is not None:
        return _open_run_buckets(config, config.buckets, progress)
    if isinstance(config.autoencoder, Pixels):
        opened = open_run_rows(config, config.model.in_channels, config.model.image_size, progress)
        return RunData((opened.training,), _filled(opened.held_out), opened.skipped)
    if config.buckets is not None:
        raise UserError(f"buckets: only for autoencoder=pixels, and this run has {config.autoencoder.kind}")
    if isinstance(config.autoencoder, TokenizerConfig):
        return _open_run_tokens(config, config.autoencoder, device, progress)
    autoencoder = load_autoencoder(config.autoencoder, device)
    assert autoencoder is not None
    factor, (height, width) = autoencoder.factor, config.model.image_size
    kept = None if run is None else RunFolder(run).latents
    latents = open_latents(
        cache_folder() / "latents",
        config.data,
        config.autoencoder,
        (height * factor, width * factor),
        seed=config.seed,
        statistics=read_statistics(kept) if kept is not None and kept.exists() else None,
        device=device,
        autoencoder=autoencoder,
        encoding=progress,
    )
    if latents.autoencoder.latent_channels != config.model.in_channels:
        raise UserError(
            f"model.in_channels={config.model.in_channels}: the latents have {latents.autoencoder.latent_channels}"
        )
    _check_told(config, latents.training)
    decode = latent_decoder(latents.autoencoder, latents.statistics)
    return RunData((latents.training,), _filled(latents.held_out), latents.skipped, (), decode, latents.statistics)


def _open_run_tokens(
    config: RunConfig, tokenizer_config: TokenizerConfig, device: torch.device, progress: Progress | None
) -> RunData:
    tokenizer = load_tokenizer(tokenizer_config, device)
    height, width = config.model.image_size
    size = (height * tokenizer.factor, width * tokenizer.factor)
    opened = open_run_rows(config, tokenizer.in_channels, size, progress)
    training, held_out = (
        tokenized(rows, tokenizer.encode, device, progress) for rows in (opened.training, opened.held_out)
    )
    return RunData((training,), _filled(held_out), opened.skipped, tokenizer=tokenizer)


def _filled(*parts: TrainingRows) -> tuple[TrainingRows, ...]:
    return tuple(rows for rows in parts if len(rows))


def _open_run_buckets(config: RunConfig, buckets: BucketConfig, progress: Progress | None) -> RunData:
    model = config.model
    height, width = model.image_size
    patch = model.shrinkage if isinstance(model, UNetConfig) else model.patch_size
    tokens = buckets.token_budget or height * width // patch**2
    sizes = make_buckets(tokens, patch, max_aspect=buckets.max_aspect, step=buckets.step)
    opened = open_buckets(
        config.data,
        model.in_channels,
        sizes,
        needs_captions=config.text is not None,
        needs_labels=config.num_classes > 0,
        progress=progress,
    )
    for rows in opened.training:
        _check_told(config, rows)
    return RunData(opened.training, opened.held_out, opened.skipped, opened.enlarged)


def open_run_rows(
    config: RunConfig, channels: int, size: tuple[int, int], progress: Progress | None = None
) -> OpenedRows:
    """A run's data as pixels, with the labels or captions that its network is told. size: height, width.

    Errors as open_run_data's.
    """
    opened = open_rows(
        config.data,
        channels,
        size,
        needs_captions=config.text is not None,
        needs_labels=config.num_classes > 0,
        progress=progress,
    )
    _check_told(config, opened.training)
    return opened


def _check_told(config: RunConfig, rows: TrainingRows) -> None:
    """Raise UserError where rows lack what the network is told of them, or have more classes."""
    if config.text is not None and rows.captions is None:
        raise UserError(f"text={config.text.kind}: the data ({config.data.kind}) has no captions")
    if not config.num_classes:
        return
    if rows.class_labels is None:
        raise UserError(f"model.num_classes={config.num_classes}: the data ({config.data.kind}) has no classes")
    if int(rows.class_labels.max()) >= config.num_classes:
        raise UserError(
            f"model.num_classes={config.num_classes}: the data has {int(rows.class_labels.max()) + 1} classes"
        )


def report_skipped(data: RunData, display: TrainingDisplay) -> None:
    """Say which files could not be read: how many, and the first few by name."""
    for name, reason in data.skipped[:_NAMED]:
        display.message(f"skipped {name}: {reason}")
    if len(data.skipped) > _NAMED:
        display.message(f"skipped {len(data.skipped)} files in all; `smalti data show` lists them")
    if data.enlarged:
        name, factor = max(data.enlarged, key=lambda entry: entry[1])
        display.message(f"{len(data.enlarged)} pictures are enlarged, {name} the most: {factor:.1f} times")


def pretrained_encoder(config: RunConfig, device: torch.device) -> TextEncoder | None:
    """The run's pretrained text encoders; None where it has none or trains its own.

    Raises UserError where they are not to be had, or give text of another width than the network takes.
    """
    if config.text is None or isinstance(config.text, TinyTextConfig):
        return None
    encoder = build_text_encoder(config.text, device)
    given = encoder([""])
    for field, embeds in (("text_width", given.text_embeds), ("pooled_width", given.pooled_embeds)):
        wanted = getattr(config.model, field, None)
        if wanted is None:
            continue
        if embeds is None:
            raise UserError(
                f"model={config.model.kind} needs a pooled text vector, and text={config.text.kind} has none"
            )
        if embeds.shape[-1] != wanted:
            raise UserError(f"model.{field}={wanted}: text={config.text.kind} gives {embeds.shape[-1]}; set it to that")
    return encoder


def caption_features(config: RunConfig, data: RunData, encoder: TextEncoder) -> PromptEncoder:
    """What a training step reads of a pretrained encoder: the features of all captions, encoded once and cached.

    Captions whose parts are shuffled are new at every step, and encoded there.
    """
    if config.captions.shuffle:
        return encoder
    captions = {text for rows in (*data.training, *data.held_out) for row in rows.captions or () for text in row}
    cached, _ = cache_text(cache_folder() / "text", ["", *sorted(captions)], encoder.fingerprint, lambda: encoder)
    return cached.read


def caption_tokenizer(config: RunConfig, buckets: Sequence[TrainingRows]) -> CaptionTokenizer | None:
    """The tokenizer of a run's own text encoder, trained on all captions; None where it has no such encoder."""
    if not isinstance(config.text, TinyTextConfig):
        return None
    return train_tokenizer((text for rows in buckets for row in rows.captions or () for text in row), config.text)


def kept_tokenizer(config: RunConfig, buckets: Sequence[TrainingRows], folder: RunFolder) -> CaptionTokenizer | None:
    """caption_tokenizer(), trained once and kept in the run directory."""
    if isinstance(config.text, TinyTextConfig) and folder.tokenizer.exists():
        return read_tokenizer(folder)
    tokenizer = caption_tokenizer(config, buckets)
    if tokenizer is not None:
        write_text(folder.tokenizer, tokenizer.text)
    return tokenizer
