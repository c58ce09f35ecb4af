"""An autoencoder for pipelines on pixels: it changes nothing."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """What DiTPipeline asks of an autoencoder, and no more."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def decode(self, z):
        """z as it is."""
        return DecoderOutput(sample=z)
