"""Schedule-free AdamW: algorithm 1 written out in NumPy, a noisy quadratic, exact resume, settings that do not fit."""

import copy
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import final_bytes, tiny_config

from smalti.checkpoint import list_checkpoints, read_checkpoint
from smalti.config import from_json, to_json
from smalti.errors import UserError
from smalti.models import DiTConfig, build_model
from smalti.optim.optimizers import build_optimizers
from smalti.optim.schedule import Schedule, learning_rate_factor
from smalti.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeConfig
from smalti.training.display import PlainDisplay
from smalti.training.loop import train

QUIET = PlainDisplay(1e9)
SETTINGS = ["optimizer=schedule_free", "ema=by_optimizer", "schedule.decay=none"]


def algorithm_1(gradient, start, steps, *, rate, beta1, beta2, decay, warmup, eps=1e-8):
    """Defazio et al. 2024, algorithm 1, line by line: (y that the next gradient would be taken at, x)."""
    x, z, v, squared_rates = start.copy(), start.copy(), np.zeros_like(start), 0.0
    for t in range(1, steps + 1):
        y = (1 - beta1) * z + beta1 * x
        g = gradient(y, t)
        v = beta2 * v + (1 - beta2) * g**2
        rate_t = rate * np.sqrt(1 - beta2**t) * min(1.0, t / warmup)
        z = z - rate_t * g / (np.sqrt(v) + eps) - rate_t * decay * y
        squared_rates += rate_t**2
        c = rate_t**2 / squared_rates
        x = (1 - c) * x + c * z
    return (1 - beta1) * z + beta1 * x, x


def run_ours(gradient, start, steps, *, rate, beta1, beta2, decay, warmup, reload_at=None):
    """The same with our optimiser, its rate set before each step as the loop does."""
    y = torch.nn.Parameter(torch.from_numpy(start.copy()))
    x = y.detach().clone()

    def new():
        return ScheduleFreeAdamW([y], [x], rate, (beta1, beta2), weight_decay=decay)

    optimizer, schedule = new(), Schedule(warmup_steps=warmup - 1, decay="none")
    for step in range(steps):
        if step == reload_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = new()
            optimizer.load_state_dict(state)
        y.grad = torch.from_numpy(gradient(y.detach().numpy(), step + 1)).to(y)
        optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(schedule, step, step / steps)
        optimizer.step()
    return y.detach().numpy(), x.numpy()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 100), steps=st.integers(1, 40), rate=st.floats(1e-3, 0.5), beta1=st.floats(0.5, 0.98),
    beta2=st.floats(0.9, 0.999), decay=st.sampled_from([0.0, 0.1]), warmup=st.integers(1, 20),
)  # fmt: skip
def test_it_is_algorithm_1(seed, steps, rate, beta1, beta2, decay, warmup):
    generator = np.random.default_rng(seed)
    start, noise = generator.normal(size=5), generator.normal(size=(steps + 1, 5))
    curvature = np.array([0.1, 0.5, 1.0, 3.0, 10.0])

    def gradient(y, t):
        return curvature * y + noise[t]

    options = dict(rate=rate, beta1=beta1, beta2=beta2, decay=decay, warmup=warmup)
    for ours, theirs in zip(
        run_ours(gradient, start, steps, **options), algorithm_1(gradient, start, steps, **options), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_on_a_noisy_quadratic_the_average_nears_the_minimum_where_a_constant_rate_does_not():
    """The distance of x halves in four times the steps, as 1 / sqrt(steps); AdamW's at the same rate stays."""
    noise = np.random.default_rng(0).normal(size=(4001, 200))

    def gradient(y, t):
        return y + noise[t]

    def distances(steps):
        _, x = run_ours(gradient, np.ones(200), steps, rate=0.05, beta1=0.9, beta2=0.999, decay=0.0, warmup=1)
        adamw = torch.nn.Parameter(torch.ones(200, dtype=torch.float64))
        optimizer = torch.optim.AdamW([adamw], lr=0.05, betas=(0.9, 0.999), weight_decay=0.0)
        for step in range(steps):
            adamw.grad = torch.from_numpy(gradient(adamw.detach().numpy(), step + 1))
            optimizer.step()
        return np.sqrt(np.mean(x**2)), adamw.detach().square().mean().sqrt().item()

    (short, adamw_short), (long, adamw_long) = distances(1000), distances(4000)
    assert short / long == pytest.approx(2, rel=0.15)
    assert adamw_short / adamw_long == pytest.approx(1, rel=0.15)
    assert adamw_long > 3 * long


def test_state_that_is_loaded_goes_on_to_the_bit():
    """In float32, where the sum of squared rates must not be rounded to the weights' type."""
    generator = np.random.default_rng(0)
    start, noise = generator.normal(size=50).astype(np.float32), generator.normal(size=(41, 50)).astype(np.float32)
    options = dict(rate=0.0123, beta1=0.9, beta2=0.99, decay=0.1, warmup=7)
    runs = [run_ours(lambda y, t: y + noise[t], start, 40, **options, reload_at=at) for at in (None, 3, 39)]
    for again in runs[1:]:
        for one, other in zip(runs[0], again, strict=True):
            assert one.tobytes() == other.tobytes()


def test_it_updates_the_average_of_a_run(tmp_path):
    config = tiny_config(12, *SETTINGS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, display=QUIET)
    train(config, killed, display=QUIET)
    shutil.rmtree(killed / "checkpoints" / "step_00000012")
    train(config, killed, resume=True, display=QUIET)
    assert final_bytes(whole) == final_bytes(killed)
    tensors = read_checkpoint(list_checkpoints(whole / "checkpoints")[-1]).tensors
    names = list(dict(build_model(config.model).named_parameters()))
    for number, name in enumerate(names):
        x, y, z = tensors["ema"][name], tensors["model"][name], tensors["optimizer"][f"schedule_free/{number}/z"]
        torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(tensors["ema"][name], tensors["model"][name]) for name in names)


def test_every_weight_has_an_average():
    model = build_model(DiTConfig(depth=1, width=32))
    average = copy.deepcopy(model)
    (optimizer,) = build_optimizers(ScheduleFreeConfig(weight_decay=0.1), model, average=average).values()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # Of the first step x is z, so that the gradient's point y is there too.
    for p, x in zip(model.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(p, x)
        assert not torch.equal(p, torch.zeros_like(p))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (SETTINGS[:1], "it keeps its own average: set ema=by_optimizer"),
        (SETTINGS[1:2], "optimizer=muon with ema=by_optimizer: only schedule_free keeps an average"),
        (SETTINGS[:2], "averages in place of a decay: set schedule.decay=none"),
        ([*SETTINGS, "relative_std=0.1"], "has no effect: it belongs to ema=power or post_hoc"),
        ([*SETTINGS, "beta1=1"], r"optimizer.beta1=1.0 must lie in \(0, 1\)"),
        ([*SETTINGS, "optimizer.learning_rate=0"], "must be above 0"),
        ([*SETTINGS, "decay_share=0.1"], "has no effect while decay=none"),
    ],
)
def test_settings_that_do_not_fit(overrides, says):
    with pytest.raises(UserError, match=says):
        tiny_config(1, *overrides)


def test_its_config_survives_json():
    config = tiny_config(1, *SETTINGS)
    assert from_json(type(config), to_json(config)) == config
