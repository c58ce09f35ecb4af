"""Checkpoints written beside the next steps: what they hold, what a full disk does, who else may write."""

import errno
import json
import multiprocessing
import threading
import time

import pytest
import torch
from training_runs import final_bytes, tiny_config

from smalti.checkpoint import list_checkpoints, read_checkpoint
from smalti.config import apply_overrides
from smalti.errors import UserError
from smalti.training import saving
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.training.parallel import Ranks
from smalti.training.preparing import check_resumable, prepared_folder
from smalti.training.saving import CheckpointWriter
from smalti.training.state import new_state

SILENT = PlainDisplay(1e9)


def test_the_values_are_those_of_the_moment_of_the_call(tmp_path, monkeypatch):
    """The weights move on while the thread still waits to write."""
    go_on = threading.Event()
    real = saving.finish_checkpoint

    def slow(*args):
        go_on.wait(10)
        return real(*args)

    monkeypatch.setattr(saving, "finish_checkpoint", slow)
    state = new_state(tiny_config(), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    writer = CheckpointWriter(tmp_path, 2, Ranks(), sharded=False)
    started = time.perf_counter()
    writer.begin(state, {"metrics_bytes": 7})
    assert time.perf_counter() - started < 5  # it did not wait for the write
    with torch.no_grad():
        for p in state.parameters:
            p.add_(1)
    go_on.set()
    writer.wait()
    checkpoint = read_checkpoint(list_checkpoints(tmp_path)[0])
    assert checkpoint.state["metrics_bytes"] == 7
    assert all(torch.equal(checkpoint.tensors["model"][name], tensor) for name, tensor in before.items())


def fail_once_full(monkeypatch, full):
    """finish_checkpoint that finds the disk full while full() holds."""
    real = saving.finish_checkpoint

    def finish(partial, step, tensors, numbers):
        if full(step):
            partial.rmdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(partial, step, tensors, numbers)

    monkeypatch.setattr(saving, "finish_checkpoint", finish)


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    train(tiny_config(12), tmp_path / "whole", display=SILENT)
    fail_once_full(monkeypatch, lambda step: 6 <= step < 12)
    train(tiny_config(12), tmp_path / "run", display=SILENT)
    said = capsys.readouterr().out
    assert "No space left" in said
    assert "training goes on" in said
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_keeps_what_was_saved(tmp_path, monkeypatch):
    fail_once_full(monkeypatch, lambda step: step >= 6)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(12), tmp_path / "run", display=SILENT)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    monkeypatch.undo()
    train(tiny_config(12), tmp_path / "run", resume=True, display=SILENT)
    train(tiny_config(12), tmp_path / "whole", display=SILENT)
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def _hold(path, held, done):
    with prepared_folder(tiny_config(), path, resume=True, overwrite=False):
        held.set()
        done.wait(60)


def test_a_run_in_use_is_refused_whatever_the_flags(tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, done))
    process.start()
    try:
        assert held.wait(60)
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with (
                pytest.raises(UserError, match=f"is in use by process {process.pid} on"),
                prepared_folder(tiny_config(), tmp_path, **flags),
            ):
                pass
        assert (tmp_path / "config.json").exists()
    finally:
        done.set()
        process.join()
    with prepared_folder(tiny_config(), tmp_path, resume=True, overwrite=False):
        pass


def test_a_killed_holder_leaves_the_run_open(tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, done))
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    with prepared_folder(tiny_config(), tmp_path, resume=True, overwrite=False):
        pass


def test_a_changed_config_is_listed_whole_with_what_may_change(tmp_path):
    before, now = tiny_config(4), tiny_config(9, "seed=3", "batch_size=16", "log_every=2")
    with pytest.raises(UserError) as raised:
        check_resumable(before, now, tmp_path)
    said = str(raised.value)
    assert "seed: it has 0, asked for is 3" in said
    assert "loop.batch_size: it has 8, asked for is 16" in said
    assert "what may change: budget.*, sampling.*" in said
    assert "loop.log_every: it has" not in said


def test_what_may_change_may(tmp_path):
    train(tiny_config(3), tmp_path / "run", display=SILENT)
    changed = apply_overrides(tiny_config(6), ["log_every=2", "validate_every=2", "sampling.num_inference_steps=3"])
    assert train(changed, tmp_path / "run", resume=True, display=SILENT).step == 6
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loop"]["log_every"] == 2


def test_validations_are_part_of_the_state(tmp_path):
    """A resumed run compares with the validations of before, and so says what the uninterrupted one says."""

    def verdicts(path, *steps):
        said = []

        class Listening(PlainDisplay):
            def message(self, text):
                said.append(text)

        for number, count in enumerate(steps):
            config = tiny_config(12, "validate_every=2", "decay=none")
            from dataclasses import replace

            from smalti.config import Budget

            train(replace(config, budget=Budget("steps", count)), path, resume=number > 0, display=Listening(1e9))
        return [text for text in said if "validation loss" in text]

    whole, resumed = verdicts(tmp_path / "whole", 12), verdicts(tmp_path / "resumed", 6, 12)
    assert whole == resumed
    assert "since step 6" in whole[-1]
