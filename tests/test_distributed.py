"""Several ranks: the same data, noise and weights as one; and an end with a name, never a hang, when one fails."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import Ended, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import TINY, final_bytes, tiny_config

from smalti.checkpoint import newest_checkpoint
from smalti.cli_arguments import Train
from smalti.cli_options import as_arguments
from smalti.config import RunConfig
from smalti.data.digits import load_digits
from smalti.data.rows import PicturesInMemory
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.run_folder import RunFolder, read_config
from smalti.training import batch as training_batches
from smalti.training import loop as training_loop
from smalti.training.batch import training_batch
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.training.saving import restore
from smalti.training.state import new_state
from smalti.training.watch import Progress, Seen, Sign, Watch, judge, process_lives

pytestmark = pytest.mark.alone
PLAIN = ["precision=float32", "compile=false", "validate_every=1000"]


class StoppingDisplay(PlainDisplay):
    """Asks its own process to stop, as SIGTERM does, when a step is done."""

    def __init__(self, step: int) -> None:
        super().__init__(1e9)
        self._stop_at = step

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        if step == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def quiet(stop_at: int | None = None) -> PlainDisplay:
    return PlainDisplay(1e9) if stop_at is None else StoppingDisplay(stop_at)


def train_on(count: int, config: RunConfig, out: Path, stop_at: int | None = None, sharding: str = "ddp") -> None:
    """Train or go on, on so many ranks; stop_at: one step after which the run is interrupted."""
    for ended in on_ranks(
        count, lambda rank: train(config, out, resume=True, sharding=sharding, display=quiet(stop_at))
    ):
        assert ended.code == 0, ended.output


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimiser, however many ranks wrote them."""
    state = new_state(read_config(run), torch.device("cpu"))
    restore(state, newest_checkpoint(RunFolder(run).checkpoints)[0])
    named = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    return named | {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}


def largest_difference(a: Path, b: Path) -> float:
    ours, theirs = final_weights(a), final_weights(b)
    assert list(ours) == list(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# The same run


@functools.cache
def digits() -> PicturesInMemory:
    return load_digits()[0]


@settings(max_examples=12, deadline=None)
@given(
    step=st.integers(0, 10**6), seed=st.integers(0, 2**31), ranks=st.integers(1, 4), parts=st.integers(1, 4),
    stratified=st.booleans(),
)  # fmt: skip
def test_the_parts_of_ranks_and_micro_batches_are_the_whole_batch(step, seed, ranks, parts, stratified):
    config = tiny_config(1, f"batch_size={ranks * parts * 2}", f"seed={seed}", f"stratified_timesteps={stratified}")
    rows, process = [digits()], make_process(config.process)
    whole = training_batch(config, process, rows, step)
    pieces = [training_batch(config, process, rows, step, part=(i, ranks * parts)) for i in range(ranks * parts)]
    for name in ("x0", "eps", "t"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
    assert torch.equal(torch.cat([piece.cond.class_labels for piece in pieces]), whole.cond.class_labels)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_going_from_one_process_to_two_and_back_changes_no_weight(tmp_path, optimizer):
    config = tiny_config(12, *PLAIN, f"optimizer={optimizer}")
    train_on(1, config, tmp_path / "one")
    for count, stop_at in ((1, 3), (2, 7), (1, None)):
        train_on(count, config, tmp_path / "several", stop_at)
    assert largest_difference(tmp_path / "one", tmp_path / "several") < 1e-5
    assert [row["step"] for row in metrics(tmp_path / "several")] == [*range(1, 12), 12, 12]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_sharded_weights_learn_as_whole_ones(tmp_path, optimizer):
    config = tiny_config(20, *PLAIN, f"optimizer={optimizer}", "checkpoint_every=50", "validate_every=9")
    train_on(1, config, tmp_path / "one")
    train_on(2, config, tmp_path / "sharded", sharding="fsdp")
    assert largest_difference(tmp_path / "one", tmp_path / "sharded") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_checkpoint_goes_on_on_any_ranks_sharded_or_not(tmp_path, optimizer):
    config = tiny_config(20, *PLAIN, f"optimizer={optimizer}", "checkpoint_every=50", "log_every=5")
    train_on(1, config, tmp_path / "one")
    session = [(1, 3, "ddp"), (2, 7, "fsdp"), (1, 11, "ddp"), (2, 14, "fsdp"), (2, None, "ddp")]
    for count, stop_at, sharding in session:
        train_on(count, config, tmp_path / "mixed", stop_at, sharding)
    assert largest_difference(tmp_path / "one", tmp_path / "mixed") < 1e-5


def test_micro_batches_and_ranks_change_no_weight(tmp_path):
    config = tiny_config(6, *PLAIN)
    train_on(1, config, tmp_path / "whole")
    for ranks, parts in ((1, 2), (1, 4), (2, 1), (2, 2), (2, 4)):
        out = tmp_path / f"{ranks}-{parts}"
        train_on(ranks, tiny_config(6, *PLAIN, f"gradient_accumulation_steps={parts}"), out)
        assert largest_difference(tmp_path / "whole", out) < 1e-5, (ranks, parts)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_held_out_rows_that_do_not_divide_over_ranks_have_the_loss_of_one(tmp_path, monkeypatch, rows, sharding):
    monkeypatch.setattr(training_batches, "VALIDATION_ROWS", rows)
    config = tiny_config(2, *PLAIN, "validate_every=1", "batch_size=12")
    train_on(1, config, tmp_path / "one")
    train_on(4 if sharding == "ddp" else 2, config, tmp_path / "several", sharding=sharding)
    one, several = metrics(tmp_path / "one"), metrics(tmp_path / "several")
    assert [sorted(row) for row in one] == [sorted(row) for row in several]
    for ours, theirs in zip(one, several, strict=True):
        assert all(ours[name] == pytest.approx(theirs[name], abs=1e-5) for name in ours), (ours, theirs)


@pytest.mark.slow
def test_five_kills_of_two_ranks_change_no_byte(tmp_path):
    program = Path(__file__).parent / "kill_rounds.py"
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "40", "5", "1", "2"], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["killed"] == 5, outcome
    assert outcome["during_save"] >= 1, outcome
    assert final_bytes(tmp_path / "killed") == final_bytes(tmp_path / "whole")


# The command


def command(out: Path, *arguments: str) -> list[str]:
    tiny = [value for value in (*TINY, *PLAIN) if "warmup" not in value]
    return [
        sys.executable, "-m", "smalti", "train", "mnist", "--nproc", "2", "--threads", "2", "--out", str(out),
        "--set", *tiny, "hang_seconds=5", *arguments,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_passes_on_signals(tmp_path):
    done = subprocess.run(command(tmp_path / "a", "--steps", "5"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("trained 5 steps") == 1
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (record["ranks"], record["threads"], record["outcome"]) == (2, 1, "finished")
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, None)):
        out = tmp_path / str(code)
        started = subprocess.Popen(
            command(out, "--steps", "1000000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not list(out.glob("checkpoints/step_*")):
            assert started.poll() is None, started.communicate()
            time.sleep(0.1)
        if code is not None:
            started.send_signal(number)
            said, complained = started.communicate(timeout=60)
            assert started.returncode == code, complained
            assert complained == ""
            assert "go on with --resume" in said
            assert json.loads((out / "run.json").read_text())["outcome"] == "interrupted"
            continue
        holder = json.loads((out / ".lock-holder").read_text())["pid"]  # rank 0
        os.kill(holder, number)
        _, complained = started.communicate(timeout=60)
        assert started.returncode == 1
        first, second = complained.splitlines()
        assert f"rank 0 (process {holder} on" in first
        assert f"rank 0 (process {holder}) was ended by SIGKILL" in second


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_end_by_themselves(tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        started = subprocess.Popen(
            command(tmp_path / "run", "--steps", "1000000"), stdout=subprocess.DEVNULL, stderr=errors
        )
    while not list((tmp_path / "run").glob("checkpoints/step_*")):
        assert started.poll() is None
        time.sleep(0.1)
    first = json.loads((tmp_path / "run" / ".lock-holder").read_text())["pid"]
    started.kill()
    started.wait()
    deadline = time.monotonic() + 40
    while process_lives(first) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not process_lives(first)
    errors = ""
    while not errors and time.monotonic() < deadline:
        time.sleep(0.1)
        errors = (tmp_path / "errors").read_text()  # of the other rank
    assert errors == "smalti: the launcher that started the ranks is gone, or the first machine\n"


# Failing


def failing(tmp_path: Path, fault, *overrides: str, count: int = 2, steps: int = 12) -> tuple[list[Ended], float]:
    """Train with a fault that a rank brings about when it asks for a batch: fault(rank, step)."""
    config = tiny_config(steps, *PLAIN, "hang_seconds=3", "checkpoint_every=2", *overrides)
    began = time.monotonic()

    def act(rank: int) -> None:
        def batch(config, process, rows, step, *rest):
            fault(rank, step)
            return training_batch(config, process, rows, step, *rest)

        training_loop.training_batch = batch
        train(config, tmp_path / "run", display=quiet())

    return on_ranks(count, act, 55), time.monotonic() - began


def the_one_line(ended: list[Ended]) -> str:
    lines = [line for rank in ended for line in rank.output.splitlines() if line.startswith("smalti: ")]
    assert len(lines) == 1, [rank.output for rank in ended]
    assert not any("Traceback" in rank.output for rank in ended), [rank.output for rank in ended]
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named(tmp_path, victim):
    def fault(rank: int, step: int) -> None:
        if (rank, step) == (victim, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    ended, seconds = failing(tmp_path, fault, "batch_size=12", count=3)
    line = the_one_line(ended)
    assert f"rank {victim} (process " in line
    assert "is gone" in line
    assert 'waited for it in "the gradients of step 5"' in line
    assert [rank.code for rank in ended] == [-9 if i == victim else 1 for i in range(3)]
    assert seconds < 30
    newest, complaints = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest.step == 4 or (victim == 0 and newest.step == 2)  # it was killed while it wrote that of step 4
    assert not complaints


def test_a_rank_that_sleeps_is_named(tmp_path):
    def fault(rank: int, step: int) -> None:
        if (rank, step) == (1, 5):
            time.sleep(1000)

    ended, seconds = failing(tmp_path, fault)
    line = the_one_line(ended)
    assert "rank 1 (process " in line
    assert re.search(r'hangs: for \d s it has been in "the gradients of step 5"; rank 0 waited', line)
    assert [rank.code for rank in ended] == [1, 1]
    assert seconds < 30


def test_a_rank_that_is_stopped_is_named_and_ended(tmp_path):
    def fault(rank: int, step: int) -> None:
        if (rank, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGSTOP)

    ended, seconds = failing(tmp_path, fault)
    line = the_one_line(ended)
    assert "rank 1 (process " in line
    assert "no sign of life" in line
    assert 'rank 0 waited for it in "the gradients of step 5"' in line
    assert [rank.code for rank in ended] == [1, -9]
    assert seconds < 30


def test_a_rank_that_fails_is_named_with_its_error(tmp_path):
    def fault(rank: int, step: int) -> None:
        if (rank, step) == (1, 5):
            raise UserError("row 17 is damaged")

    ended, _ = failing(tmp_path, fault)
    assert [rank.code for rank in ended] == [1, 2]
    assert "rank 1 (process " in ended[0].output
    assert "ended: UserError: row 17 is damaged" in ended[0].output


@pytest.mark.parametrize(("delay", "waited"), [(1.5, True), (60.0, False)])
def test_slow_validation_on_the_first_rank_is_waited_for_or_named(tmp_path, delay, waited):
    config = tiny_config(4, *PLAIN, "validate_every=2", "hang_seconds=3")
    began = time.monotonic()

    def act(rank: int) -> None:
        whole = training_loop.validation_batches

        def slow(*arguments):
            for batch in whole(*arguments):
                for first in range(0, len(batch.t), 64):  # as of four sizes
                    if rank == 0:
                        time.sleep(delay)
                    yield batch.rows(first, first + 64)

        training_loop.validation_batches = slow
        train(config, tmp_path / "run", display=quiet())

    ended = on_ranks(2, act, 55)
    assert time.monotonic() - began < 45
    if waited:
        assert [rank.code for rank in ended] == [0, 0], [rank.output for rank in ended]
    else:
        assert [rank.code for rank in ended] == [1, 1]
        line = the_one_line(ended)
        assert "rank 0 (process " in line
        assert 'in "the validation of step 2"; rank 1 waited for it in "the validation of step 2"' in line


def test_a_run_directory_in_use_is_one_line_of_one_rank(tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        ended = on_ranks(2, lambda rank: train(tiny_config(2, *PLAIN), tmp_path / "run", resume=True), 40)
    assert [rank.code for rank in ended] == [2, 2], [rank.output for rank in ended]
    assert "is in use by" in the_one_line(ended)


def test_a_batch_that_does_not_divide_starts_nothing(tmp_path, capsys):
    from smalti.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["train", "mnist", "--nproc", "3", "--set", "batch_size=64", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "batch_size=64 must divide by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The watch's judgement

_SIGN = Sign(1, "box", "place", 1, 10, "the gradients of step 3", False, 0.0, 0.0)


def judged(*changes: dict, broken: bool = False):
    everyone = []
    for rank, change in enumerate(changes):
        seen = {name: change.pop(name) for name in ("silent", "alive") if name in change}
        everyone.append(Seen(rank, replace(_SIGN, **change), **{"silent": 0.0, **seen}))
    return judge(everyone, 30.0, broken)


def test_the_watch_blames_who_keeps_the_others_waiting():
    assert judged({}, {}) is None
    assert judged({"still": 500.0}, {"still": 29.0, "entered": 9}) is None
    assert judged({"still": 31.0}, {"still": 31.0, "entered": 9}).rank == 1
    assert judged({"still": 31.0, "entered": 9}, {"still": 31.0}).rank == 0
    assert judged({"still": 31.0}, {"still": 31.0}) is None  # all compute, or the network is slow
    assert judged({"still": 601.0}, {"still": 601.0}).text.startswith("no rank moves on")
    # One that computes, or compiles, gets longer.
    assert judged({}, {"still": 500.0, "computed": 100.0, "entered": 9}) is None
    assert judged({}, {"still": 500.0, "long": True, "entered": 9}) is None
    assert judged({}, {"still": 601.0, "long": True, "entered": 9}).rank == 1
    assert judged({}, {"silent": 29.0}) is None
    assert judged({}, {"silent": 31.0}).rank == 1
    assert judged({}, {"silent": 6.0}, broken=True).rank == 1
    assert judged({}, {"alive": False}).rank == 1
    # One that has ended in order, and one that has not.
    assert judged({}, {"left": "its part is done", "silent": 99.0, "alive": False}) is None
    assert judged({}, {"left": "ValueError: x", "silent": 6.0, "entered": 9}).rank == 1


def test_the_ranks_know_each_other_before_a_run_begins():
    """One that is killed in the first second is named, however the others' first looks fell."""
    store = torch.distributed.HashStore()
    late, early = (Watch(store, rank, 2, Progress(), 5.0, lambda: 0) for rank in range(2))
    waiting = threading.Thread(target=early.start)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()  # for the sign of rank 0
    late.start()
    waiting.join(5)
    assert sorted(seen.rank for seen in early._seen()) == [0, 1]
    for watch in (late, early):
        watch.leave("its part is done")


def test_a_command_and_its_arguments_are_the_same():
    import tyro

    command = Train(
        "mnist", out=Path("runs/a b"), steps=7, resume=True, set=("batch_size=8", "optimizer=adamw"), threads=2,
        sharding="fsdp",
    )  # fmt: skip
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    assert tyro.cli(Train, args=as_arguments(command), config=config) == command
