"""A step that is not finite: what is kept of it reproduces it, and says where it began."""

import json
import math

import pytest
import torch
from training_runs import tiny_config

from smalti.checkpoint import list_checkpoints, read_checkpoint
from smalti.errors import UserError
from smalti.training import loop
from smalti.training.display import PlainDisplay
from smalti.training.failure import TrainingDiverged, replay
from smalti.training.loop import train
from smalti.training.state import new_state


def failing_run(path, monkeypatch, poison, *overrides):
    """A run whose weights are poisoned before step 5; its last checkpoint is of step 3."""
    real = loop.compute_gradients

    def compute_gradients(config, process, state, network, micro_batches):
        if state.step == 5:
            with torch.no_grad():
                poison(state.model)
        return real(config, process, state, network, micro_batches)

    monkeypatch.setattr(loop, "compute_gradients", compute_gradients)
    config = tiny_config(12, "precision=float32", "depth=2", *overrides)
    with pytest.raises(TrainingDiverged, match=r"at step 5: .*replay-nan .*last good state is .*step_0000000"):
        train(config, path, display=PlainDisplay(1e9))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_poisoned_module_is_named(tmp_path, monkeypatch, parts):
    def poison(model):
        model.blocks[1].mlp.fc1.bias[3] = math.nan

    failing_run(tmp_path / "run", monkeypatch, poison, f"gradient_accumulation_steps={parts}")
    # The weights are not finite, so they are no last good state: that of step 3 is.
    assert [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    replayed = replay(tmp_path / "run")
    assert replayed.reproduced
    assert replayed.first_module == "blocks.1.mlp.fc1"
    assert replayed.bad_rows == tuple(range(8))
    assert "blocks.1.mlp.fc1.weight" in replayed.bad_gradients
    assert json.loads((tmp_path / "run" / "failure" / "failure.json").read_text())["step"] == 5


def test_an_overflow_leaves_finite_weights_as_the_last_good_state(tmp_path, monkeypatch):
    def poison(model):
        model.patch_embed.weight.mul_(1e25)

    failing_run(tmp_path / "run", monkeypatch, poison)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step_00000005"
    assert all(torch.isfinite(tensor).all() for tensor in read_checkpoint(newest).tensors["model"].values())
    assert replay(tmp_path / "run").reproduced


def test_what_was_the_machines_doing_is_told_apart(tmp_path, monkeypatch):
    """A value that only that process had wrong: the step is finite when it is run again."""
    run = tmp_path / "run"
    failing_run(run, monkeypatch, lambda model: model.blocks[0].mlp.fc1.bias[0].fill_(math.inf))
    from safetensors.torch import save_file

    healthy = new_state(tiny_config(12, "precision=float32", "depth=2"), torch.device("cpu")).model.state_dict()
    save_file(healthy, run / "failure" / "model.safetensors")
    replayed = replay(run)
    assert not replayed.reproduced
    assert "not reproduced" in replayed.text()


def test_a_run_without_a_failure_says_so(tmp_path):
    train(tiny_config(1), tmp_path / "run", display=PlainDisplay(1e9))
    with pytest.raises(UserError, match="has no failed step"):
        replay(tmp_path / "run")
