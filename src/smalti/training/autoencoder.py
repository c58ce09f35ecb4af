"""Training a small KL autoencoder (autoencoders/small_kl.py) on pictures: reconstruction, edges, a little KL."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smalti import rng
from smalti.autoencoders.small_kl import SmallKL, SmallKLConfig, new_small_kl, save_small_kl
from smalti.data.latents import sample_moments, split_moments
from smalti.data.rows import TrainingRows
from smalti.errors import UserError
from smalti.training.display import TrainingDisplay
from smalti.training.reconstruction import (
    Batch,
    ReconstructionTraining,
    Trained,
    check_rows,
    reconstruction_loss,
    train_to_reconstruct,
)


@dataclass(frozen=True)
class AutoencoderTraining(ReconstructionTraining):
    """Everything that defines an autoencoder's training.

    To the loss it adds kl_weight times the mean KL divergence of a latent.
    """

    model: SmallKLConfig = field(default_factory=SmallKLConfig)
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise UserError(f"kl_weight={self.kl_weight} must not be negative")


def kl_divergence(moments: Tensor, latent_channels: int) -> Tensor:
    """Of N(mean, variance) from N(0, 1), the mean over latents. Source: Kingma and Welling 2014, appendix B."""
    mean, log_variance = split_moments(moments, latent_channels)
    assert log_variance is not None
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


@torch.no_grad()
def reconstruct(model: SmallKL, pictures: Tensor) -> Tensor:
    """Pictures decoded from the means of their latents, clamped to [-1, 1]."""
    mean, _ = split_moments(model.encode_moments(pictures), model.latent_channels)
    return model.decode(mean).clamp(-1, 1)


@dataclass(frozen=True)
class _AutoencoderTask:
    """The Task (reconstruction.py) of an autoencoder."""

    config: AutoencoderTraining

    def loss(self, network: SmallKL, batch: Batch) -> Tensor:
        config, pictures = self.config, batch.pictures
        moments = network.encode_moments(pictures)
        shape, slots = (network.latent_channels, *moments.shape[-2:]), torch.arange(len(pictures))
        eps = rng.normal(shape, seed=config.seed, purpose="autoencoder/noise", index=slots, call=batch.step)
        reconstructions = network.decode(sample_moments(moments, eps.to(pictures.device)))
        loss = reconstruction_loss(config, reconstructions, pictures)
        return loss + config.kl_weight * kl_divergence(moments, network.latent_channels)

    def reconstruct(self, network: SmallKL, pictures: Tensor) -> Tensor:
        return reconstruct(network, pictures)

    def save(self, network: SmallKL, folder: Path) -> None:
        save_small_kl(network, folder)

    def warning(self, step: int) -> str | None:
        return None

    def measures(self, network: SmallKL, held_out_rows: TrainingRows) -> dict[str, float]:
        return {}


def train_autoencoder(
    config: AutoencoderTraining,
    training_rows: TrainingRows,
    held_out_rows: TrainingRows,
    out: Path,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    display: TrainingDisplay | None = None,
) -> Trained[SmallKL]:
    """Train, and write into the folder `out` what autoencoder=small_kl reads; see train_to_reconstruct().

    Raises UserError for rows that do not fit the network, too.
    """
    check_rows(training_rows, config.model.in_channels, config.model.factor)
    return train_to_reconstruct(
        config,
        new_small_kl(config.model, config.seed),
        _AutoencoderTask(config),
        training_rows,
        held_out_rows,
        out,
        overwrite=overwrite,
        device=device,
        display=display,
    )
