"""smalti convert, export, adapt, and training from what they write: the real commands."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_runs import tiny_config

import smalti
from smalti.interop.load import read_weights
from smalti.training.loop import train


def command(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "smalti", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(
        tiny_config(2, "positions=sincos", "qk_norm=false", "activation=gelu_tanh", "frequency_shift=1"), folder
    )  # fmt: skip
    return folder


def test_there_and_back(run, tmp_path):
    code, output = command("convert", run, tmp_path / "ours", "--to", "smalti")
    assert (code, "tensors" in output) == (0, True)
    code, _ = command(
        "convert", tmp_path / "ours", tmp_path / "x.safetensors", "--to", "original", "--prefix", "model."
    )
    assert code == 0
    assert "model.x_embedder.proj.weight" in load_file(tmp_path / "x.safetensors")
    code, output = command(
        "convert", tmp_path / "x.safetensors", tmp_path / "theirs", "--to", "diffusers",
        "--set", "num_heads=2", "frequency_shift=1",
    )  # fmt: skip
    assert code == 0, output
    back, weights = read_weights(tmp_path / "theirs"), read_weights(run)
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], weights.tensors[name]) for name in weights.tensors)


def test_adapt_and_train_on(run, tmp_path):
    code, output = command("adapt", run, tmp_path / "deeper", "--depth", "3", "--num-classes", "20")
    assert code == 0
    for words in ("depth: 1 -> 3", "again, switched off", "10 classes and the null label kept", "tensors kept as they"):
        assert words in output
    changes = ("positions=sincos", "qk_norm=false", "activation=gelu_tanh", "frequency_shift=1", "num_classes=20")
    config = tiny_config(1, *changes, "depth=3", f"initial_weights={tmp_path / 'deeper'}")
    train(config, tmp_path / "run")
    assert smalti.load(tmp_path / "run").config.model.depth == 3
    code, output = command(
        "train", "mnist", "--steps", "1", "--out", tmp_path / "run2", "--set", f"initial_weights={tmp_path / 'deeper'}"
    )
    assert code == 2
    assert "its width is 32, this run's is 128" in output
    assert not (tmp_path / "run2").exists()


def test_export(run, tmp_path):
    code, output = command("export", run, tmp_path / "out", "--to", "diffusers")
    assert code == 0
    assert "FlowMatchEulerDiscreteScheduler" in output
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()
    code, output = command("export", run, tmp_path / "out")
    assert code == 2
    assert "exists: pass --overwrite" in output
