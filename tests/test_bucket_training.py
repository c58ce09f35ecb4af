"""Training on pictures of mixed shapes, and sampling at a shape that was never seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import called

import smalti
from smalti.config import Budget, apply_overrides
from smalti.errors import UserError
from smalti.recipes import recipe
from smalti.training.data import open_run_data
from smalti.training.display import PlainDisplay
from smalti.training.loop import train

SETTINGS = [
    "data=folder", "in_channels=3", "image_size=32,32", "num_classes=0", "model.width=64", "model.depth=2",
    "positions=sincos", "buckets=aspect", "buckets.max_aspect=2", "buckets.step=2", "batch_size=16",
    "validate_every=100", "preview_every=10000", "checkpoint_every=1000", "compile=false", "warmup_steps=10",
    "sampling.num_inference_steps=6",
]  # fmt: skip


def coordinates(height, width):
    """A picture that says where each pixel is: red grows to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 5, rows * 5, np.full((height, width), 60)], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coordinates")
    for size in ((32, 32), (24, 40), (40, 24)):
        for number in range(24):
            Image.fromarray(coordinates(*size)).save(folder / f"{size[0]}x{size[1]}-{number}.png")
    return folder


def config_of(pictures, *more):
    return apply_overrides(recipe("mnist"), [*SETTINGS, f"data.path={pictures}", *more])


def test_a_network_reports_its_own_coordinates_at_sizes_seen_and_unseen(pictures, tmp_path):
    config = config_of(pictures)
    sizes = {tuple(rows.shape[1:]) for rows in open_run_data(config, torch.device("cpu")).training}
    assert sizes == {(32, 32), (24, 40), (40, 24)}
    train(replace(config, budget=Budget("steps", 300)), tmp_path / "run", display=PlainDisplay(1e9))
    pipe = smalti.load(tmp_path / "run")
    for size in ((24, 40), (40, 24), (32, 40)):  # the last was never seen; its rows and columns were
        drawn = pipe(num_images=2, image_size=size).tensor
        wanted = torch.from_numpy(coordinates(*size)).permute(2, 0, 1) / 127.5 - 1
        assert drawn.shape == (2, 3, *size)
        # A picture upside down would be at 0.157, one moved by a token at 0.1.
        assert (drawn - wanted).abs().mean() < 0.06


def test_sample_command_takes_another_size(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    train(replace(config_of(pictures), budget=Budget("steps", 2)), run, display=PlainDisplay(1e9))
    code, _, error = called(
        capsys, "sample", run, "--num-images-per-label", 2, "--image-size", 24, 48, "--out", tmp_path / "samples"
    )
    assert code == 0, error
    assert Image.open(tmp_path / "samples" / "00000.png").size == (48, 24)
    code, _, error = called(capsys, "sample", run, "--image-size", 25, 48, "--out", tmp_path / "samples")
    assert (code, error.count("\n")) == (2, 1)
    assert "must divide" in error


def test_doctor_lists_the_sizes(pictures, capsys):
    code, said, error = called(capsys, "doctor", "mnist", "--set", *SETTINGS, f"data.path={pictures}")
    assert code == 0, error
    assert "24 x 40" in said


def test_buckets_are_for_pixels():
    with pytest.raises(UserError, match="buckets"):
        open_run_data(config_of("nowhere", "autoencoder=small_kl"), torch.device("cpu"))
