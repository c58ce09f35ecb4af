"""A pipeline over a small DiT whose weights are random everywhere, so that its output depends on all of its inputs."""

from dataclasses import replace

import torch

from smalti.models import build_model
from smalti.pipeline import Pipeline
from smalti.recipes import recipe


def random_pipeline(**model_changes) -> Pipeline:
    config = recipe("mnist")
    config = replace(config, model=replace(config.model, width=32, depth=2, num_heads=2, **model_changes))
    network = build_model(config.model, seed=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(network, config)
