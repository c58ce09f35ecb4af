"""From pictures to an autoencoder, to latents, to a run that denoises them, to pictures again: the real commands."""

import json

import pytest
import torch
from PIL import Image
from shape_pictures import write_shapes
from test_cli import called
from test_text_training import SMALL

import smalti
from smalti.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALTI_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="module")
def settings(folder):
    from contextlib import redirect_stdout
    from io import StringIO

    from smalti.cli import main

    pictures = write_shapes(folder / "pictures", size=32)
    size = ["--size", "32", "32", "--width", "8", "--steps", "20"]
    with redirect_stdout(StringIO()), pytest.raises(SystemExit) as stop:
        main(["train-autoencoder", str(pictures), *size, "--out", str(folder / "autoencoder")])
    assert not stop.value.code
    small = [s for s in SMALL if not s.startswith("model.image_size")]
    return [
        f"data.path={pictures}", f"autoencoder.path={folder / 'autoencoder'}", "model.image_size=8,8", *small,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder, settings):
    from dataclasses import replace

    from smalti.config import Budget, apply_overrides
    from smalti.recipes import recipe
    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    config = replace(apply_overrides(recipe("emoji-64-latent"), settings), budget=Budget("steps", 6))
    train(config, folder / "run", display=PlainDisplay(1e9))
    return folder / "run"


def test_a_run_on_latents_draws_pictures(run, tmp_path, capsys):
    statistics = json.loads((run / "latents.json").read_text())
    assert len(statistics["mean"]) == len(statistics["std"]) == 4
    pipe = smalti.load(run)
    output = pipe(prompts=["a red circle", "a blue bar"], num_inference_steps=2)
    assert output.tensor.shape == (2, 3, 32, 32)
    assert float(output.tensor.abs().max()) <= 1
    code, _, error = called(
        capsys, "sample", run, "--prompts", "a red bar", "--num-images-per-prompt", 2, "--out", tmp_path
    )
    assert code == 0, error
    assert Image.open(tmp_path / "00000.png").size == (32, 32)


def test_going_on_keeps_the_statistics_and_encodes_nothing(run, settings, monkeypatch, capsys):
    before = (run / "latents.json").read_bytes()
    monkeypatch.setattr(
        "smalti.autoencoders.small_kl.SmallKL.encode_moments", lambda *_: pytest.fail("encoded again"), raising=True
    )
    code, _, error = called(
        capsys, "train", "emoji-64-latent", "--steps", 8, "--out", run, "--resume", "--set", *settings
    )
    assert code == 0, error
    assert (run / "latents.json").read_bytes() == before


def test_latents_that_do_not_fit_the_network_are_refused(settings, tmp_path, capsys):
    code, _, error = called(
        capsys, "train", "emoji-64-latent", "--steps", 2, "--out", tmp_path / "run", "--set", *settings, "in_channels=8"
    )
    assert (code, error.count("\n")) == (2, 1)
    assert "model.in_channels=8: the latents have 4" in error
    assert not (tmp_path / "run").exists()


def test_editing_latents_is_refused(run):
    from smalti.pipeline_editing import Editing

    with pytest.raises(UserError, match="latents"):
        smalti.load(run)(prompts="a red bar", editing=Editing(torch.zeros(3, 32, 32), strength=0.5))


def test_a_run_without_its_statistics_says_so(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "latents.json").unlink()
    with pytest.raises(UserError, match=r"latents\.json"):
        smalti.load(tmp_path / "run")
