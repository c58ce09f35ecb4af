"""Architectures by name: build one from its config, count its parameters and operations."""

import torch

from smalti.models import dit
from smalti.models.dit import DiT, DiTConfig
from smalti.types import unknown_name

ModelConfig = DiTConfig  # grows to a union with the second architecture


def preset_names() -> list[str]:
    """The papers' names that preset() takes."""
    return sorted(dit.dit_presets())


def preset(name: str) -> ModelConfig:
    """A config by its paper's name, such as "DiT-XL/2". Raises UserError with the nearest names."""
    presets = dit.dit_presets()
    if name not in presets:
        raise unknown_name("model preset", name, presets)
    return presets[name]


def build_model(config: ModelConfig, seed: int = 0) -> DiT:
    """The network of a config with its published initialisation, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation must not move the caller's generator
        model = DiT(config)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by top-level part, in the order of the module's definition."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of one forward at batch 1, matrix products only."""
    return dit.forward_flops(config)
