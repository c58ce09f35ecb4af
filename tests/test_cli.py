"""The real command: what a user types, what they see, and which code it exits with."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import TINY

from smalti.cli import main

SMALTI = [sys.executable, "-m", "smalti"]


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run


def called(capsys, *arguments):
    """The command in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.mark.slow
def test_a_whole_session_of_the_real_command(tmp_path):
    """Train in plain lines without a terminal, then sample with a manifest."""
    out = tmp_path / "run"
    command = [*SMALTI, "train", "mnist", "--steps", "4", "--out", str(out), "--set", *TINY]
    trained = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert trained.returncode == 0, trained.stderr
    assert "trained 4 steps" in trained.stdout
    assert "\x1b" not in trained.stdout
    assert {"config.json", "run.json", "metrics.jsonl", "checkpoints", "samples.png", "tensorboard"} <= {
        p.name for p in out.iterdir()
    }
    assert list((out / "tensorboard").glob("events*"))
    record = json.loads((out / "run.json").read_text())
    assert (record["outcome"], record["step"], record["images"]) == ("finished", 4, 32)


def test_sample_writes_pictures_grid_and_manifest_that_draw_again(run, tmp_path, capsys):
    out = tmp_path / "samples"
    code, said, _ = called(
        capsys, "sample", run, "--class-labels", 0, 1, 2, "--num-images-per-label", 2, "--solver", "dpmpp_2m",
        "--num-inference-steps", 3, "--guidance-scale", 2, "--seed", 5, "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "6 pictures" in said
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [r["class_label"] for r in rows] == [0, 0, 1, 1, 2, 2]
    assert [r["seed"] for r in rows] == list(range(5, 11))
    assert {r["guidance_scale"] for r in rows} == {2.0}
    again = tmp_path / "again"
    row = rows[3]
    code, _, _ = called(
        capsys, "sample", run, "--class-labels", row["class_label"], "--num-images-per-label", 1, "--seed", row["seed"],
        "--num-inference-steps", row["num_inference_steps"], "--guidance-scale", row["guidance_scale"], "--out", again,
    )  # fmt: skip
    assert code == 0
    first, second = (Image.open(p).tobytes() for p in (out / row["file"], again / "00000.png"))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1
    assert Image.open(out / "grid.png").size == (2 * (2 * 30 + 2), 2 * (3 * 30 + 2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean train"),
        (["train", "mnits"], "did you mean 'mnist'"),
        (["train", "mnist", "--set", "bach_size=3"], "did you mean 'batch_size'"),
        (["train", "mnist", "--set", "max_decay=0.5"], "has no effect"),
        (["train", "mnist", "--set", "patch_size=5"], "must divide by model.patch_size"),
        (["train", "mnist", "--steps", "3", "--minutes", "2"], "one budget"),
        (["train", "mnist", "--steps", "0"], "must be above 0"),
        (["train", "mnist", "--resume", "--overwrite"], "one of them"),
        (["train", "mnist", "--out", "RUN"], "--resume"),
        (["train", "mnist", "--out", "RUN", "--resume"], "has another config"),
        (["train", "mnist", "--out", "RUN/config.json"], "is a file"),
        (["train", "mnist", "--device", "cuda:99"], "--device cuda:99"),
        (["sample", "nowhere"], "there is no run at nowhere"),
        (["sample", "RUN/checkpoints"], "not a run directory"),
        (["sample", "RUN", "--class-labels", "11"], "must lie in 0 .. 9"),
        (["sample", "RUN", "--solver", "dpm"], "unknown solver 'dpm'"),
        (["sample", "RUN", "--num-inference-steps", "0"], "num_inference_steps=0"),
        (["sample", "RUN", "--solver-options", "eta=1"], "'eta' has no effect"),
        (["sample", "RUN", "--solver-options", "eta"], "name=value"),
        *(
            ([*command, "--solver-options", f"{option}=3"], f"option '{option}' has no effect on solver 'dpmpp_2m': ")
            for command in (["sample", "RUN"], ["eval", "RUN"], ["explain"])
            for option in ("seed", "process", "num_inference_steps", "nothing")
        ),
        (["explain", "--solver-options", "shift=2", "shift=3"], "shift is given twice"),
        (["explain", "--solver", "ddim", "--solver-options", "eta=much"], "eta='much' must be a number"),
        (["explain", "--solver-options", "times=3"], "times=3 must be two or more numbers"),
        (["sample", "RUN", "--strength", "0.5"], "--image"),
        (["sample", "RUN", "--image", "nowhere.png"], "--image nowhere.png"),
        (["eval", "RUN", "--process", "emd"], "edm"),
        (["eval", "RUN", "--guidance-interval", "0.9", "0.1"], "interval=(0.9, 0.1)"),
        (["eval", "nowhere"], "there is no run at nowhere"),
        (["sample", "RUN", "--process", "emd"], "edm"),
        (["tune", "RUN", "--budget", "1"], "budget=1"),
        (["ems", "RUN", "--num-images", "2"], "num_images=2 must lie in 3 .. 9000"),
        (["ems", "RUN", "--num-nodes", "1"], "num_nodes=1"),
        (["ems", "RUN", "--secant-width", "-1"], "secant_width=-1"),
        (["sample", "RUN", "--solver", "dpm_solver_v3"], "`smalti ems RUN` writes it"),
        (["sample", "RUN", "--solver", "dpm_solver_v3", "--solver-options", "ems=RUN"], "Is a directory"),
        (["sample", "RUN", "--num-images-per-label", "0"], "at least 1"),
        (["sample", "RUN", "--checkpoint", "step_7"], "no checkpoint 'step_7'"),
        (["sample", "RUN", "--seed", "-1"], "seed=-1"),
        (["eval", "RUN", "--num-images", "3"], "at least 100"),
        (["info", "mnits"], "neither a run directory nor a recipe"),
        (["explain", "--process", "vp"], "unknown process"),
    ],
)
def test_a_users_mistake_is_one_clear_line_and_code_2(run, capsys, arguments, says):
    code, _, error = called(capsys, *(a.replace("RUN", str(run)) for a in arguments))
    assert code == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["train", "mnist", "--bogus"], ["sample"], ["train", "mnist", "--steps", "x"]])
def test_flags_that_do_not_parse_exit_with_2(arguments, capsys):
    assert called(capsys, *arguments)[0] == 2


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["sample", "--help"], ["eval", "--help"]])
def test_help_teaches(arguments, capsys):
    code, said, _ = called(capsys, *arguments)
    assert code == 0
    assert "smalti " in said
    assert len(said) > 800


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell, capsys):
    code, said, _ = called(capsys, "completion", shell)
    assert code == 0
    assert "explain" in said
    assert "num-inference-steps" in said


def test_explain_prints_the_table(capsys):
    code, said, _ = called(capsys, "explain", "--solver", "dpmpp_2m", "--steps", 4, "--process", "vp_cosine")
    assert code == 0
    assert "4 network calls" in said
    assert "h1 <-" in said


def test_info_of_a_run_and_of_a_recipe(run, capsys):
    code, said, _ = called(capsys, "info", run)
    assert code == 0
    assert "finished" in said
    assert "optimizer.learning_rate" in said
    code, said, _ = called(capsys, "info", "mnist")
    assert "1,268,112" in said
    assert "82.5 MFLOP" in said


@pytest.mark.parametrize(
    ("damage", "says"), [("truncate", "is damaged"), ("flip", "is damaged"), ("remove", "is missing")]
)
def test_a_damaged_checkpoint_is_named_and_the_older_offered(run, tmp_path, capsys, damage, says):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    older, newest = sorted((copy / "checkpoints").glob("step_*"))
    victim = newest / "ema.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        content[100] ^= 4
        victim.write_bytes(content if damage == "flip" else content[:-20])
    code, _, error = called(capsys, "sample", copy, "--out", tmp_path / "s")
    assert code == 2
    assert "ema.safetensors" in error
    assert says in error
    assert older.name in error
    code, _, _ = called(
        capsys, "sample", copy, "--checkpoint", older.name, "--class-labels", 1, "--num-inference-steps", 2,
        "--out", tmp_path / "s",
    )  # fmt: skip
    assert code == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_evidence(tmp_path, capsys):
    out = tmp_path / "run"
    code, _, error = called(
        capsys, "train", "mnist", "--steps", 60, "--out", out, "--set", *TINY, "optimizer=adamw", "learning_rate=1e30",
        "warmup_steps=0", "checkpoint_every=1",
    )  # fmt: skip
    assert code == 1
    assert "batch" in error
    assert "last good state" in error
    assert (out / "failure" / "batch.safetensors").exists()


def _wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 500
    log = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps: {process.communicate()[1]}")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [*SMALTI, "train", "mnist", "--steps", "100000", "--out", str(out), "--set", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_steps(out, 5, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "--resume" in said
    step = json.loads((out / "run.json").read_text())["step"]
    assert (out / "checkpoints" / f"step_{step:08d}").is_dir()


@pytest.mark.slow
def test_a_terminal_gets_a_live_bar(tmp_path):
    """Through a real pseudo-terminal."""
    primary, secondary = pty.openpty()
    command = [*SMALTI, "train", "mnist", "--steps", "3", "--out", str(tmp_path / "run"), "--set", *TINY]
    process = subprocess.Popen(command, stdout=secondary, stderr=secondary, env={**os.environ, "TERM": "xterm"})
    os.close(secondary)
    seen = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(primary)
    assert process.wait(timeout=300) == 0
    assert b"\x1b[" in seen
    assert b"images/s" in seen


PRIVATE_MOUNTS = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


def _can_mount() -> bool:
    """Whether this machine lets a test mount a small disk that only the test sees."""
    try:
        probe = [*PRIVATE_MOUNTS, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="no private mounts here")
def test_a_really_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A disk of 1 MiB, full at the third checkpoint."""
    disk, after = tmp_path / "disk", tmp_path / "after"
    disk.mkdir()
    train_there = " ".join(
        [*SMALTI, "train mnist --steps 400 --out", str(disk / "run"), "--set", *TINY, "keep_checkpoints=20"]
    )
    script = f"mount -t tmpfs -o size=1m tmpfs {disk} && {train_there}; code=$?; ls -A {disk}/run/checkpoints > {after}"
    result = subprocess.run(
        [*PRIVATE_MOUNTS, "sh", "-c", f"{script}; exit $code"], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 1, result.stderr
    assert "No space left" in result.stderr
    assert "--resume" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    kept = after.read_text().split()
    assert len(kept) >= 2
    assert all(name.startswith("step_") for name in kept)


def test_a_read_only_place_is_the_users_mistake(tmp_path, capsys):
    place = Path("/proc/smalti-run")  # no process, root included, can make a folder there
    code, _, error = called(capsys, "train", "mnist", "--steps", 1, "--out", place)
    assert code == 2
    assert f"cannot write to --out {place}" in error


@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_depends_on_its_seed_and_label_alone(run, threads):
    """Alone, in a batch of 16 and of 64, on one thread and two: at most 1 of 255 in any pixel."""
    import smalti
    from smalti.data.rows import to_bytes

    pipe = smalti.load(run)
    torch.set_num_threads(2)
    labels = [i % 10 for i in range(64)]
    reference = to_bytes(pipe(labels, num_inference_steps=4, batch_size=64).tensor).int()
    torch.set_num_threads(threads)
    sixteen = to_bytes(pipe(labels[:16], num_inference_steps=4, batch_size=16).tensor).int()
    assert (sixteen - reference[:16]).abs().max() <= 1
    for i in (0, 7):
        alone = to_bytes(pipe([labels[i]], num_inference_steps=4, seed=[i]).tensor).int()
        assert (alone - reference[i : i + 1]).abs().max() <= 1


def test_a_pipeline_gives_the_same_from_many_threads(run):
    from concurrent.futures import ThreadPoolExecutor

    import smalti

    pipe = smalti.load(run)
    calls = [{"class_labels": [i, i + 1], "seed": i, "solver": s} for i in range(4) for s in ("dpmpp_2m", "ddpm")]
    in_turn = [pipe(**c, num_inference_steps=3).tensor for c in calls]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda c: pipe(**c, num_inference_steps=3).tensor, calls))
    assert all(torch.equal(a, b) for a, b in zip(in_turn, at_once, strict=True))


def test_a_checkpoint_of_another_network_is_refused_in_one_line(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run / "checkpoints", copy / "checkpoints")  # the config is lost
    code, _, error = called(
        capsys, "train", "mnist", "--steps", 12, "--resume", "--out", copy, "--set", *TINY, "qk_norm=false"
    )
    assert code == 2
    assert "does not fit this config" in error
    assert len(error.strip().splitlines()) == 1
