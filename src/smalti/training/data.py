"""From a run's config to what it trains on: rows that fit the network, and captions as the network reads them."""

import torch

from smalti.conditioning.encoders import build_text_encoder
from smalti.conditioning.tiny import CaptionTokenizer, TinyTextConfig, train_tokenizer
from smalti.config import RunConfig
from smalti.data.opening import OpenedRows, open_rows
from smalti.data.rows import TrainingRows
from smalti.pipeline import read_tokenizer
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, write_text
from smalti.training.display import TrainingDisplay
from smalti.types import UserError

_NAMED = 5  # skipped files that are named one by one


def open_run_rows(config: RunConfig) -> OpenedRows:
    """A run's pictures at its network's size. Raises UserError where they cannot be opened or lack labels or captions
    that the network is told."""
    model = config.model
    opened = open_rows(
        config.data,
        model.in_channels,
        model.image_size,
        needs_captions=config.text is not None,
        needs_labels=config.num_classes > 0,
    )
    labels = opened.training.class_labels
    if config.num_classes and labels is not None and int(labels.max()) >= config.num_classes:
        raise UserError(f"model.num_classes={config.num_classes}: the data has {int(labels.max()) + 1} classes")
    return opened


def report_skipped(opened: OpenedRows, display: TrainingDisplay) -> None:
    """Say which files could not be read: how many, and the first few by name."""
    for name, reason in opened.skipped[:_NAMED]:
        display.message(f"skipped {name}: {reason}")
    if len(opened.skipped) > _NAMED:
        display.message(f"skipped {len(opened.skipped)} files in all; `smalti data show` lists them")


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
