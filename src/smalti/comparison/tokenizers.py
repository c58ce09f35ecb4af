"""Tokenizers of contenders that predict learned tokens: trained within the comparison's time, before the contenders."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from smalti.autoencoders.quantizers import VQ
from smalti.autoencoders.registry import LearnedTokenizer
from smalti.autoencoders.small_tokenizer import SmallTokenizerConfig, read_codebook_size
from smalti.config import Budget, RunConfig
from smalti.data.digits import load_digits
from smalti.errors import UserError
from smalti.training.display import SilentDisplay
from smalti.training.tokenizer import TokenizerTraining, train_tokenizer, usage_in

_WIDTH, _BATCH_SIZE = 32, 32
_FACTOR = 4  # pixels a token: the digits' 28 pixels to 7 tokens


class _TokenizerProgress(SilentDisplay):
    def __init__(self, say: Callable[[float], None]) -> None:
        self._say = say

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        self._say(progress)


def needs_tokenizer(config: RunConfig) -> bool:
    """Whether a run reads learned tokens."""
    return isinstance(config.autoencoder, LearnedTokenizer)


def with_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """The config with its tokenizer in a folder of the comparison's."""
    assert isinstance(config.autoencoder, LearnedTokenizer)
    return replace(config, autoencoder=replace(config.autoencoder, path=str(folder)))


def train_contenders_tokenizer(
    config: RunConfig, folder: Path, minutes: float, say: Callable[[float], None]
) -> dict[str, Any]:
    """Train the tokenizer that a run's config asks for on the bundled digits; say(share done) is called along.

    Gives what is reported: seconds, PSNR, codes used. Raises UserError for a grid that the tokenizer does not make, and
    KeyboardInterrupt where it was stopped.
    """
    assert isinstance(config.autoencoder, LearnedTokenizer)
    training, held_out = load_digits()
    height, width = training.shape[1:]
    grid = height // _FACTOR, width // _FACTOR
    if tuple(config.model.image_size) != grid:
        raise UserError(f"model.image_size={config.model.image_size}: a comparison's tokenizers make grids of {grid}")
    quantizer = VQ(codebook_size=config.autoencoder.codebook_size)
    model = SmallTokenizerConfig(in_channels=1, factor=_FACTOR, width=_WIDTH, quantizer=quantizer)
    budget = Budget("minutes", minutes)
    plan = TokenizerTraining(model=model, budget=budget, seed=config.seed, batch_size=_BATCH_SIZE)
    began = time.perf_counter()
    display = _TokenizerProgress(say)
    trained = train_tokenizer(plan, training, held_out, folder, overwrite=_is_ours(folder), display=display)
    if trained.outcome == "interrupted":
        raise KeyboardInterrupt
    usage = usage_in(trained)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": trained.steps,
        "psnr": round(trained.psnr_after, 2),
        "codes_used": usage.used,
        "perplexity": round(usage.perplexity, 1),
    }


def _is_ours(folder: Path) -> bool:
    """Whether an earlier session, which was stopped later on, has left a tokenizer in the folder."""
    try:
        read_codebook_size(folder)
    except UserError:
        return False
    return True
