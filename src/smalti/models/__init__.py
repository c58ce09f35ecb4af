"""Networks, one file an architecture, and the registry that builds them by name."""

from smalti.models.dit import DiT, DiTConfig
from smalti.models.registry import (
    build_model,
    count_parameters,
    forward_flops,
    preset,
    preset_names,
)

__all__ = ["DiT", "DiTConfig", "build_model", "count_parameters", "forward_flops", "preset", "preset_names"]
