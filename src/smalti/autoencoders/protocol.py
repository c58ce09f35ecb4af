"""What every autoencoder can do, whoever wrote it."""

from typing import Protocol

from torch import Tensor

from smalti.errors import UserError


class Autoencoder(Protocol):
    """Pixels to latents and back, both as they are: nothing is scaled (data/latents.py normalises)."""

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        ...

    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, in_channels, height, width] in [-1, 1] to moments of height / factor and width / factor.

        Moments are means and log-variances, [batch, 2 latent_channels, ...], or from an encoder without variance the
        latents, [batch, latent_channels, ...]. Raises UserError for a size that factor does not divide.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [batch, latent_channels, height, width] to pictures, in [-1, 1] but not clamped."""
        ...


def check_pictures(pictures: Tensor, in_channels: int, factor: int) -> None:
    """Raise UserError for pictures that an autoencoder cannot take."""
    channels, height, width = pictures.shape[-3:]
    if channels != in_channels:
        raise UserError(f"pictures of {channels} channels: this autoencoder takes {in_channels}")
    if height % factor or width % factor:
        raise UserError(
            f"pictures of {height} x {width}: this autoencoder takes heights and widths that {factor} divides"
        )
