"""From a run's config to what it trains on: rows that fit the network, and captions as the network reads them."""

import torch

from smalti.conditioning.encoders import build_text_encoder
from smalti.conditioning.tiny import CaptionTokenizer, TinyTextConfig, train_tokenizer
from smalti.config import RunConfig
from smalti.data.rows import TrainingRows
from smalti.data.sources import OpenedRows
from smalti.pipeline import read_tokenizer
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, write_text
from smalti.training.display import TrainingDisplay
from smalti.types import UserError

_NAMED = 5  # skipped files that are named one by one


def check_rows(config: RunConfig, opened: OpenedRows) -> None:
    """Raise UserError where the data lacks what the network is told: labels, captions."""
    rows = opened.training
    if config.text is not None and not any(rows.captions or ()):
        raise UserError(f"text={config.text.kind}: the data ({config.data.kind}) has no captions")
    if config.num_classes:
        if rows.class_labels is None:
            raise UserError(
                f"model.num_classes={config.num_classes}: the data ({config.data.kind}) has no classes; set it to 0"
            )
        most = int(rows.class_labels.max())
        if most >= config.num_classes:
            raise UserError(f"model.num_classes={config.num_classes}: the data has {most + 1} classes")


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
