"""diffusers' autoencoders as ours: AutoencoderKL, AutoencoderDC, AutoencoderTiny, VQModel, by name or folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.autoencoders.network_folder import config_value
from smalti.autoencoders.protocol import check_pictures, check_tokens
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError


@dataclass(frozen=True)
class KLAutoencoder:
    """AutoencoderKL: Stable Diffusion's, SDXL's, SD3's, FLUX's. path: a folder, or a name on the hub."""

    kind: ClassVar[str] = "kl"
    class_name: ClassVar[str] = "AutoencoderKL"
    path: str = "stabilityai/sd-vae-ft-mse"
    subfolder: str | None = None


@dataclass(frozen=True)
class DCAutoencoder:
    """AutoencoderDC: the deep-compression autoencoder of Sana, 32 pixels a latent."""

    kind: ClassVar[str] = "dc"
    class_name: ClassVar[str] = "AutoencoderDC"
    path: str = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
    subfolder: str | None = None


@dataclass(frozen=True)
class TinyAutoencoder:
    """AutoencoderTiny: TAESD, an approximation of Stable Diffusion's that is fast."""

    kind: ClassVar[str] = "tiny"
    class_name: ClassVar[str] = "AutoencoderTiny"
    path: str = "madebyollin/taesd"
    subfolder: str | None = None


@dataclass(frozen=True)
class VQAutoencoder:
    """VQModel, used with the latents before they are quantised; its decoder quantises them."""

    kind: ClassVar[str] = "vq"
    class_name: ClassVar[str] = "VQModel"
    path: str = "amused/amused-256"
    subfolder: str | None = "vqvae"


@dataclass(frozen=True)
class VQTokens:
    """VQModel as a tokenizer. codebook_size: its num_vq_embeddings.

    unit_range: its pictures lie in [0, 1], as aMUSEd's do; False: in [-1, 1], as those of latent diffusion do. Its
    config.json does not say which.
    """

    kind: ClassVar[str] = "vq_tokens"
    path: str = "amused/amused-256"
    subfolder: str | None = "vqvae"
    codebook_size: int = 8192
    unit_range: bool = True


DiffusersConfig = KLAutoencoder | DCAutoencoder | TinyAutoencoder | VQAutoencoder


@dataclass(frozen=True)
class DiffusersAutoencoder:
    """One of diffusers' networks behind our protocol (protocol.py). network: in float32, not trained here."""

    class_name: str
    network: nn.Module

    @property
    def _config(self) -> Any:
        return self.network.config

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        return int(self._config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        if self.class_name == "VQModel" and self._config.vq_embed_dim is not None:
            return int(self._config.vq_embed_dim)
        return int(self._config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side: each level but one halves the picture."""
        levels = {
            "AutoencoderKL": "block_out_channels",
            "VQModel": "block_out_channels",
            "AutoencoderDC": "encoder_block_out_channels",
            "AutoencoderTiny": "encoder_block_out_channels",
        }
        return 1 << (len(self._config[levels[self.class_name]]) - 1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self.class_name, self.network.state_dict())

    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to moments; AutoencoderKL alone has variances. See protocol.py."""
        check_pictures(pictures, self.in_channels, self.factor)
        encoded = self.network.encode(pictures)  # type: ignore[operator]
        moments: Tensor
        if self.class_name == "AutoencoderKL":
            moments = encoded.latent_dist.parameters
        elif self.class_name == "AutoencoderDC":
            moments = encoded.latent
        else:
            moments = encoded.latents
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as encoded to pictures, in [-1, 1] but not clamped; VQModel quantises the latents first."""
        pictures: Tensor = self.network.decode(latents).sample  # type: ignore[operator]
        return pictures


@dataclass(frozen=True)
class DiffusersTokenizer:
    """A VQModel behind our Tokenizer protocol (protocol.py). unit_range: as VQTokens has it."""

    autoencoder: DiffusersAutoencoder
    unit_range: bool

    @property
    def in_channels(self) -> int:
        """Channels of a picture."""
        return self.autoencoder.in_channels

    @property
    def factor(self) -> int:
        """Pixels a token, along each side."""
        return self.autoencoder.factor

    @property
    def codebook_size(self) -> int:
        """Rows of the codebook."""
        return int(self._network.config.num_vq_embeddings)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, and of the pictures' range."""
        return fingerprint(f"VQModel unit_range={self.unit_range}", self._network.state_dict())

    @property
    def _network(self) -> Any:
        return self.autoencoder.network

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to the indices of the codebook's rows that are nearest to their latents."""
        latents = self.autoencoder.encode_moments((pictures + 1) / 2 if self.unit_range else pictures)
        _, _, (_, _, indices) = self._network.quantize(latents)
        tokens: Tensor = indices.view(len(latents), *latents.shape[-2:])
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Indices of the codebook to pictures, in [-1, 1] but not clamped."""
        check_tokens(tokens, self.codebook_size)
        network = self._network
        # The network's decode() would look indices up only where its config says lookup_from_codebook.
        rows = network.quantize.get_codebook_entry(tokens, (*tokens.shape, self.autoencoder.latent_channels))
        pictures: Tensor = network.decoder(
            network.post_quant_conv(rows), rows if network.config.norm_type == "spatial" else None
        )
        return pictures * 2 - 1 if self.unit_range else pictures


def load_tokens_from_diffusers(config: VQTokens, device: torch.device | str = "cpu") -> DiffusersTokenizer:
    """A VQModel as a tokenizer. Errors as load_from_diffusers'."""
    return DiffusersTokenizer(
        load_from_diffusers(VQAutoencoder(config.path, config.subfolder), device), config.unit_range
    )


def load_from_diffusers(config: DiffusersConfig, device: torch.device | str = "cpu") -> DiffusersAutoencoder:
    """Load from a local folder or the hub, as diffusers does. Raises UserError, which says what to do offline."""
    import diffusers

    folder = Path(config.path)
    if folder.is_dir():
        _check_folder(config, folder / (config.subfolder or ""))
    cls = getattr(diffusers, config.class_name)
    try:
        network, info = cls.from_pretrained(
            config.path, subfolder=config.subfolder, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of the hub's client, diffusers and safetensors, each with its own kinds
        if folder.is_dir():
            raise UserError(f"{folder} is damaged or does not fit its config.json: {_first_line(error)}") from None
        raise UserError(
            f"autoencoder.path={config.path!r} is no folder here and cannot be had from the hub "
            f"({_first_line(error)}): offline, give a folder as diffusers' save_pretrained writes it "
            f"(config.json, diffusion_pytorch_model.safetensors)"
        ) from None
    if missing := list(info["missing_keys"]):
        raise UserError(
            f"{config.path} does not fit its config.json: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{config.path} is damaged: {name} holds values that are not finite")
    return DiffusersAutoencoder(config.class_name, network.to(device).eval().requires_grad_(False))


def _check_folder(config: DiffusersConfig, folder: Path) -> None:
    """Raise UserError for a folder that holds another class, or whose subfolder does."""
    body = read_class(folder)
    if body is None:
        inside = sorted(path.parent.name for path in folder.glob("*/config.json") if read_class(path.parent))
        hint = f"; autoencoder.subfolder may be meant: {', '.join(inside)}" if inside else ""
        raise UserError(f"{folder / 'config.json'} is missing or names no class: {folder} is no autoencoder{hint}")
    if body != config.class_name:
        raise UserError(f"{folder} holds an {body}: autoencoder={config.kind} reads an {config.class_name}")


def read_class(folder: Path) -> str | None:
    """The class that a folder of diffusers' names in its config.json; None where there is none."""
    name = config_value(folder, "_class_name")
    return None if name is None else str(name)


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.split(". If you want to instead")[0]  # advice for diffusers' callers
