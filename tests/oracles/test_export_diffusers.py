"""A trained run, exported, sampled through diffusers' own classes: the same digits."""

import diffusers
import pytest
import torch
from oracles.identity_autoencoder import IdentityAutoencoder
from training_runs import tiny_config

import smalti
from smalti.cli import main
from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.interop.convert import export_run
from smalti.sampling import make_plan, run_plan
from smalti.sampling.guided import GuidanceOptions, guide
from smalti.training.loop import train
from smalti.types import Condition

AS_DIFFUSERS = (
    "positions=sincos", "qk_norm=false", "activation=gelu_tanh", "frequency_shift=1", "mlp_norm_eps=1e-5",
)  # fmt: skip


@pytest.fixture(scope="module")
def vp_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vp"
    changes = ("process=vp_linear_discrete", "prediction_type=v", "timesteps=uniform", "sampling.spacing=lambda")
    train(tiny_config(60, *AS_DIFFUSERS, *changes), folder)
    return folder


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "flow"
    train(tiny_config(60, *AS_DIFFUSERS), folder)
    return folder


def exported(run, out):
    """As a user does it."""
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), str(out), "--to", "diffusers"])
    assert not stop.value.code


def ours(run, solver, times, noise, labels, guidance_scale):
    pipe = smalti.load(run)
    process = make_process(pipe.config.process)
    plan = make_plan(solver, process=process, times=times)
    network = NetworkDenoiser(pipe.backbone, process, pipe.config.objective.prediction_type)
    null = pipe.backbone.null_condition(len(labels))
    denoiser = guide(network, null, guidance_scale, GuidanceOptions(), process, None)
    seeds = torch.arange(len(labels))
    with torch.inference_mode():
        return run_plan(plan, denoiser, noise, Condition(class_labels=torch.tensor(labels)), seeds)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_dit_pipeline_draws_the_same_digits(vp_run, tmp_path, guidance_scale):
    exported(vp_run, tmp_path / "out")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=IdentityAutoencoder())
    pipe.set_progress_bar_config(disable=True)
    labels = [3, 1, 4, 1]
    images = pipe(
        labels, guidance_scale, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np"
    ).images
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    steps = pipe.scheduler.timesteps
    expected = ours(vp_run, "ddim", [*((steps + 1) / 1000).tolist(), 0.0], noise, labels, guidance_scale)
    pixels = ((expected + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert images.shape == pixels.shape
    assert abs(images - pixels).max() < 1e-4  # before rounding to 256 levels
    assert images.std() > 0.1  # pictures, not nothing


def test_flow_match_euler_draws_the_same_digits(flow_run, tmp_path):
    exported(flow_run, tmp_path / "out")
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(10)
    labels = torch.tensor([3, 1, 4])
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x = noise
    with torch.inference_mode():
        for t in scheduler.timesteps:
            velocity = network(x, timestep=t.expand(3), class_labels=labels).sample
            x = scheduler.step(velocity, t, x).prev_sample
    expected = ours(flow_run, "flow_euler", scheduler.sigmas.tolist(), noise, labels.tolist(), 1.0)
    assert (x - expected).abs().max() < 1e-4
    assert x.std() > 0.1


def test_the_network_is_ours_and_the_classes_are_filled_up(vp_run, tmp_path):
    export_run(vp_run, tmp_path / "out")
    back = smalti.load_backbone(tmp_path / "out")
    mine = smalti.load_backbone(vp_run)
    assert back.config.num_classes == 1000
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3.0, 700.0])
    assert torch.equal(
        back(x, t, Condition(class_labels=torch.tensor([7, 1000]))),
        mine(x, t, Condition(class_labels=torch.tensor([7, 10]))),
    )


def test_what_diffusers_has_no_class_for(tmp_path):
    train(tiny_config(1), tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot express model\.positions"):
        export_run(tmp_path / "run", tmp_path / "out")
    train(tiny_config(1, *AS_DIFFUSERS, "process=gvp"), tmp_path / "gvp")
    with pytest.raises(UserError, match="no scheduler for process=gvp"):
        export_run(tmp_path / "gvp", tmp_path / "out")
    assert not (tmp_path / "out").exists()
