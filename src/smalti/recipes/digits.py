"""Runs on the bundled digits."""

from smalti.config import Budget, LoopConfig, RunConfig, SamplingConfig
from smalti.diffusion.objective import Objective
from smalti.diffusion.timesteps import LogitNormalTimesteps, UniformTimesteps
from smalti.models.dit import DiTConfig
from smalti.optim.ema import ExponentialEma, PowerEma
from smalti.optim.optimizers import AdamWConfig, MuonConfig
from smalti.optim.schedule import Schedule


def mnist() -> RunConfig:
    """Digits in minutes on a CPU: DiT-Tiny with QK-norm, RoPE and SwiGLU, rectified flow, Muon.

    smalti train mnist --minutes 3
    The timestep density leans towards noise (mean 0.5), where the class is decided. docs/LOG.md has what was tried.
    """
    return RunConfig(
        recipe="mnist",
        budget=Budget("minutes", 3.0),
        model=DiTConfig(positions="sincos+rope", qk_norm=True, activation="swiglu", initialisation="wide"),
        process="rectified_flow",
        objective=Objective("velocity"),
        timesteps=LogitNormalTimesteps(mean=0.5),
        optimizer=MuonConfig(learning_rate=5e-3, adamw_learning_rate=5e-3),
        schedule=Schedule(),
        ema=PowerEma(),
        loop=LoopConfig(
            batch_size=64,
            label_dropout=0.05,
            stratified_timesteps=True,
            validate_every=400,
            checkpoint_every=500,
            preview_every=1000,
            precision="auto",
            compile=True,
        ),
        sampling=SamplingConfig(guidance_scale=1.5),
    )


def mnist_ddpm() -> RunConfig:
    """The published recipe on the digits: eps prediction, 1000 linear betas, AdamW 1e-4, EMA 0.9999.

    smalti train mnist-ddpm --minutes 30
    Source: DiT (Peebles and Xie 2023), section 4. It needs far more pictures than `mnist`.
    """
    return RunConfig(
        recipe="mnist-ddpm",
        budget=Budget("minutes", 30.0),
        model=DiTConfig(),
        process="vp_linear_discrete",
        objective=Objective("eps"),
        timesteps=UniformTimesteps(),
        optimizer=AdamWConfig(),
        schedule=Schedule(warmup_steps=0, decay="none"),
        ema=ExponentialEma(),
        loop=LoopConfig(batch_size=128),
        sampling=SamplingConfig(spacing="lambda", clip_x0=True),
    )
