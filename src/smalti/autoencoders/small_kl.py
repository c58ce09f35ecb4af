"""A small autoencoder with a KL term, for pictures of the user's own: convolutions only, so it takes any size.

    encoder   pixels -> unshuffle 2 -> conv -> blocks -> (unshuffle 2 -> conv -> blocks) ... -> norm, conv -> moments
    decoder   the same backwards, with shuffles

Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1 and appendix
G, without its attention, its perceptual loss and its discriminator. Shuffles in place of strided convolutions keep
the wide maps small, which is what a CPU spends its time on.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.autoencoders.protocol import check_pictures
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FACTORS = (2, 4, 8, 16)


@dataclass(frozen=True)
class SmallKLConfig:
    """The size of the network. width: channels at half the pictures' size; twice as many at every smaller one."""

    kind: ClassVar[str] = "small_kl"
    in_channels: int = 3
    latent_channels: int = 4
    factor: int = 4
    width: int = 48
    encoder_blocks: int = 1  # a level
    decoder_blocks: int = 2

    def __post_init__(self) -> None:
        if self.factor not in _FACTORS:
            raise UserError(f"factor={self.factor} must be one of {', '.join(map(str, _FACTORS))}")
        if self.width < 8 or self.width % 8:
            raise UserError(f"width={self.width} must be a multiple of 8")
        for name in ("in_channels", "latent_channels", "encoder_blocks", "decoder_blocks"):
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


def _encoder(config: SmallKLConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = config.in_channels
    for width in config.widths:
        layers += [nn.PixelUnshuffle(2), _conv(4 * channels, width)]
        layers += [_Block(width) for _ in range(config.encoder_blocks)]
        channels = width
    return nn.Sequential(*layers, *_output(channels, 2 * config.latent_channels))


def _decoder(config: SmallKLConfig) -> nn.Sequential:
    *larger, smallest = config.widths
    layers: list[nn.Module] = [_conv(config.latent_channels, smallest)]
    layers += [_Block(smallest) for _ in range(config.decoder_blocks)]
    channels = smallest
    for width in reversed(larger):
        layers += [_conv(channels, 4 * width), nn.PixelShuffle(2)]
        layers += [_Block(width) for _ in range(config.decoder_blocks)]
        channels = width
    return nn.Sequential(*layers, *_output(channels, 4 * config.in_channels), nn.PixelShuffle(2))


class SmallKL(nn.Module):
    """The network of a SmallKLConfig; an Autoencoder (protocol.py)."""

    def __init__(self, config: SmallKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        return self.config.in_channels

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return self.config.factor

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self.config.kind, self.state_dict())

    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to moments [batch, 2 latent_channels, height / factor, width / factor]."""
        check_pictures(pictures, self.in_channels, self.factor)
        moments: Tensor = self.encoder(pictures)
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [batch, latent_channels, height, width] to pictures, in [-1, 1] but not clamped."""
        pictures: Tensor = self.decoder(latents)
        return pictures


def new_small_kl(config: SmallKLConfig, seed: int = 0) -> SmallKL:
    """A network with weights that are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallKL(config)


def save_small_kl(model: SmallKL, folder: Path) -> None:
    """Write config.json and model.safetensors. Raises UserError where the folder cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    body = {"kind": model.config.kind, **asdict(model.config), "sha256": model.fingerprint}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(body, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from None


def load_small_kl(folder: Path) -> SmallKL:
    """Read what save_small_kl wrote, ready to use. Raises UserError for what is missing, damaged or something else."""
    try:
        body = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder / WEIGHTS} is missing: {folder} is no small_kl autoencoder"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    kind, checksum = (body.pop(name, None) if isinstance(body, dict) else None for name in ("kind", "sha256"))
    if kind != SmallKLConfig.kind:
        raise UserError(f"{folder / CONFIG} is not of a small_kl autoencoder: its kind is {kind!r}")
    try:
        model = SmallKL(SmallKLConfig(**body))
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    if model.fingerprint != checksum:
        raise UserError(f"{folder / WEIGHTS} is damaged: its checksum does not match the one in {CONFIG}")
    return model.eval().requires_grad_(False)
