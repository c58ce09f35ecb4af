"""A small tokenizer for pictures of the user's own: convolutions, a quantizer, convolutions.

Source: van den Oord et al. 2017, "Neural discrete representation learning" (VQ-VAE). The convolutions:
small_convolutions.py; the quantizers: quantizers.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.autoencoders.network_folder import read_network_folder, read_network_sizes, write_network_folder
from smalti.autoencoders.protocol import check_pictures, check_tokens
from smalti.autoencoders.quantizers import FSQ, VQ, QuantizerConfig, make_quantizer
from smalti.autoencoders.small_convolutions import ConvolutionSizes, convolutional_decoder, convolutional_encoder
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError


@dataclass(frozen=True)
class SmallTokenizerConfig(ConvolutionSizes):
    """The size of the network, and its quantizer."""

    kind: ClassVar[str] = "tokenizer"
    quantizer: QuantizerConfig = field(default_factory=VQ)


class SmallTokenizer(nn.Module):
    """The network of a SmallTokenizerConfig; a Tokenizer (protocol.py)."""

    def __init__(self, config: SmallTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = convolutional_encoder(config, config.quantizer.code_width)
        self.quantizer = make_quantizer(config.quantizer)
        self.decoder = convolutional_decoder(config, config.quantizer.code_width)

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        return self.config.in_channels

    @property
    def factor(self) -> int:
        """Pixels a token, along each side."""
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        """Codes that there are."""
        return self.config.quantizer.codebook_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the quantizer's config and the weights."""
        return fingerprint(f"{self.config.kind} {self.config.quantizer}", self.state_dict())

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to what is quantized: [batch, code_width, height / factor, width / factor]."""
        check_pictures(pictures, self.in_channels, self.factor)
        latents: Tensor = self.encoder(pictures)
        return latents

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to tokens int64 [batch, height / factor, width / factor]."""
        return self.quantizer.tokens_of(self.latents(pictures))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, height, width] to pictures, in [-1, 1] but not clamped."""
        check_tokens(tokens, self.codebook_size)
        pictures: Tensor = self.decoder(self.quantizer.codes_of(tokens))
        return pictures


def new_small_tokenizer(config: SmallTokenizerConfig, seed: int = 0) -> SmallTokenizer:
    """A network with weights that are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallTokenizer(config)


def save_small_tokenizer(model: SmallTokenizer, folder: Path) -> None:
    """Write config.json and model.safetensors. Raises UserError where the folder cannot be written."""
    quantizer = model.config.quantizer
    sizes = {**asdict(model.config), "quantizer": {"kind": quantizer.kind, **asdict(quantizer)}}
    write_network_folder(folder, model.config.kind, sizes, model)


def load_small_tokenizer(folder: Path) -> SmallTokenizer:
    """Read what save_small_tokenizer wrote. Raises UserError for what is missing, damaged or something else."""
    return read_network_folder(folder, SmallTokenizerConfig.kind, lambda sizes: SmallTokenizer(_config(sizes)))


def read_codebook_size(folder: Path) -> int:
    """The codebook's size of a tokenizer's folder, by its config.json alone. Raises UserError as loading does."""
    sizes = read_network_sizes(folder, SmallTokenizerConfig.kind)
    sizes.pop("sha256", None)
    try:
        return _config(sizes).quantizer.codebook_size
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None


def _config(sizes: Mapping[str, Any]) -> SmallTokenizerConfig:
    body = dict(sizes["quantizer"])
    quantizers: dict[str, type[VQ] | type[FSQ]] = {cls.kind: cls for cls in (VQ, FSQ)}
    cls = quantizers[body.pop("kind")]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
    return SmallTokenizerConfig(**{**sizes, "quantizer": cls(**fields)})
