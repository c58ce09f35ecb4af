"""Runs of masked tokens: predict what is hidden, keep the confident, repeat."""

from dataclasses import replace

from smalti.autoencoders.pixel_levels import PixelLevels
from smalti.autoencoders.registry import LearnedTokenizer
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
        # Among 784 tokens the surest are background: little noise on the confidence would begin with all of it.
        sampling=SamplingConfig(MASKED_SOLVER, num_inference_steps=12, guidance_scale=2.0, choice_temperature=15.0),
    )


def mnist_tokens() -> RunConfig:
    """Digits as 7 x 7 masked tokens of a learned codebook; the tokenizer is trained first.

    smalti train-tokenizer digits --size 28 28 --channels 1 --width 32 --minutes 2 --out runs/tokenizer
    smalti train mnist-tokens --minutes 5
    """
    base = mnist_masked()
    model = base.model
    assert isinstance(model, DiTConfig)
    return replace(
        base,
        recipe="mnist-tokens",
        autoencoder=LearnedTokenizer(path="runs/tokenizer", codebook_size=256),
        model=replace(model, image_size=(7, 7), patch_size=1, in_channels=64),
        sampling=replace(base.sampling, choice_temperature=6.0),
    )
