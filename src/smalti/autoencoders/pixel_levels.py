"""Pixels as tokens: each is the nearest of a few evenly spaced values. Nothing is learned, nothing is compressed."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smalti.autoencoders.protocol import check_pictures, check_tokens
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError

_MOST_TOKENS = 65_536


@dataclass(frozen=True)
class PixelLevels:
    """A token a pixel. levels: values that a channel can have, from -1 to 1. channels: 1 (grey) or 3 (RGB)."""

    kind: ClassVar[str] = "pixel_levels"
    levels: int = 16
    channels: int = 1

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"autoencoder.channels={self.channels} must be 1 (grey) or 3 (RGB)")
        most = math.isqrt(_MOST_TOKENS) if self.channels == 1 else 40  # 40^3 = 64,000 colours
        if not 2 <= self.levels <= most:
            raise UserError(
                f"autoencoder.levels={self.levels} must lie in 2 .. {most} for autoencoder.channels={self.channels}: "
                f"a codebook has at most {_MOST_TOKENS} tokens"
            )

    @property
    def codebook_size(self) -> int:
        """Values that a pixel can have."""
        return int(self.levels**self.channels)

    @property
    def psnr(self) -> float:
        """Of pictures whose values are evenly spread over [-1, 1], in dB.

        The error is then evenly spread over half a step s = 2 / (levels - 1) to both sides, its mean square s^2 / 12.
        """
        return 10 * math.log10(12 * (self.levels - 1) ** 2)


@dataclass(frozen=True)
class PixelLevelsTokenizer:
    """The Tokenizer (protocol.py) of a PixelLevels. A colour is a number whose digits, in base levels, are R, G, B."""

    config: PixelLevels

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        return self.config.channels

    @property
    def factor(self) -> int:
        """Pixels a token, along each side: 1."""
        return 1

    @property
    def codebook_size(self) -> int:
        """Values that a pixel can have."""
        return self.config.codebook_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the config."""
        return fingerprint(f"{self.config.kind} {self.config.levels} {self.config.channels}", {})

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, channels, height, width] to tokens [batch, height, width]; values beyond [-1, 1] are cut."""
        check_pictures(pictures, self.in_channels, self.factor)
        top = self.config.levels - 1
        digits = ((pictures.float() + 1) * (top / 2)).round().clamp(0, top).long()
        return (digits * self._places(digits)).sum(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, height, width] to pictures [batch, channels, height, width]."""
        check_tokens(tokens, self.codebook_size)
        digits = tokens[:, None] // self._places(tokens) % self.config.levels
        return digits.float() * (2 / (self.config.levels - 1)) - 1

    def _places(self, like: Tensor) -> Tensor:
        places = [self.config.levels**i for i in reversed(range(self.config.channels))]
        return torch.tensor(places, device=like.device).view(1, -1, 1, 1)
