"""Which autoencoder or tokenizer a run has, as config, and loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from smalti.autoencoders.from_diffusers import (
    DCAutoencoder,
    DiffusersConfig,
    KLAutoencoder,
    TinyAutoencoder,
    VQAutoencoder,
    VQTokens,
    load_from_diffusers,
    load_tokens_from_diffusers,
    read_class,
)
from smalti.autoencoders.network_folder import CONFIG, config_value
from smalti.autoencoders.pixel_levels import PixelLevels, PixelLevelsTokenizer
from smalti.autoencoders.protocol import Autoencoder, Tokenizer
from smalti.autoencoders.small_kl import SmallKLConfig, load_small_kl
from smalti.autoencoders.small_tokenizer import SmallTokenizerConfig, load_small_tokenizer, read_codebook_size
from smalti.errors import UserError, unknown_name


@dataclass(frozen=True)
class Pixels:
    """None: the network denoises pixels."""

    kind: ClassVar[str] = "pixels"


@dataclass(frozen=True)
class SmallKLAutoencoder:
    """One that `smalti train-autoencoder` made. path: its folder."""

    kind: ClassVar[str] = "small_kl"
    path: str = "runs/autoencoder"


@dataclass(frozen=True)
class LearnedTokenizer:
    """One that `smalti train-tokenizer` made. path: its folder. codebook_size: its number of tokens."""

    kind: ClassVar[str] = "tokenizer"
    path: str = "runs/tokenizer"
    codebook_size: int = 256


TokenizerConfig = PixelLevels | LearnedTokenizer | VQTokens
AutoencoderConfig = (
    Pixels | KLAutoencoder | DCAutoencoder | TinyAutoencoder | VQAutoencoder | SmallKLAutoencoder | TokenizerConfig
)

_DIFFUSERS: tuple[type[DiffusersConfig], ...] = (KLAutoencoder, DCAutoencoder, TinyAutoencoder, VQAutoencoder)
_KINDS: tuple[type[AutoencoderConfig], ...] = (
    Pixels, SmallKLAutoencoder, *_DIFFUSERS, PixelLevels, LearnedTokenizer, VQTokens,
)  # fmt: skip


def load_autoencoder(config: AutoencoderConfig, device: torch.device | str = "cpu") -> Autoencoder | None:
    """The autoencoder of a config, in float32, its weights frozen; None for pixels.

    Raises UserError for what is missing, damaged or of another kind, for names that are not to be had offline, and for
    a tokenizer, which makes no latents.
    """
    if isinstance(config, Pixels):
        return None
    if isinstance(config, TokenizerConfig):
        raise UserError(
            f"autoencoder={config.kind} makes tokens, not latents: it is for networks that predict masked tokens"
        )
    if isinstance(config, SmallKLAutoencoder):
        return load_small_kl(Path(config.path)).to(device)
    return load_from_diffusers(config, device)


def load_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer of a config, its weights frozen.

    Raises UserError as load_autoencoder does, and where the codebook has another size than the config says.
    """
    if isinstance(config, PixelLevels):
        return PixelLevelsTokenizer(config)
    tokenizer: Tokenizer
    if isinstance(config, LearnedTokenizer):
        tokenizer = load_small_tokenizer(Path(config.path)).to(device)
    else:
        tokenizer = load_tokens_from_diffusers(config, device)
    if tokenizer.codebook_size != config.codebook_size:
        raise UserError(
            f"autoencoder.codebook_size={config.codebook_size}: the tokenizer at {config.path} has "
            f"{tokenizer.codebook_size}; set it to that"
        )
    return tokenizer


def autoencoder_of(path: str, subfolder: str | None = None) -> AutoencoderConfig:
    """The config that fits a folder, by what its config.json says; "pixels", or a kind's name, is that kind's default.

    A pipeline's folder means its autoencoder. A name that is no folder here is taken for an AutoencoderKL on the hub.
    Raises UserError for a folder that holds none.
    """
    defaults: dict[str, AutoencoderConfig] = {cls.kind: cls() for cls in _KINDS}
    if path in defaults and not Path(path).exists():
        return defaults[path]
    folder = Path(path) / (subfolder or "")
    if not Path(path).is_dir():
        if "/" not in path:
            raise unknown_name("autoencoder", path, defaults)
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"there is no autoencoder at {path}: give a folder, a name on the hub (owner/name) or one of "
                f"{', '.join(defaults)}"
            )
        return KLAutoencoder(path, subfolder)
    name = read_class(folder)
    for cls in _DIFFUSERS:
        if name == cls.class_name:
            return cls(path, subfolder)
    if name is None and (folder / CONFIG).is_file():
        if config_value(folder, "kind") == SmallTokenizerConfig.kind:
            return LearnedTokenizer(str(folder), read_codebook_size(folder))
        return SmallKLAutoencoder(str(folder))  # its reader says what is wrong, if anything is
    if subfolder is None:
        for inner in ("vae", "vqvae"):
            if (folder / inner).is_dir():
                return autoencoder_of(path, inner)
    held = f"a {name}" if name else "no config.json"
    known = ", ".join([*(cls.class_name for cls in _DIFFUSERS), SmallKLConfig.kind, SmallTokenizerConfig.kind])
    raise UserError(f"{folder} holds {held}: an autoencoder is one of {known}")
