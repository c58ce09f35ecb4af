"""Runs of masked tokens: trained, resumed, sampled and edited by what every run is."""

import dataclasses
import json

import pytest
import torch
from test_cli import called
from training_runs import final_bytes, masked_config

import smalti
from smalti.config import Budget, RunConfig, apply_overrides, check_parts, from_json, to_json
from smalti.data.digits import load_digits
from smalti.errors import UserError
from smalti.interop.convert import export_run
from smalti.pipeline import ImageRequest
from smalti.pipeline_editing import Editing
from smalti.recipes import recipe
from smalti.training.display import SilentDisplay
from smalti.training.loop import train
from smalti.types import MASKED


@pytest.fixture(scope="module")
def pipe(masked_run):
    return smalti.load(masked_run)


@pytest.fixture(scope="module")
def digit():
    return load_digits()[1].read(torch.tensor([3]))[0]


def test_a_masked_run_learns_and_resumes_to_the_same_bytes(tmp_path, masked_run):
    half = dataclasses.replace(masked_config(), budget=Budget("steps", 20.0))
    train(half, tmp_path / "run", display=SilentDisplay())
    train(masked_config(), tmp_path / "run", resume=True, display=SilentDisplay())
    assert final_bytes(tmp_path / "run") == final_bytes(masked_run)
    rows = map(json.loads, (masked_run / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_every_token_is_drawn_and_a_picture_is_its_seeds_alone(pipe):
    together = pipe([3, 5, 7], seed=4, num_inference_steps=5).tensor
    alone = pipe([5], seed=5, num_inference_steps=5).tensor
    assert together.shape == (3, 1, 28, 28)
    levels = torch.linspace(-1, 1, 16)
    assert bool(torch.isclose(together[..., None], levels, atol=1e-6).any(-1).all())
    assert float((together[1:2] != alone).float().mean()) < 0.01  # a forward of another size rounds otherwise
    assert not torch.equal(together[0], together[1])


def test_members_of_a_mixed_batch_have_their_own_steps_and_scales(pipe):
    requests = [
        ImageRequest(1, seed=0, num_inference_steps=2, guidance_scale=1.0),
        ImageRequest(8, seed=1, num_inference_steps=6, guidance_scale=3.0, solver_options={"temperature": 0.5}),
    ]
    mixed = pipe.mixed(requests).tensor
    for one, request in zip(mixed, requests, strict=True):
        alone = pipe(
            [request.class_label], seed=request.seed, num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale, **request.solver_options,
        ).tensor[0]  # fmt: skip
        assert float((one != alone).float().mean()) < 0.01


def test_image_to_image_keeps_more_the_less_strength_it_has(pipe, digit):
    quantised = pipe.tokenizer.decode(pipe.tokenizer.encode(digit[None]))[0]

    def changed(strength):
        drawn = pipe([3], editing=Editing(digit, strength), num_inference_steps=4, temperature=0.0).tensor[0]
        return float((drawn != quantised).float().mean())

    assert changed(0.01) < 0.02
    assert changed(0.1) < changed(0.9)


def test_inpainting_keeps_every_pixel_outside_the_mask(pipe, digit):
    mask = torch.zeros(28, 28)
    mask[10:20, 8:25] = 1
    quantised = pipe.tokenizer.decode(pipe.tokenizer.encode(digit[None]))[0]
    drawn = pipe([7, 2], editing=Editing(digit, mask=mask), num_inference_steps=5).tensor
    assert torch.equal(drawn[:, 0, mask == 0], quantised[0, mask == 0].expand(2, -1))
    assert not torch.equal(drawn[0], drawn[1])
    nothing = pipe([7], editing=Editing(digit, mask=torch.zeros(28, 28)), num_inference_steps=5).tensor
    assert torch.equal(nothing[0], quantised)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"solver": "ddim"}, "solver='ddim' is for noise: this network predicts masked tokens"),
        ({"spacing": "lambda"}, "spacing='lambda' has no effect on masked tokens"),
        ({"eta": 1.0}, "unknown option of solver 'masked'"),
    ],
)
def test_what_has_no_meaning_for_tokens_is_refused(pipe, call, says):
    with pytest.raises(UserError, match=says):
        pipe([1], **call)


def test_a_network_that_denoises_takes_no_masked_plan(trained_pipeline):
    with pytest.raises(UserError, match="solver='masked' decodes tokens"):
        trained_pipeline([1], solver="masked")
    with pytest.raises(UserError, match="cannot be sampled on each other's processes"):
        trained_pipeline.on_process("masked_cosine")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["process=rectified_flow"], "process=rectified_flow not: they go together"),
        (["autoencoder=pixels", "model.in_channels=1"], "autoencoder=pixels not"),
        (["objective.prediction_type=v"], "objective.prediction_type=v not"),
        (["sampling.solver=ddim"], "sampling.solver=ddim not"),
        (["sampling.clip_x0=true"], "clip_x0"),
        (["guidance.rescale=0.7"], "no meaning for logits"),
        (["weighting=min_snr"], "masked tokens are all weighted alike"),
        (["parametrisation=mup"], "parametrisation=mup"),
    ],
)
def test_parts_that_do_not_go_together_are_named(overrides, says):
    with pytest.raises(UserError, match=says):
        check_parts(apply_overrides(recipe("mnist-masked"), overrides))


def test_the_recipe_goes_through_json():
    config = recipe("mnist-masked")
    check_parts(config)
    assert from_json(RunConfig, to_json(config)) == config


def test_a_masked_run_is_not_exported(masked_run, tmp_path):
    with pytest.raises(UserError, match="diffusers has no class for its network"):
        export_run(masked_run, tmp_path / "out")


def test_a_token_that_is_still_masked_is_no_picture(pipe):
    with pytest.raises(UserError, match="still masked"):
        pipe.pictures(torch.full((1, 28, 28), MASKED))


def test_the_commands_take_masked_runs(masked_run, tmp_path, capsys):
    options = ("--solver-options", "choice_temperature=4", "--num-inference-steps", "3")
    assert called(capsys, "sample", masked_run, "--class-labels", "1", "2", *options, "--out", tmp_path)[0] == 0
    row = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])
    assert (row["solver"], row["network_calls"]) == ("masked", 3)
    assert called(capsys, "info", masked_run)[0] == 0
    code, said, _ = called(capsys, "doctor", "mnist-masked")
    assert code == 0
    assert "of 16 tokens used" in said
    code, _, said = called(capsys, "sample", masked_run, "--solver-options", "eta=1", "--out", tmp_path / "no")
    assert code == 2
    assert "unknown option of solver 'masked'" in said
    assert called(capsys, "eval", masked_run, "--num-images", "100", "--num-inference-steps", "2")[0] == 0
    assert json.loads((masked_run / "evaluation.json").read_text())["solver"] == "masked"
    code, _, said = called(capsys, "tune", masked_run)
    assert code == 2
    assert "tune searches the solvers of noise" in said
