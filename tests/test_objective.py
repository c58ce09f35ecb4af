"""Training losses: published weightings, EDM's loss as published, loss per bin of t, one run that logs it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import tiny_config

from smalti.config import apply_overrides
from smalti.data.digits import load_digits
from smalti.diffusion import make_process, process_names
from smalti.diffusion.objective import Objective, loss_by_timestep_bin, loss_weight, noisy_input, per_sample_loss
from smalti.diffusion.prediction import prediction_types, training_target, x0_from_output
from smalti.errors import UserError
from smalti.recipes import recipe
from smalti.training.batch import validation_batches
from smalti.training.display import PlainDisplay
from smalti.training.loop import train


def inside(process, count=64):
    return torch.linspace(process.t_min, process.t_max, count + 2, dtype=torch.float64)[1:-1]


def random_pair(seed, batch, width=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, width, dtype=torch.float64, generator=generator).unbind(0)


class Wave:
    """Some smooth network."""

    def __call__(self, x, t, cond=None):
        return torch.sin(x + t[:, None] / 7)

    def null_condition(self, batch_size):
        return None


def test_min_snr_weights_are_those_of_its_paper_for_eps():
    process = make_process("vp_cosine")
    t = inside(process)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    weight = loss_weight(Objective("eps", "min_snr", 5.0), process, t)
    torch.testing.assert_close(weight, torch.clamp(snr, max=5.0) / snr)  # Hang et al. 2023, section 3.4


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_sd3_weights_depend_on_the_snr_alone(weighting):
    flow, log_snr = make_process("rectified_flow"), torch.linspace(-3, 3, 20, dtype=torch.float64)
    expected = loss_weight(Objective("velocity", weighting), flow, flow.t_of_log_snr(log_snr))
    for name in process_names():
        process = make_process(name)
        weight = loss_weight(Objective("velocity", weighting), process, process.t_of_log_snr(log_snr))
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", process_names())
def test_edm_weighting_is_uniform_on_the_edm_prediction(name):
    process = make_process(name)
    t = inside(process)
    torch.testing.assert_close(loss_weight(Objective("edm", "edm"), process, t), torch.ones_like(t))


@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
@pytest.mark.parametrize("name", process_names())
def test_weights_of_the_x0_error_are_the_same_in_every_prediction(name, weighting):
    process = make_process(name)
    t = inside(process, 7)
    x0, eps = random_pair(0, 7)
    x = noisy_input(process, t, x0, eps)
    ratios = []
    for kind in prediction_types():
        target = training_target(kind, process, t, x0, eps)
        output = target + 0.1
        x0_error = (x0_from_output(kind, process, t, x, output) - x0).square().mean(1)
        ratios.append(loss_weight(Objective(kind, weighting), process, t) * 0.01 / x0_error)
    for ratio in ratios[1:]:
        torch.testing.assert_close(ratio, ratios[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", ["uniform", "edm"])
def test_edm_loss_is_the_published_one(weighting):
    """Karras et al. 2022, eq. 2 and 8: E lambda(sigma) |D(y + n; sigma) - y|^2, with D as in eq. 7."""
    process, sigma_data = make_process("edm"), 0.5
    t = inside(process, 9)
    y, eps = random_pair(1, 9)
    sigma = process.sigma(t)[:, None]
    total = sigma**2 + sigma_data**2
    x = y + sigma * eps
    network = Wave()(x / total.sqrt(), sigma[:, 0].log() / 4)
    denoised = sigma_data**2 / total * x + sigma * sigma_data / total.sqrt() * network
    published = (total / (sigma * sigma_data) ** 2 * (denoised - y) ** 2).mean(1)
    loss = per_sample_loss(Wave(), process, Objective("edm", weighting), y, eps, t, None)
    torch.testing.assert_close(loss, published, rtol=1e-7, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 40), bins=st.integers(1, 10))
def test_loss_by_timestep_bin_is_a_mean_per_bin(seed, batch, bins):
    generator = torch.Generator().manual_seed(seed)
    losses, t = torch.rand(2, batch, dtype=torch.float64, generator=generator).unbind(0)
    means, counts = loss_by_timestep_bin(losses, t, bins)
    assert int(counts.sum()) == batch
    for i in range(bins):
        member = losses[(t >= i / bins) & (t < (i + 1) / bins)]
        assert int(counts[i]) == len(member)
        if len(member):
            torch.testing.assert_close(means[i], member.mean())
        else:
            assert means[i].isnan()


def test_loss_by_timestep_bin_at_the_ends_and_with_a_bad_sample():
    t = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    means, counts = loss_by_timestep_bin(torch.tensor([1.0, 2.0, float("nan")]), t)
    assert counts.tolist() == [1, 0, 0, 0, 1, 0, 0, 1]
    assert (float(means[0]), float(means[7])) == (1.0, 2.0)
    assert means[4].isnan()
    with pytest.raises(UserError, match="bins=0"):
        loss_by_timestep_bin(t, t, 0)


def test_a_run_logs_its_validation_loss_by_timestep(tmp_path):
    """Under EDM, whose t begins at 0.22: the first bin is empty and absent from the row."""
    config = tiny_config(2, "process=edm", "prediction_type=edm", "weighting=edm", "timesteps=edm_log_normal")
    train(config, tmp_path / "run", display=PlainDisplay(1e9))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, lines) if "validation_loss" in row]
    (batch,) = validation_batches(config, make_process("edm"), load_digits()[1:])
    t = batch.t
    _, counts = loss_by_timestep_bin(t, t)
    names = {f"validation_loss_t{i}": count for i, count in enumerate(counts.tolist()) if count}
    assert set(row) == {"step", "validation_loss", "validation_loss_low", "validation_loss_high", *names}
    assert row["validation_loss_low"] < row["validation_loss"] < row["validation_loss_high"]
    assert "validation_loss_t0" not in row
    total = sum(row[name] * count for name, count in names.items())
    assert total / len(t) == pytest.approx(row["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["weighting=minsnr"], "weighting='minsnr' must be one of uniform, min_snr, sigma_sqrt, cosmap, edm"),
        (["prediction_type=eps", "process=vp_linear_zero_snr"], "prediction_type='eps' says nothing of x0 at pure"),
        (["vlb_weight=-1"], r"vlb_weight=-1\.0 must be at least 0"),
        (
            ["vlb_weight=0.001", "process=vp_linear_discrete"],
            r"vlb_weight=0\.001 has no effect.*model\.learn_sigma=true",
        ),
        (["learn_sigma=true", "vlb_weight=0.001"], r"vlb_weight=0\.001 is for a process of steps.*'rectified_flow'"),
    ],
)
def test_bad_objectives_are_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        apply_overrides(recipe("mnist"), overrides)
