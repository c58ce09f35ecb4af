"""From a run's config to what it trains on: rows that fit the network, and captions as the network reads them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.autoencoders.caching import Progress, open_latents
from smalti.autoencoders.registry import Pixels, load_autoencoder
from smalti.conditioning.encoders import build_text_encoder
from smalti.conditioning.tiny import CaptionTokenizer, TinyTextConfig, train_tokenizer
from smalti.config import RunConfig
from smalti.data.latents import LatentStatistics
from smalti.data.listing import Skipped
from smalti.data.opening import OpenedRows, open_rows
from smalti.data.rows import TrainingRows
from smalti.pipeline import Decoder, latent_decoder, read_statistics, read_tokenizer
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, cache_folder, write_text
from smalti.training.display import TrainingDisplay
from smalti.types import UserError

_NAMED = 5  # skipped files that are named one by one


@dataclass(frozen=True)
class RunData:
    """What a run trains on. skipped: (name, reason) of pictures that cannot be used. On latents also what decodes them,
    and their statistics."""

    training: TrainingRows
    held_out: TrainingRows
    skipped: Skipped
    decode: Decoder | None = None
    statistics: LatentStatistics | None = None


def open_run_data(
    config: RunConfig, device: torch.device, run: Path | None = None, progress: Progress | None = None
) -> RunData:
    """A run's pictures at its network's size, or their latents, encoded where the cache lacks them.

    run: a run that is gone on with, whose latents keep their statistics. progress(done, total) is called while pictures
    are decoded or encoded. Raises UserError where they cannot be opened or lack labels or captions.
    """
    if isinstance(config.autoencoder, Pixels):
        opened = open_run_rows(config, progress)
        return RunData(opened.training, opened.held_out, opened.skipped)
    autoencoder = load_autoencoder(config.autoencoder)
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
        encoding=progress,
    )
    if latents.autoencoder.latent_channels != config.model.in_channels:
        raise UserError(
            f"model.in_channels={config.model.in_channels}: the latents have {latents.autoencoder.latent_channels}"
        )
    _check_told(config, latents.training)
    decode = latent_decoder(latents.autoencoder, latents.statistics)
    return RunData(latents.training, latents.held_out, latents.skipped, decode, latents.statistics)


def open_run_rows(config: RunConfig, progress: Progress | None = None) -> OpenedRows:
    """A run's pictures as pixels, at its network's size. Errors as open_run_data's."""
    model = config.model
    opened = open_rows(
        config.data,
        model.in_channels,
        model.image_size,
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


def report_skipped(skipped: Skipped, display: TrainingDisplay) -> None:
    """Say which files could not be read: how many, and the first few by name."""
    for name, reason in skipped[:_NAMED]:
        display.message(f"skipped {name}: {reason}")
    if len(skipped) > _NAMED:
        display.message(f"skipped {len(skipped)} files in all; `smalti data show` lists them")


def pretrained_encoder(config: RunConfig, device: torch.device) -> PromptEncoder | None:
    """The run's pretrained text encoders; None where it has none or trains its own. Raises UserError."""
    if config.text is None or isinstance(config.text, TinyTextConfig):
        return None
    return build_text_encoder(config.text, device)


def caption_tokenizer(config: RunConfig, rows: TrainingRows) -> CaptionTokenizer | None:
    """The tokenizer of a run's own text encoder, trained on the captions of rows; None where it has no such encoder."""
    if not isinstance(config.text, TinyTextConfig):
        return None
    return train_tokenizer((text for row in rows.captions or () for text in row), config.text)


def kept_tokenizer(config: RunConfig, rows: TrainingRows, folder: RunFolder) -> CaptionTokenizer | None:
    """caption_tokenizer(), trained once and kept in the run directory."""
    if isinstance(config.text, TinyTextConfig) and folder.tokenizer.exists():
        return read_tokenizer(folder)
    tokenizer = caption_tokenizer(config, rows)
    if tokenizer is not None:
        write_text(folder.tokenizer, tokenizer.text)
    return tokenizer
