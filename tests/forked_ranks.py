"""Ranks as forks of a process that has imported everything, since importing takes longer than training a few steps."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict_loader
import torch.distributed.checkpoint.state_dict_saver
import torch.distributed.fsdp
import torch.utils.tensorboard.writer  # with the others: before the fork, what a run imports later

from smalti.errors import UserError
from smalti.training.watch import RankLost, end_process


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (or minus the signal) and what it printed."""

    code: int
    output: str


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_ranks(count: int, act: Callable[[int], object], output: list[Path] | None = None) -> list[int]:
    """Fork `count` processes that call act(rank) as torchrun's ranks would; returns their process ids."""
    port, pids = free_port(), []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _become(rank, count, port, output[rank] if output else Path(os.devnull))
            _run(act, rank)
        pids.append(pid)
    return pids


def on_ranks(count: int, act: Callable[[int], object], seconds: float = 80) -> list[Ended]:
    """Run act(rank) on so many ranks to the end. Kills them all and fails after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(count)]
        pids = start_ranks(count, act, files)
        codes: dict[int, int] = {}
        deadline = time.monotonic() + seconds
        while len(codes) < count and time.monotonic() < deadline:
            for pid in set(pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        for pid in set(pids) - set(codes):
            os.kill(pid, signal.SIGUSR1)  # prints where each thread is
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        said = [path.read_text() if path.exists() else "" for path in files]
        assert len(codes) == count, f"ranks that hang: {[i for i, p in enumerate(pids) if p not in codes]}: {said}"
        return [Ended(codes[pid], text) for pid, text in zip(pids, said, strict=True)]


def _become(rank: int, count: int, port: int, path: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, number in ((sys.__stdout__, 1), (sys.__stderr__, 2)):
        os.dup2(file, number)
        stream.flush()
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    # pytest captures through objects of its own.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def _run(act: Callable[[int], object], rank: int) -> None:
    """As the command line ends: 0, 2 for a UserError, 1 for a lost rank; 3 for what should not happen."""
    code = 3
    try:
        act(rank)
        code = 0
    except UserError as error:
        if not error.told:
            print(f"smalti: {error}", file=sys.stderr)
        code = 2
    except RankLost as error:
        if not error.told:
            print(f"smalti: {error}", file=sys.stderr)
        end_process(1)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
