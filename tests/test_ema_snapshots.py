"""ema=post_hoc in a run: its snapshots, resuming, and `smalti ema`."""

import json
import shutil

import pytest
import torch
from training_runs import final_bytes, tiny_config

import smalti
from smalti.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from smalti.cli import main
from smalti.config import apply_overrides
from smalti.errors import UserError
from smalti.optim.post_hoc import PowerProfile
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.training.snapshots import reconstruct_averages, save_reconstruction, stored_averages

QUIET = PlainDisplay(1e9)


def config(steps=12, *overrides):
    return tiny_config(steps, "ema=post_hoc", "ema.snapshots=4", *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("post_hoc") / "run"
    train(config(), path, display=QUIET)
    return path


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def snapshot_bytes(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "ema_snapshots").rglob("*"))
        if path.is_file()
    }


def test_a_run_keeps_both_averages_at_even_steps(run):
    stored = [(entry.profile, entry.group) for entry in stored_averages(run)]
    assert stored == [
        (PowerProfile(width, step), group)
        for step in (3, 6, 9, 12)
        for group, width in (("ema", 0.05), ("second_ema", 0.1))
    ]
    last, newest = read_checkpoint(run / "ema_snapshots" / "step_00000012"), list_checkpoints(run / "checkpoints")[-1]
    for group in ("ema", "second_ema"):
        assert (last.folder / f"{group}.safetensors").read_bytes() == (newest / f"{group}.safetensors").read_bytes()


def test_the_first_average_is_that_of_power_alone(run, tmp_path):
    train(tiny_config(12, "ema=power"), tmp_path / "power", display=QUIET)
    assert final_bytes(run) == final_bytes(tmp_path / "power")
    train(tiny_config(12, "ema=power", "relative_std=0.1"), tmp_path / "wider", display=QUIET)
    second = (list_checkpoints(run / "checkpoints")[-1] / "second_ema.safetensors").read_bytes()
    assert second == final_bytes(tmp_path / "wider")["ema"]


@pytest.mark.parametrize("lost", [3, 6, 9])
def test_killed_and_resumed_the_snapshots_are_the_same_bytes(run, tmp_path, lost):
    """As after a kill: what a run wrote up to its last save and snapshot, and a snapshot in the making."""
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints")
    train(config(12, "keep_checkpoints=10"), tmp_path / "all", display=QUIET)  # the run's checkpoints, none pruned
    for folder in list_checkpoints(tmp_path / "all" / "checkpoints"):
        if folder.name <= f"step_{lost:08d}":
            shutil.copytree(folder, killed / "checkpoints" / folder.name)
    # Of later steps than the checkpoint: one at a step that will not be due again, as in a run by minutes.
    (killed / "ema_snapshots" / "step_00000012").rename(killed / "ema_snapshots" / "step_00000011")
    (killed / "ema_snapshots" / ".partial-step_00000010").mkdir()
    train(config(), killed, resume=True, display=QUIET)
    assert snapshot_bytes(killed) == snapshot_bytes(run)
    assert final_bytes(killed) == final_bytes(run)


def test_a_stored_average_is_reconstructed_exactly(run):
    for width, group in ((0.05, "ema"), (0.1, "second_ema")):
        for step in (6, 12):
            (made,) = reconstruct_averages(run, [width], step)
            truth = read_checkpoint(run / "ema_snapshots" / f"step_{step:08d}").tensors[group]
            assert made.tensors.keys() == truth.keys()
            assert all(torch.equal(made.tensors[name], truth[name]) for name in truth)
            assert all(made.tensors[name].dtype == truth[name].dtype for name in truth)


def test_reconstruction_is_the_average_that_a_run_of_that_width_keeps(tmp_path):
    """Of the same trajectory of weights, which does not depend on what is averaged; snapshots at every step."""
    train(config(12, "ema.snapshots=12"), tmp_path / "stored", display=QUIET)
    for width in (0.07, 0.15):
        train(tiny_config(12, "ema=power", f"relative_std={width}"), tmp_path / f"{width}", display=QUIET)
        truth = read_checkpoint(list_checkpoints(tmp_path / f"{width}" / "checkpoints")[-1], ("ema", "model"))
        (made,) = reconstruct_averages(tmp_path / "stored", [width])
        moved = sum((truth.tensors["model"][n] - t).square().sum() for n, t in truth.tensors["ema"].items()) ** 0.5
        error = sum((made.tensors[n] - t).square().sum() for n, t in truth.tensors["ema"].items()) ** 0.5
        assert error < 0.02 * moved


def test_the_command(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    picture = tmp_path / "widths.png"
    code, said, _ = called(
        capsys, "ema", run, "--relative-std", 0.07, 0.05, 0.15, "--validate", "--plot", picture, "--weights"
    )
    assert code == 0
    assert "validation loss" in said
    assert said.count("ema_0.07_step_00000012") >= 2
    assert "+0." in said
    assert picture.stat().st_size > 1000
    state = json.loads((run / "checkpoints" / "ema_0.07_step_00000012" / "state.json").read_text())["state"]
    assert sum(row["weight"] for row in state["weights"]) == pytest.approx(1)
    assert 0 < state["error"] < 0.2
    # the stored width has the loss that training measured last
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [row["validation_loss"] for row in logged if row["step"] == 12 and "validation_loss" in row]
    assert f"{trained:.5f}" in next(line for line in said.splitlines() if "│ ema_0.05_step" in line)

    assert called(capsys, "sample", run, "--checkpoint", "ema_0.07_step_00000012", "--num-images-per-label", 1,
                  "--class-labels", 3, "--out", tmp_path / "samples")[0] == 0  # fmt: skip
    with pytest.raises(CheckpointError, match="averaged weights only"):
        smalti.load(run, checkpoint="ema_0.07_step_00000012", ema=False)
    # neither the newest, nor resumed from, nor pruned
    train(config(), run, resume=True, display=QUIET)
    assert (run / "checkpoints" / "ema_0.07_step_00000012").is_dir()
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_00000009", "step_00000012"]


def test_bad_input_says_what_to_do(run, tmp_path, capsys):
    plain = tmp_path / "plain"
    train(tiny_config(1), plain, display=QUIET)
    for arguments, says in (
        ([plain], "train with --set ema=post_hoc"),
        ([tmp_path / "nowhere"], "there is no run"),
        ([run, "--step", 5], "snapshots of the steps 3, 6, 9, 12"),
        ([run, "--relative-std", 0.3], "must lie in (0, 0.28)"),
        ([run, "--relative-std", "nan"], "must lie in (0, 0.28)"),
        ([run, "--plot", "x.png"], "no effect without --validate"),
    ):
        code, _, error = called(capsys, "ema", *arguments)
        assert (code, says in error) == (2, True), error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="read only if snapshot_every is None"):
        apply_overrides(tiny_config(1), ["ema=post_hoc", "snapshot_every=5", "ema.snapshots=3"])


def test_damage_is_named(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "run")
    victim = damaged / "ema_snapshots" / "step_00000006" / "second_ema.safetensors"
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000006/second_ema\.safetensors is damaged"):
        reconstruct_averages(damaged, [0.07])


def test_every_so_many_steps(tmp_path):
    train(tiny_config(5, "ema=post_hoc", "snapshot_every=2"), tmp_path / "run", display=QUIET)
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "ema_snapshots")] == ["step_00000002", "step_00000004"]
    (made,) = reconstruct_averages(tmp_path / "run", [0.07])
    assert save_reconstruction(tmp_path / "run", made).name == "ema_0.07_step_00000004"
