"""Networks, one file an architecture, and the registry that builds them by name."""

from smalti.models.dit import DiT, DiTConfig
from smalti.models.features import feature_names, forward_with_features
from smalti.models.registry import (
    ModelConfig,
    build_model,
    count_parameters,
    forward_flops,
    network_of,
    preset,
    preset_names,
)
from smalti.models.unet import UNet, UNetConfig
from smalti.models.zimage import ZImage, ZImageConfig

__all__ = [
    "DiT", "DiTConfig", "ModelConfig", "UNet", "UNetConfig", "ZImage", "ZImageConfig", "build_model",
    "count_parameters", "feature_names", "forward_flops", "forward_with_features", "network_of", "preset",
    "preset_names",
]  # fmt: skip
