"""The convolutional encoder and decoder that our small autoencoders share; they take pictures of any size.

    encoder   pixels -> unshuffle 2 -> conv -> blocks -> (unshuffle 2 -> conv -> blocks) ... -> norm, conv -> outputs
    decoder   the same backwards, with shuffles

Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", appendix G, without its
attention. Shuffles in place of strided convolutions keep the wide maps small, which is what a CPU spends its time on.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError

_FACTORS = (2, 4, 8, 16)


@dataclass(frozen=True)
class ConvolutionSizes:
    """The size of encoder and decoder. width: channels at half the pictures' size; twice as many at every smaller one.

    factor: pixels a latent, along each side.
    """

    in_channels: int = 3
    factor: int = 4
    width: int = 48
    encoder_blocks: int = 1  # a level
    decoder_blocks: int = 2

    def __post_init__(self) -> None:
        if self.factor not in _FACTORS:
            raise UserError(f"factor={self.factor} must be one of {', '.join(map(str, _FACTORS))}")
        if self.width < 8 or self.width % 8:
            raise UserError(f"width={self.width} must be a multiple of 8")
        for name in ("in_channels", "encoder_blocks", "decoder_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the largest pictures first."""
        levels = self.factor.bit_length() - 1
        return (self.width, *[2 * self.width] * (levels - 1))


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution begun at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), _conv(channels, channels)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), _conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same shape."""
        inner = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(inner)))
        return out


def _output(channels: int, channels_out: int) -> list[nn.Module]:
    return [nn.GroupNorm(8, channels), nn.SiLU(), _conv(channels, channels_out)]


def convolutional_encoder(sizes: ConvolutionSizes, channels_out: int) -> nn.Sequential:
    """Pictures [batch, in_channels, height, width] to [batch, channels_out, height / factor, width / factor]."""
    layers: list[nn.Module] = []
    channels = sizes.in_channels
    for width in sizes.widths:
        layers += [nn.PixelUnshuffle(2), _conv(4 * channels, width)]
        layers += [_Block(width) for _ in range(sizes.encoder_blocks)]
        channels = width
    return nn.Sequential(*layers, *_output(channels, channels_out))


def convolutional_decoder(sizes: ConvolutionSizes, channels_in: int) -> nn.Sequential:
    """[batch, channels_in, height, width] to pictures [batch, in_channels, height factor, width factor]."""
    *larger, smallest = sizes.widths
    layers: list[nn.Module] = [_conv(channels_in, smallest)]
    layers += [_Block(smallest) for _ in range(sizes.decoder_blocks)]
    channels = smallest
    for width in reversed(larger):
        layers += [_conv(channels, 4 * width), nn.PixelShuffle(2)]
        layers += [_Block(width) for _ in range(sizes.decoder_blocks)]
        channels = width
    return nn.Sequential(*layers, *_output(channels, 4 * sizes.in_channels), nn.PixelShuffle(2))
