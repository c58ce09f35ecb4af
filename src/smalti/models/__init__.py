"""Networks, one file an architecture, and the registry that builds them by name."""

from smalti.models.amused import Amused, AmusedConfig
from smalti.models.dit import DiT, DiTConfig
from smalti.models.features import feature_names, forward_with_features
from smalti.models.flux import Flux, FluxConfig
from smalti.models.ltx import LTX, LTXConfig
from smalti.models.mmdit import MMDiT, MMDiTConfig
from smalti.models.pixart import PixArt, PixArtConfig
from smalti.models.registry import (
    ModelConfig,
    build_model,
    count_parameters,
    forward_flops,
    network_of,
    preset,
    preset_names,
)
from smalti.models.sana import Sana, SanaConfig
from smalti.models.unet import UNet, UNetConfig
from smalti.models.uvit import UViT, UViTConfig
from smalti.models.video_dit import VideoDiT, VideoDiTConfig
from smalti.models.zimage import ZImage, ZImageConfig

__all__ = [
    "LTX",
    "Amused",
    "AmusedConfig",
    "DiT",
    "DiTConfig",
    "Flux",
    "FluxConfig",
    "LTXConfig",
    "MMDiT",
    "MMDiTConfig",
    "ModelConfig",
    "PixArt",
    "PixArtConfig",
    "Sana",
    "SanaConfig",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
    "VideoDiT",
    "VideoDiTConfig",
    "ZImage",
    "ZImageConfig",
    "build_model",
    "count_parameters",
    "feature_names",
    "forward_flops",
    "forward_with_features",
    "network_of",
    "preset",
    "preset_names",
]  # fmt: skip
