"""Metric writers: what they are shown, that they never stop a run, and the real packages where they are installed."""

import json
import os
import sqlite3
import subprocess
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
from training_runs import TINY, final_bytes, tiny_config

from smalti.checkpoint import list_checkpoints
from smalti.errors import UserError
from smalti.run_folder import RunFolder
from smalti.training import writers as writers_module
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.training.writers import UnfailingWriter, check_writers, open_writers, tracker_run_id

QUIET = PlainDisplay(1e9)


class Stub:
    """A stand-in for wandb's module: keeps what its one run is told."""

    Image = staticmethod(lambda array: ("picture", array.shape))
    Settings = staticmethod(lambda **kwargs: kwargs)

    def __init__(self, first_step=0):
        self.step, self.rows, self.opened, self.exit_code = first_step, [], None, None

    def init(self, **arguments):
        self.opened = arguments
        return self

    def log(self, values, step):
        assert step >= self.step
        self.step = step
        self.rows.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.mark.parametrize(
    ("writers", "says"),
    [
        ("wandbb", r"must be one of tensorboard, wandb, trackio"),
        ("wandb,wandb", "names one twice"),
        ("tensorboard,mlflow", "loop.writers='mlflow' must be one of"),
    ],
)
def test_names_that_cannot_be(writers, says):
    with pytest.raises(UserError, match=says):
        tiny_config(1, f"writers={writers}")


def test_a_missing_package_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writers_module, "find_spec", lambda name: None)
    check_writers(("tensorboard",))
    for name in ("wandb", "trackio"):
        with pytest.raises(UserError, match=rf"{name} is not installed: pip install 'smalti\[track\]'"):
            train(tiny_config(1, f"writers=tensorboard,{name}"), tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_under_one_id_and_never_steps_back(tmp_path, monkeypatch):
    run, first, second = tmp_path / "run", Stub(), Stub(first_step=6)
    monkeypatch.setattr(writers_module, "find_spec", lambda name: True)
    for stub, steps in ((first, 4), (second, 8)):
        monkeypatch.setitem(sys.modules, "wandb", stub)
        train(tiny_config(steps, "writers=wandb", "preview_every=4"), run, resume=True, display=QUIET)
    assert first.opened["id"] == second.opened["id"] == json.loads((run / "trackers.json").read_text())["run_id"]
    assert first.opened["resume"] == "allow"
    assert first.opened["config"]["recipe"] == "mnist"
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert [step for step, values in first.rows if "loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in second.rows if "loss" in values] == [6, 7, 8]  # 5 and before are there already
    assert [step for step, values in first.rows if "samples" in values] == [4]
    assert any("validation_loss" in values for _, values in first.rows)
    assert any("timing/images_per_second" in values for _, values in first.rows)
    assert not (run / "tensorboard").exists()


def test_a_failed_run_is_marked(tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(writers_module, "find_spec", lambda name: True)
    monkeypatch.setattr("smalti.training.loop._Run.until_done", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_config(1, "writers=wandb"), tmp_path / "run", display=QUIET)
    assert stub.exit_code == 1


def test_failures_are_said_once_and_change_no_byte(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no route to host\nsecond line")

    never_opens, breaks_later = types.SimpleNamespace(init=broken, Image=None, Settings=Stub.Settings), Stub()
    breaks_later.log = breaks_later.finish = broken
    train(tiny_config(4, "writers="), tmp_path / "plain", display=QUIET)
    monkeypatch.setattr(writers_module, "find_spec", lambda name: True)
    for name, stub in (("first", never_opens), ("later", breaks_later)):
        monkeypatch.setitem(sys.modules, "wandb", stub)
        capsys.readouterr()
        train(tiny_config(4, "writers=wandb"), tmp_path / name, display=QUIET)
        said = capsys.readouterr().out
        assert said.count("warning: wandb does not record: no route to host; training goes on") == 1
        assert "second line" not in said
        assert final_bytes(tmp_path / name) == final_bytes(tmp_path / "plain")
    assert len(list_checkpoints(tmp_path / "later" / "checkpoints")) == 2


def test_ctrl_c_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UnfailingWriter("wandb", interrupted, print)


def test_tensorboard_reads_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path)
    (killed,) = open_writers(tiny_config(1), folder, 0, print)
    killed.scalars(2, {"loss": 0.5})
    killed.scalars(3, {"loss": 9.0})  # of a step that is taken again
    (board,) = open_writers(tiny_config(1), folder, 3, print)
    board.scalars(3, {"loss": 0.25})
    board.picture(3, np.zeros((4, 6), dtype=np.uint8))
    board.picture(4, np.zeros((4, 6, 3), dtype=np.uint8))
    board.close(failed=False)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 0.5), (3, 0.25)]
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(3, 6, 4), (4, 6, 4)]


def test_the_id_is_kept_and_a_damaged_file_gives_a_new_one(tmp_path):
    folder = RunFolder(tmp_path)
    first = tracker_run_id(folder)
    assert tracker_run_id(folder) == first
    folder.trackers.write_text("{")
    second = tracker_run_id(folder)
    assert second != first
    assert tracker_run_id(folder) == second


def trained(out, steps, writer, **environment):
    command = [sys.executable, "-m", "smalti", "train", "mnist", "--steps", str(steps), "--out", str(out), "--resume"]
    settings = ["--set", *TINY, "preview_every=4", "compile=false", f"writers={writer}"]
    result = subprocess.run(
        [*command, *settings], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_itself_offline(tmp_path):
    run = tmp_path / "run"
    for steps in (4, 6):
        said = trained(run, steps, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
        assert "does not record" not in said
    run_id = json.loads((run / "trackers.json").read_text())["run_id"]
    first, second = sorted((run / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    for log in (first, second):
        assert b"gradient_norm" in log.read_bytes()
        assert b"images_per_second" in log.read_bytes()
        assert b"validation_loss_t0" in log.read_bytes()
        assert list(log.parent.glob("files/media/images/samples_*.png"))


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_itself(tmp_path):
    run = tmp_path / "run"
    for steps in (4, 6):
        said = trained(run, steps, "trackio", TRACKIO_DIR=str(tmp_path / "database"), TRACKIO_PROJECT="ours")
        assert "does not record" not in said
    run_id = json.loads((run / "trackers.json").read_text())["run_id"]
    with sqlite3.connect(tmp_path / "database" / "ours.db") as database:
        rows = [(n, s, json.loads(m)) for n, s, m in database.execute("select run_name, step, metrics from metrics")]
    assert {name for name, _, _ in rows} == {f"run-{run_id}"}
    assert [step for _, step, values in rows if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for _, step, values in rows if "samples" in values] == [4, 6]
    (loss,) = (values["loss"] for _, step, values in rows if step == 5 and "loss" in values)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert loss == next(row["loss"] for row in logged if row["step"] == 5 and "loss" in row)
