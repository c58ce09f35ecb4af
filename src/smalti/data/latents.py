"""Latents as a network sees them: drawn from an encoder's moments, each channel with mean 0 and standard deviation 1.

Moments are what an encoder says of a picture: [..., 2 channels, height, width], means and then log-variances of a
Gaussian for each latent; or, from an encoder that has no variance, [..., channels, height, width], the latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from smalti.errors import UserError

# As diffusers' DiagonalGaussianDistribution clamps what a network may say of a variance.
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor, latent_channels: int) -> tuple[Tensor, Tensor | None]:
    """(mean, log-variance or None), each [batch, latent_channels, height, width], of moments [batch, ...].

    Raises UserError where the moments have neither latent_channels nor twice as many channels.
    """
    channels = moments.shape[-3]
    if channels == latent_channels:
        return moments, None
    if channels != 2 * latent_channels:
        raise UserError(
            f"moments of {channels} channels do not fit latents of {latent_channels}: "
            f"{latent_channels} or {2 * latent_channels} are allowed"
        )
    mean, log_variance = moments.chunk(2, dim=-3)
    return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)


def sample_moments(moments: Tensor, eps: Tensor) -> Tensor:
    """Latents [batch, channels, height, width]: mean + exp(log-variance / 2) eps, or the latents themselves.

    moments: see the module. eps: standard normal noise of the latents' shape, which also says how many channels they
    have. Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4.
    """
    mean, log_variance = split_moments(moments, eps.shape[-3])
    return mean if log_variance is None else mean + torch.exp(0.5 * log_variance) * eps


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, over pictures and positions."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise UserError(f"latent statistics: {len(self.mean)} means and {len(self.std)} standard deviations")
        for channel, std in enumerate(self.std):
            if not std > 0:
                raise UserError(
                    f"latent channel {channel} has a standard deviation of {std}: it must be above 0; "
                    "is it the same in all pictures?"
                )

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.shape[-3] != len(self.mean):
            raise UserError(f"latents of {like.shape[-3]} channels, statistics of {len(self.mean)}: they must agree")
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std, channel by channel; latents [..., channels, height, width]."""
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """normalise() undone: what a network made, as the autoencoder's decoder takes it."""
        mean, std = self._columns(latents)
        return latents * std + mean

    @classmethod
    def of_scaling(cls, latent_channels: int, scaling_factor: float, shift_factor: float | None = None) -> Self:
        """What diffusers' (latents - shift_factor) scaling_factor is in these terms, for networks trained with it."""
        return cls((shift_factor or 0.0,) * latent_channels, (1 / scaling_factor,) * latent_channels)

    def to_json(self) -> dict[str, list[float]]:
        """As plain lists."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, body: Any) -> Self:
        """to_json() undone. Raises UserError for anything else."""
        try:
            return cls(tuple(map(float, body["mean"])), tuple(map(float, body["std"])))
        except (KeyError, TypeError) as error:
            raise UserError(f"latent statistics must be an object with lists mean and std: {error!r}") from None


def measure_latents(moments: Iterable[Tensor], latent_channels: int) -> LatentStatistics:
    """Mean and standard deviation of latents drawn from batches of moments, without drawing any.

    A latent's mean is that of the means, its variance that of the means plus the mean of the variances (the law of
    total variance). Batches are joined in float64 as in Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances", eq. 2.1. Raises UserError for no moments, values that are not finite, and
    a channel that is the same everywhere.
    """
    count, mean = 0, torch.zeros(latent_channels, dtype=torch.float64)
    squares, variances = torch.zeros_like(mean), torch.zeros_like(mean)  # sums
    for batch in moments:
        means, log_variance = split_moments(batch.detach().cpu().double(), latent_channels)
        values = means.movedim(-3, 0).flatten(1)  # [channels, everything else]
        added, batch_mean = values.shape[1], values.mean(1)
        step = batch_mean - mean
        squares += (values - batch_mean[:, None]).square().sum(1) + step.square() * count * added / (count + added)
        mean = mean + step * added / (count + added)
        count += added
        if log_variance is not None:
            variances += log_variance.exp().movedim(-3, 0).flatten(1).sum(1)
    if not count:
        raise UserError("no latents to measure")
    std = ((squares + variances) / count).sqrt()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise UserError("the encoder gave latents that are not finite: its weights may be damaged or of low precision")
    return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()))
