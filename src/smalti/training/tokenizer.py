"""Training a small tokenizer (autoencoders/small_tokenizer.py) on pictures, and watching its codebook."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smalti import rng
from smalti.autoencoders.codebook_usage import CodebookUsage, codebook_usage, token_counts
from smalti.autoencoders.quantizers import VQ, QuantizerConfig, VectorQuantizer
from smalti.autoencoders.small_tokenizer import (
    SmallTokenizer,
    SmallTokenizerConfig,
    new_small_tokenizer,
    save_small_tokenizer,
)
from smalti.data.rows import TrainingRows
from smalti.training.display import TrainingDisplay
from smalti.training.reconstruction import (
    Batch,
    ReconstructionTraining,
    Trained,
    check_rows,
    measured_pictures,
    reconstruction_loss,
    train_to_reconstruct,
)

_WATCHED = 200  # steps whose tokens are counted before a warning
_RESTARTS = 0.75  # of the budget in which dead codes are restarted: the averaged codebook lags behind a restart


@dataclass(frozen=True)
class TokenizerTraining(ReconstructionTraining):
    """Everything that defines a tokenizer's training. To the loss it adds the quantizer's own."""

    model: SmallTokenizerConfig = field(default_factory=SmallTokenizerConfig)


@torch.no_grad()
def reconstruct(model: SmallTokenizer, pictures: Tensor) -> Tensor:
    """Pictures decoded from their tokens, clamped to [-1, 1]."""
    return model.decode(model.encode(pictures)).clamp(-1, 1)


def usage_on(model: SmallTokenizer, rows: TrainingRows) -> CodebookUsage:
    """The codes that up to 512 rows use."""
    device = next(model.parameters()).device
    counts = torch.zeros(model.codebook_size, dtype=torch.int64)
    for pictures in measured_pictures(rows, device):
        counts += token_counts(model.encode(pictures), model.codebook_size)
    return codebook_usage(counts)


def usage_in(trained: Trained[SmallTokenizer]) -> CodebookUsage:
    """The codebook's usage on held-out rows, as a training measured it."""
    measures = trained.measures
    return CodebookUsage(
        trained.model.codebook_size, int(measures["tokens"]), int(measures["used_codes"]), measures["perplexity"]
    )


def collapse_advice(usage: CodebookUsage, quantizer: QuantizerConfig) -> str:
    """One line that says that a codebook has collapsed and what to change."""
    changes = ["--quantizer fsq, which has no codes that can die"] if isinstance(quantizer, VQ) else []
    if isinstance(quantizer, VQ) and not quantizer.restart_below:
        changes.append(f"--restart-below {VQ().restart_below}, which revives dead codes")
    changes += ["a smaller codebook", "a lower --learning-rate", "more steps"]
    return f"the codebook has collapsed: {usage}; try {', '.join(changes[:-1])} or {changes[-1]}"


class _TokenizerTask:
    """The Task (reconstruction.py) of a tokenizer. It counts the tokens of the last steps."""

    def __init__(self, config: TokenizerTraining) -> None:
        self._config = config
        self._size = config.model.quantizer.codebook_size
        self._counts = torch.zeros(self._size, dtype=torch.int64)
        self._warned = False

    def loss(self, network: SmallTokenizer, batch: Batch) -> Tensor:
        config, latents = self._config, network.latents(batch.pictures)
        if isinstance(network.quantizer, VectorQuantizer):
            u = None
            if batch.progress < _RESTARTS:
                u = rng.uniform((self._size,), seed=config.seed, purpose="tokenizer/restart", call=batch.step)[0]
            network.quantizer.learn(latents.detach(), u)
        quantized = network.quantizer(latents)
        self._counts += token_counts(quantized.tokens, self._size)
        loss: Tensor = reconstruction_loss(config, network.decoder(quantized.codes), batch.pictures) + quantized.loss
        return loss

    def reconstruct(self, network: SmallTokenizer, pictures: Tensor) -> Tensor:
        return reconstruct(network, pictures)

    def save(self, network: SmallTokenizer, folder: Path) -> None:
        save_small_tokenizer(network, folder)

    def warning(self, step: int) -> str | None:
        """Once when the codebook collapses, and again if it does after it recovered."""
        if (step + 1) % _WATCHED:
            return None
        usage = codebook_usage(self._counts)
        self._counts.zero_()
        new, self._warned = usage.collapsed and not self._warned, usage.collapsed
        return f"step {step + 1}: {collapse_advice(usage, self._config.model.quantizer)}" if new else None

    def measures(self, network: SmallTokenizer, held_out_rows: TrainingRows) -> dict[str, float]:
        usage = usage_on(network, held_out_rows)
        return {"tokens": usage.num_tokens, "used_codes": usage.used, "perplexity": usage.perplexity}


def train_tokenizer(
    config: TokenizerTraining,
    training_rows: TrainingRows,
    held_out_rows: TrainingRows,
    out: Path,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    display: TrainingDisplay | None = None,
) -> Trained[SmallTokenizer]:
    """Train, and write into the folder `out` what autoencoder=tokenizer reads; see train_to_reconstruct().

    Says so, to the display, where the codebook collapses. Raises UserError for rows that do not fit the network, too.
    """
    check_rows(training_rows, config.model.in_channels, config.model.factor)
    return train_to_reconstruct(
        config,
        new_small_tokenizer(config.model, config.seed),
        _TokenizerTask(config),
        training_rows,
        held_out_rows,
        out,
        overwrite=overwrite,
        device=device,
        display=display,
    )
