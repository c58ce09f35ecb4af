"""Checkpoints: round trip, and damage that is found and named."""

import errno

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti import checkpoint as checkpoint_module
from smalti.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)

TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"a/0/step": torch.tensor(3.0)}}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(width=32), max_size=20), step=st.integers(0, 10**7),
    state=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)  # fmt: skip
def test_round_trip(tmp_path, values, step, state):
    state = {f"x{k}": v for k, v in state.items()}
    tensors = {"model": {"w": torch.tensor(values)}}
    read = read_checkpoint(save_checkpoint(tmp_path, step, tensors, state))
    assert read.step == step
    assert torch.equal(read.tensors["model"]["w"].nan_to_num(7), torch.tensor(values).nan_to_num(7))
    assert {k: v for k, v in read.state.items() if k in state} == state


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_or_truncation_is_found_and_named(tmp_path, data):
    folder = save_checkpoint(tmp_path, 1, TENSORS, {"seconds": 1.5})
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:position]
    path.write_bytes(content)
    outcome = _read_or_complaint(folder)
    if isinstance(outcome, str):
        assert path.name in outcome or "missing" in outcome
    else:  # white space of the JSON may change without changing what it says
        assert path.name == "state.json"
        assert outcome.state["seconds"] == 1.5


def _read_or_complaint(folder):
    try:
        return read_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


def test_damage_falls_back_to_the_older_one(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, {})
    newer = save_checkpoint(tmp_path, 2, TENSORS, {})
    (newer / "model.safetensors").write_bytes(b"broken")
    checkpoint, complaints = newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert "step_00000002" in complaints[0]
    assert "model.safetensors is damaged" in complaints[0]


def test_nothing_whole_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, 1, TENSORS, {})
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no older checkpoint is whole"):
        newest_checkpoint(tmp_path)


def test_full_disk_keeps_the_older_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, TENSORS, {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, TENSORS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / ".partial-step_00000004").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert not list(tmp_path.glob(".partial*"))
