"""Training densities and weightings against diffusers' own functions."""

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from smalti.diffusion import make_process
from smalti.diffusion.objective import Objective, loss_weight
from smalti.diffusion.timesteps import ModeTimesteps


def test_mode_is_diffusers_formula():
    process = make_process("rectified_flow")
    theirs = compute_density_for_timestep_sampling(
        "mode", 64, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    u = torch.rand(64, generator=torch.Generator().manual_seed(0)).double()
    ours = (ModeTimesteps(1.29)(u, process) - process.t_min) / (process.t_max - process.t_min)
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "sigma_sqrt", "cosmap"])
def test_sd3_weights_are_diffusers_own(weighting):
    process = make_process("rectified_flow")
    t = torch.linspace(process.t_min, process.t_max, 64, dtype=torch.float64)
    ours = loss_weight(Objective("velocity", weighting), process, t)
    theirs = compute_loss_weighting_for_sd3(weighting, t)  # sigma_sqrt in float32
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
