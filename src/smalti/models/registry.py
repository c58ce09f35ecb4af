"""Architectures by name: build one from its config, count its parameters and operations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from smalti.errors import unknown_name
from smalti.models import amused, dit, flux, ltx, mmdit, pixart, sana, unet, uvit, video_dit, zimage
from smalti.models.amused import Amused, AmusedConfig
from smalti.models.dit import DiT, DiTConfig
from smalti.models.flux import Flux, FluxConfig
from smalti.models.ltx import LTX, LTXConfig
from smalti.models.mmdit import MMDiT, MMDiTConfig
from smalti.models.pixart import PixArt, PixArtConfig
from smalti.models.sana import Sana, SanaConfig
from smalti.models.token_network import TokenNetwork, classifier_flops
from smalti.models.unet import UNet, UNetConfig
from smalti.models.uvit import UViT, UViTConfig
from smalti.models.video_dit import VideoDiT, VideoDiTConfig
from smalti.models.zimage import ZImage, ZImageConfig

# The union of all config_types below; those that recipes train (image_size, in_channels), told a label or a text.
ModelConfig = (
    DiTConfig
    | UViTConfig
    | UNetConfig
    | MMDiTConfig
    | FluxConfig
    | ZImageConfig
    | PixArtConfig
    | SanaConfig
    | VideoDiTConfig
    | LTXConfig
    | AmusedConfig
    | ZImageConfig
)
LabelledModelConfig = DiTConfig | UViTConfig | UNetConfig
TextModelConfig = MMDiTConfig | PixArtConfig | SanaConfig
TrainableModelConfig = LabelledModelConfig | TextModelConfig


@dataclass(frozen=True)
class Architecture:
    """One network: its config's class, its module's, its sizes by the papers' names and its operations.

    forward_flops(config, input_size=None, text_tokens=0): of one forward at batch 1, matrix products and convolutions
    only. input_size: (height, width), videos (frames, height, width); None takes the config's own size.
    """

    config_type: type
    network: Callable[[Any], nn.Module]
    presets: Callable[[], dict[str, Any]]
    forward_flops: Callable[..., int]


_ARCHITECTURES = (
    Architecture(DiTConfig, DiT, dit.dit_presets, dit.forward_flops),
    Architecture(UViTConfig, UViT, uvit.uvit_presets, uvit.forward_flops),
    Architecture(UNetConfig, UNet, unet.unet_presets, unet.forward_flops),
    Architecture(MMDiTConfig, MMDiT, mmdit.mmdit_presets, mmdit.forward_flops),
    Architecture(FluxConfig, Flux, flux.flux_presets, flux.forward_flops),
    Architecture(ZImageConfig, ZImage, zimage.zimage_presets, zimage.forward_flops),
    Architecture(PixArtConfig, PixArt, pixart.pixart_presets, pixart.forward_flops),
    Architecture(SanaConfig, Sana, sana.sana_presets, sana.forward_flops),
    Architecture(VideoDiTConfig, VideoDiT, video_dit.video_dit_presets, video_dit.forward_flops),
    Architecture(LTXConfig, LTX, ltx.ltx_presets, ltx.forward_flops),
    Architecture(AmusedConfig, Amused, amused.amused_presets, amused.forward_flops),
)


def _architecture_of(config: ModelConfig) -> Architecture:
    return next(a for a in _ARCHITECTURES if isinstance(config, a.config_type))


def _presets() -> dict[str, ModelConfig]:
    return {name: config for a in _ARCHITECTURES for name, config in a.presets().items()}


def preset_names() -> list[str]:
    """The papers' names that preset() takes."""
    return sorted(_presets())


def preset(name: str) -> ModelConfig:
    """A config by its paper's name, such as "DiT-XL/2". Raises UserError with the nearest names."""
    presets = _presets()
    if name not in presets:
        raise unknown_name("model preset", name, presets)
    return presets[name]


def network_of(config: ModelConfig, codebook_size: int | None = None) -> nn.Module:
    """The network of a config with PyTorch's default weights, for those who load others into it.

    codebook_size: of the tokens that it reads and predicts (models/token_network.py); None: it reads no tokens.
    """
    network = _architecture_of(config).network(config)
    return network if codebook_size is None else TokenNetwork(network, codebook_size)


def build_model(config: ModelConfig, seed: int = 0, codebook_size: int | None = None) -> nn.Module:
    """network_of() with its published initialisation, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation must not move the caller's generator
        model = network_of(config, codebook_size)
    cast(Any, model).initialise(torch.Generator().manual_seed(seed))
    return model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by top-level part, in the order of the module's definition."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def forward_flops(
    config: ModelConfig,
    input_size: tuple[int, ...] | None = None,
    text_tokens: int = 0,
    codebook_size: int | None = None,
) -> int:
    """Floating-point operations of one forward at batch 1, matrix products and convolutions only (Architecture)."""
    flops = _architecture_of(config).forward_flops(config, input_size, text_tokens)
    if codebook_size is None:
        return flops
    assert isinstance(config, TrainableModelConfig)
    return flops + classifier_flops(config.in_channels, codebook_size, math.prod(input_size or config.image_size))
