"""Networks, one file an architecture, and the registry that builds them by name."""

from smalti.models.dit import DiT, DiTConfig
from smalti.models.features import feature_names, forward_with_features
from smalti.models.ltx import LTX, LTXConfig
from smalti.models.registry import (
    ModelConfig,
    build_model,
    count_parameters,
    forward_flops,
    network_of,
    preset,
    preset_names,
)
from smalti.models.video_dit import VideoDiT, VideoDiTConfig

__all__ = [
    "LTX", "DiT", "DiTConfig", "LTXConfig", "ModelConfig", "VideoDiT", "VideoDiTConfig", "build_model",
    "count_parameters", "feature_names", "forward_flops", "forward_with_features", "network_of", "preset",
    "preset_names",
]  # fmt: skip
