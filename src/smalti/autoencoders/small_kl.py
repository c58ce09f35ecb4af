"""A small autoencoder with a KL term, for pictures of the user's own: convolutions only, so it takes any size.

Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1, without its
perceptual loss and its discriminator. The convolutions: small_convolutions.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from smalti.autoencoders.network_folder import read_network_folder, write_network_folder
from smalti.autoencoders.protocol import check_pictures
from smalti.autoencoders.small_convolutions import ConvolutionSizes, convolutional_decoder, convolutional_encoder
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError


@dataclass(frozen=True)
class SmallKLConfig(ConvolutionSizes):
    """The size of the network."""

    kind: ClassVar[str] = "small_kl"
    latent_channels: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_channels < 1:
            raise UserError(f"latent_channels={self.latent_channels} must be at least 1")


class SmallKL(nn.Module):
    """The network of a SmallKLConfig; an Autoencoder (protocol.py)."""

    def __init__(self, config: SmallKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = convolutional_encoder(config, 2 * config.latent_channels)
        self.decoder = convolutional_decoder(config, config.latent_channels)

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
    write_network_folder(folder, model.config.kind, asdict(model.config), model)


def load_small_kl(folder: Path) -> SmallKL:
    """Read what save_small_kl wrote, ready to use. Raises UserError for what is missing, damaged or something else."""
    return read_network_folder(folder, SmallKLConfig.kind, lambda sizes: SmallKL(SmallKLConfig(**sizes)))
