"""A study that is killed, shared and failed in: nothing that had finished is lost, and nothing is done twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scaling_studies import BUDGET, InThisProcess, tiny_spec

from smalti.config import to_json
from smalti.errors import UserError
from smalti.run_folder import read_rows, write_json
from smalti.scaling import sweep
from smalti.scaling.budget import StudyBudget
from smalti.scaling.executors import Ended
from smalti.scaling.sweep import open_study, read_study, run_study

pytestmark = pytest.mark.alone
DRIVER = Path(__file__).with_name("scaling_studies.py")


def quiet(text):
    """Says nothing."""


def trained(loss):
    """The result of a run."""
    return {"status": "finished", "loss": loss, "seconds": 1.0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The rows of the tiny study, run in this process from beginning to end, by key."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study") / "whole"
    study = open_study(tiny_spec(), folder, BUDGET, InThisProcess(), say=quiet)
    assert run_study(study, InThisProcess(), say=quiet)
    return {row["key"]: row for row in study.rows()}


def start_driver(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip


def children_of(pid):
    """The processes that train: those of a driver's children that run spawned code and not the resource tracker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rsplit(")", 1)[1].split()[1]) == pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return found


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("it did not come")


def spec_file(folder):
    """The tiny study as a user's own."""
    path = folder / "tiny.json"
    write_json(path, to_json(tiny_spec()))
    return path


COMMAND = [sys.executable, "-m", "smalti", "scaling", "run"]
# Ray listens on every address: in a network of its own, with process ids of its own, so that nothing outlives the test.
ALONE = ["unshare", "-rnpf", "--kill-child", "--mount-proc"]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(uninterrupted, tmp_path):
    results = tmp_path / "study" / "results.jsonl"
    command = [*COMMAND, str(spec_file(tmp_path)), "--budget", f"{BUDGET.amount:g}", "--jobs", "1"]
    command += ["--out", str(tmp_path / "study")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: read_rows(results) and children_of(running.pid), running)
    running.terminate()
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    before = read_rows(results)
    again = subprocess.run([*command, "--max-runs", "1"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "more runs are left" in again.stdout
    rows = read_rows(results)
    assert rows[: len(before)] == before
    assert len(rows) == len(before) + 1
    for row in rows:
        assert comparable(row) == comparable(uninterrupted[row["key"]])


@pytest.mark.slow
def test_on_a_ray_cluster_runs_are_the_same(uninterrupted, tmp_path):
    pytest.importorskip("ray")
    if not all(map(shutil.which, ("unshare", "ip"))) or subprocess.run([*ALONE, "true"]).returncode:
        pytest.skip("the kernel lets this user have no network namespace")
    # Sockets' paths have room for about a hundred letters.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        run = [*COMMAND, str(spec_file(tmp_path)), "--budget", f"{BUDGET.amount:g}", "--ray", "--max-runs", "2"]
        command = [*ALONE, "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *run, "--out", str(tmp_path / "study")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "study" / "results.jsonl")
    assert len(rows) == 2, done.stdout
    for row in rows:
        assert comparable(row) == comparable(uninterrupted[row["key"]])


def comparable(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.slow
def test_kills_and_a_second_sweep_change_no_result(uninterrupted, tmp_path):
    folder = tmp_path / "study"
    results = folder / "results.jsonl"
    first = start_driver(folder)
    wait_for(lambda: len(read_rows(results)) >= 1 and children_of(first.pid), first)
    orphans = children_of(first.pid)
    first.kill()
    first.wait()
    first.stdout.close()
    kept = {row["key"] for row in read_rows(results)}
    wait_until_gone = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < wait_until_gone:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)  # they died with the sweep

    second, third = start_driver(folder), start_driver(folder)
    wait_for(lambda: children_of(second.pid), second)
    victim = children_of(second.pid)[0]
    os.kill(victim, signal.SIGKILL)
    said = [process.communicate(timeout=240)[0] for process in (second, third)]
    assert all(text.strip().endswith("complete") for text in said), said
    assert "signal SIGKILL: going on with it" in said[0]

    rows = read_rows(results)
    assert Counter(row["key"] for row in rows) == dict.fromkeys(uninterrupted, 1)
    assert kept <= {row["key"] for row in rows}
    for row in rows:
        assert comparable(row) == comparable(uninterrupted[row["key"]])


def test_a_finished_study_does_nothing_more(uninterrupted, tmp_path):
    executor = InThisProcess(answers={width: trained(1.0 / width) for width in (16, 24, 32, 40)})
    study = open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    assert run_study(study, executor, say=quiet)
    begun = len(executor.started)
    assert begun == len(study.rows())
    again = InThisProcess()
    assert run_study(read_study(tmp_path / "study"), again, say=quiet)
    assert not again.started


def test_failed_and_diverged_runs_are_kept_as_such_and_the_study_goes_on(tmp_path):
    answers = {
        16: {"status": "diverged", "error": "the loss was not finite"},
        24: trained(0.3),
        32: Ended(None, "its process ended by signal SIGKILL"),
        40: trained(0.4),
    }
    executor, said = InThisProcess(answers=answers), []
    study = open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    assert run_study(study, executor, say=said.append)
    by_width = {row["width"]: row for row in study.rows() if row["slice"] == 0}
    assert by_width[16]["status"] == "diverged"
    assert by_width[24]["status"] == "finished"
    assert by_width[32]["status"] == "failed"
    assert "3 times" in by_width[32]["error"]
    assert sum("going on with it" in text for text in said) == 2 * sum(row["width"] == 32 for row in study.rows())


@dataclass(frozen=True)
class Endless:
    """A task that never ends by itself."""

    stopped: list

    def ended(self):
        return None

    def stop(self):
        self.stopped.append(True)


def test_a_run_that_takes_far_longer_than_planned_is_stopped_and_kept_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_LEAST_PATIENCE", 0.5)
    stopped = []

    class Hanging(InThisProcess):
        def start(self, task):
            return Endless(stopped) if task.config.model.width == 32 else super().start(task)

    answers = {width: trained(width / 1000) for width in (16, 24, 32, 40)}
    executor = Hanging(answers=answers)
    study = open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    plan = tmp_path / "study" / "plan.json"
    times = {"flops": [1.0, 2.0], "seconds": [1e-12, 2e-12], "run_seconds": 0.01}
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "times": times}))
    with pytest.raises(UserError, match="give_up=1 must be above 1"):
        run_study(study, executor, give_up=1.0, say=quiet)
    assert run_study(study, executor, give_up=2.0, say=quiet)
    rows = [row for row in study.rows() if row["width"] == 32]
    assert rows
    assert len(stopped) == len(rows)
    assert {row["status"] for row in rows} == {"stopped"}
    assert "more than it was to be given" in rows[0]["error"]


def test_max_runs_stops_early_and_the_next_call_goes_on(tmp_path):
    executor = InThisProcess(answers={width: trained(width / 1000) for width in (16, 24, 32, 40)})
    study = open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    assert not run_study(study, executor, max_runs=2, say=quiet)
    assert len(study.rows()) == 2
    assert run_study(study, executor, say=quiet)


def test_a_torn_last_row_is_run_again(uninterrupted, tmp_path):
    executor = InThisProcess(answers={width: trained(width / 1000) for width in (16, 24, 32, 40)})
    study = open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    assert run_study(study, executor, say=quiet)
    results = tmp_path / "study" / "results.jsonl"
    text = results.read_text()
    results.write_text(text[:-30])
    again = InThisProcess(answers=executor.answers)
    assert run_study(study, again, say=quiet)
    assert len(again.started) == 1
    assert len(study.rows()) == len(text.splitlines())


def test_pictures_of_the_best_runs_are_judged(tmp_path, monkeypatch):
    """Scorings are wanted of the best run of each complete slice and of the held-out one, and of no other."""
    scored = {"fd": {"value": 1.0, "low": 0.5, "high": 2.0}, "samples": 100, "seconds": 1.0}

    class Scoring(InThisProcess):
        def start(self, task):
            width = task.config.model.width
            answer = scored if task.kind == "score" else trained(abs(width - 24) / 100 + 0.1)
            self.answers = {width: answer}
            return super().start(task)

    executor = Scoring()
    study = open_study(tiny_spec(samples=100), tmp_path / "study", BUDGET, executor, say=quiet)
    assert run_study(study, executor, say=quiet)
    scores = [row for row in study.rows() if row["kind"] == "score"]
    assert {(row["slice"], row["width"]) for row in scores if not row["held_out"]} == {(0, 24), (1, 24)}
    assert sum(row["held_out"] for row in scores) == 1


def test_another_study_in_the_folder_and_a_budget_that_is_too_small(tmp_path):
    executor = InThisProcess()
    open_study(tiny_spec(), tmp_path / "study", BUDGET, executor, say=quiet)
    with pytest.raises(UserError, match="holds another study"):
        open_study(tiny_spec(seed=1), tmp_path / "study", BUDGET, executor, say=quiet)
    with pytest.raises(UserError, match="too small: 2 slices over a 2x range of compute need at least"):
        open_study(tiny_spec(), tmp_path / "other", StudyBudget("flops", 1e6), executor, say=quiet)
    with pytest.raises(UserError, match="holds no scaling study"):
        read_study(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out"):
        open_study(tiny_spec(), tmp_path / "file" / "study", BUDGET, executor, say=quiet)
