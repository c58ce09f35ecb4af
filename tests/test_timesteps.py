"""Training densities of t: published formulas, published densities, shifts, and unchanged recipes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import tiny_config

from smalti import rng
from smalti.config import RunConfig, apply_overrides, from_json, to_json
from smalti.data.digits import load_digits
from smalti.diffusion import make_process, process_names
from smalti.diffusion.timesteps import (
    CosMapTimesteps,
    EDMLogNormalTimesteps,
    LogitNormalTimesteps,
    ModeTimesteps,
    UniformTimesteps,
    flux_mu,
    resolution_shift,
    shift_timesteps,
)
from smalti.errors import UserError
from smalti.recipes import recipe
from smalti.training.batch import training_batch

DENSITIES = [
    UniformTimesteps(), LogitNormalTimesteps(-0.3, 0.8), ModeTimesteps(), CosMapTimesteps(), EDMLogNormalTimesteps()
]  # fmt: skip
EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def share_of(process, t):
    return (t - process.t_min) / (process.t_max - process.t_min)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(process_names()), density=st.sampled_from(DENSITIES), u=st.floats(1e-12, 1 - 1e-12))
def test_every_density_stays_in_the_trained_span(name, density, u):
    process = make_process(name)
    t = density(torch.tensor([u], dtype=torch.float64), process)
    assert process.t_min <= float(t) <= process.t_max + 1e-15


@pytest.mark.parametrize("name", ["mnist", "mnist-ddpm"])
def test_recipes_train_on_the_timesteps_that_they_say(name):
    config = recipe(name)
    process, size = make_process(config.process), config.loop.batch_size
    rows, _ = load_digits()
    u = rng.uniform((2,), seed=config.seed, purpose="train/timestep", index=torch.arange(size), call=7)[:, 0]
    share = u
    if name == "mnist":  # stratified over the batch, then logit-normal around 0.5
        share = torch.sigmoid(0.5 + torch.special.ndtri((torch.arange(size) + u) / size))
    expected = process.t_min + (process.t_max - process.t_min) * share
    # The same in exact arithmetic; sigmoid's last bit depends on where in the tensor a value stands.
    torch.testing.assert_close(training_batch(config, process, (rows,), 7).t, expected, rtol=0, atol=4e-16)


@pytest.mark.parametrize(
    ("density", "published"),
    [
        # SD3 (Esser et al. 2024), eq. 19 and the density below eq. 21.
        (
            LogitNormalTimesteps(-0.3, 0.8),
            lambda t: (
                torch.exp(-(((torch.logit(t) + 0.3) / 0.8) ** 2) / 2) / (0.8 * (2 * math.pi) ** 0.5 * t * (1 - t))
            ),
        ),
        (CosMapTimesteps(), lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
        (UniformTimesteps(), torch.ones_like),
    ],
)
def test_draws_have_the_published_density(density, published):
    process = make_process("rectified_flow")
    share = share_of(process, density(EVEN, process))
    counts, edges = np.histogram(share.numpy(), bins=20, range=(0, 1))
    middle = torch.tensor(edges[:-1] + np.diff(edges) / 2)
    fine = middle[:, None] + torch.linspace(-0.02475, 0.02475, 100, dtype=torch.float64)
    expected = published(fine).mean(1) / 20
    torch.testing.assert_close(torch.tensor(counts).double() / len(EVEN), expected, rtol=0.01, atol=2e-4)


def test_mode_falls_in_u_at_both_ends_of_its_scale():
    process = make_process("rectified_flow")
    for scale in (-1.0, 0.0, 2 / (math.pi - 2)):
        assert (ModeTimesteps(scale)(EVEN, process).diff() < 0).all()


@pytest.mark.parametrize("name", process_names())
def test_edm_log_normal_is_normal_in_ln_sigma_over_alpha(name):
    process = make_process(name)
    density = EDMLogNormalTimesteps(-0.5, 0.6)  # within every process's span
    log_ratio = -process.log_snr(density(EVEN, process))
    normal = torch.special.ndtr((log_ratio + 0.5) / 0.6)
    torch.testing.assert_close(normal, EVEN, rtol=0, atol=1e-9)


def test_edm_log_normal_is_held_at_the_ends_rarely():
    process = make_process("edm")
    t = EDMLogNormalTimesteps()((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000, process)
    held = ((t == process.t_min) | (t == process.t_max)).double().mean()
    assert 1e-5 < held < 2e-5


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(0.1, 20.0), t=st.floats(1e-4, 1 - 1e-4))
def test_shift_moves_lambda_by_its_logarithm(shift, t):
    process, t = make_process("rectified_flow"), torch.tensor([t], dtype=torch.float64)
    moved = shift_timesteps(t, shift)
    torch.testing.assert_close(process.log_snr(moved), process.log_snr(t) - math.log(shift), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(shift_timesteps(moved, 1 / shift), t, rtol=1e-9, atol=1e-12)
    assert shift_timesteps(float(t), shift) == float(moved)
    assert np.array_equal(shift_timesteps(t.numpy(), shift), moved.numpy())


@pytest.mark.parametrize("density", [UniformTimesteps, LogitNormalTimesteps, ModeTimesteps, CosMapTimesteps])
def test_a_shifted_density_shifts_each_draw_once(density):
    process = make_process("rectified_flow")
    plain, shifted = share_of(process, density()(EVEN, process)), share_of(process, density(shift=3.0)(EVEN, process))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-12, atol=1e-12)


def test_resolution_shifts():
    assert resolution_shift(512 * 512, 1024 * 1024) == 2.0
    assert (flux_mu(256), flux_mu(4096)) == (0.5, 1.15)
    assert flux_mu(1024) == pytest.approx(0.63)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: shift_timesteps(0.5, 0.0), "shift=0.0 must be above 0"),
        (lambda: UniformTimesteps(shift=-1.0), "shift=-1.0"),
        (lambda: ModeTimesteps(1.8), r"timesteps.scale=1.8 must lie in \[-1, 1.7519\]"),
        (lambda: EDMLogNormalTimesteps(p_std=0.0), "timesteps.p_std=0.0"),
        (lambda: resolution_shift(0, 4), "base_pixels=0"),
        (lambda: flux_mu(0), "sequence_length=0"),
        (lambda: apply_overrides(recipe("mnist-ddpm"), ["timesteps.shift=3"]), "the process is 'vp_linear_discrete'"),
        (lambda: apply_overrides(recipe("mnist"), ["p_mean=0"]), "belongs to timesteps=edm_log_normal"),
        (
            lambda: apply_overrides(recipe("mnist"), ["timesteps=edm_log_normal", "shift=2"]),
            "belongs to timesteps=uniform or logit_normal or mode or cosmap",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_configs_of_old_runs_load():
    body = to_json(tiny_config())
    assert body["timesteps"].pop("shift") == 1.0
    assert from_json(RunConfig, body) == tiny_config()


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "cosmap", "edm_log_normal"])
def test_every_density_survives_json(kind):
    config = apply_overrides(recipe("mnist"), [f"timesteps={kind}"])
    assert from_json(RunConfig, to_json(config)) == config
