"""Runs of masked tokens: predict what is hidden, keep the confident, repeat."""

from dataclasses import replace

from smalti.autoencoders.pixel_levels import PixelLevels
from smalti.config import Budget, RunConfig, SamplingConfig
from smalti.diffusion.objective import Objective
from smalti.diffusion.timesteps import UniformTimesteps
from smalti.models.dit import DiTConfig
from smalti.optim.optimizers import MuonConfig
from smalti.recipes.digits import mnist
from smalti.sampling.masked import MASKED_SOLVER


def mnist_masked() -> RunConfig:
    """Digits as masked tokens in minutes on a CPU: each pixel one of 16 values, a DiT of patches, no tokenizer.

    smalti train mnist-masked --minutes 5
    """
    base = mnist()
    model = base.model
    assert isinstance(model, DiTConfig)
    return replace(
        base,
        recipe="mnist-masked",
        budget=Budget("minutes", 5.0),
        autoencoder=PixelLevels(levels=16),
        model=replace(model, in_channels=16),
        process="masked_cosine",
        objective=Objective("tokens"),
        timesteps=UniformTimesteps(),
        optimizer=MuonConfig(learning_rate=5e-3, adamw_learning_rate=5e-3),
        loop=replace(base.loop, label_dropout=0.1),
        sampling=SamplingConfig(solver=MASKED_SOLVER, num_inference_steps=12, guidance_scale=2.0),
    )
