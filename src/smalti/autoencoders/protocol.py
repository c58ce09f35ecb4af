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


class Tokenizer(Protocol):
    """Pixels to tokens, indices into a codebook, and back."""

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        ...

    @property
    def factor(self) -> int:
        """Pixels a token, along each side."""
        ...

    @property
    def codebook_size(self) -> int:
        """Tokens that there are: 0 .. codebook_size - 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the tokens of a picture depend on."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, in_channels, height, width] in [-1, 1] to int64 [batch, height / factor, width / factor].

        Raises UserError for a size that factor does not divide.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [batch, height, width] to float32 pictures, in [-1, 1] but not clamped.

        Raises UserError for a token outside the codebook, such as one that is still masked.
        """
        ...


def check_tokens(tokens: Tensor, codebook_size: int) -> None:
    """Raise UserError for tokens that a codebook does not have."""
    if not tokens.numel():
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= codebook_size:
        raise UserError(
            f"tokens of {low} .. {high}: this tokenizer decodes 0 .. {codebook_size - 1} (is one still masked?)"
        )


def check_pictures(pictures: Tensor, in_channels: int, factor: int) -> None:
    """Raise UserError for pictures that an autoencoder cannot take."""
    channels, height, width = pictures.shape[-3:]
    if channels != in_channels:
        raise UserError(f"pictures of {channels} channels: this autoencoder takes {in_channels}")
    if height % factor or width % factor:
        raise UserError(
            f"pictures of {height} x {width}: this autoencoder takes heights and widths that {factor} divides"
        )
