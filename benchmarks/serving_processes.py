"""The servers of serving.py as processes: how each is started, when it is ready, what it has used, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

_PEERS = Path(__file__).parent / "serving_peers.py"
_PATIENCE = 600.0  # seconds; a compiled server warms up for minutes


@dataclass(frozen=True)
class ServerKind:
    """A server by name. command: what starts it, behind the interpreter. path: what draws. ready: what says so, and
    of how many workers, where it tells.
    """

    name: str
    command: tuple[str, ...]
    path: str
    ready: str
    workers: int | None = None

    @property
    def is_smalti(self) -> bool:
        """Whether it is smalti's own, which has metrics."""
        return self.path.startswith("/v1/")


def peer(name: str, kind: str, exported: Path, *options: str) -> ServerKind:
    """A diffusers pipeline behind a server of serving_peers.py; kind and options as there."""
    command = (str(_PEERS), kind, str(exported), "{port}", *options)
    return ServerKind(name, command, "/predict", "/health")


def smalti_server(name: str, run: Path, workers: int, threads: int, *options: str) -> ServerKind:
    """`smalti serve RUN` with so many workers of so many threads and other options.

    Its store of jobs lies in the server's own folder.
    """
    command = ("-m", "smalti", "serve", str(run), "--port", "{port}", "--store", "{folder}/jobs.sqlite", "--no-ui")
    processes = (f"--workers={workers}", f"--threads={threads}")
    return ServerKind(name, (*command, *processes, *options), "/v1/images/generations", "/readyz", workers)


@dataclass(frozen=True)
class Usage:
    """A moment, and the seconds of processor time used until then: by a server, by its first process, by the machine.

    ticks, rows: forwards of a smalti server, and the rows in them.
    """

    moment: float
    server: float
    parent: float
    machine: float
    ticks: float
    rows: float

    def since(self, before: "Usage") -> "Usage":
        """What was used between two moments."""
        return Usage(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


class RunningServer:
    """A server that has been started. folder: for its log and what else it keeps."""

    def __init__(self, kind: ServerKind, folder: Path) -> None:
        self.kind = kind
        self._log = folder / "log"
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        command = [part.replace("{port}", str(self.port)).replace("{folder}", str(folder)) for part in kind.command]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
        self._began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> float:
        """Seconds from its start until it answered. Raises RuntimeError, with its log, where it ends before."""
        while time.perf_counter() - self._began < _PATIENCE:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.kind.name} ended:\n{self._log.read_text()[-4000:]}")
            if self._is_ready():
                return time.perf_counter() - self._began
            time.sleep(0.1)
        raise RuntimeError(f"{self.kind.name} is not ready after {_PATIENCE:.0f} s:\n{self._log.read_text()[-4000:]}")

    def _is_ready(self) -> bool:
        try:
            answer = self.get(self.kind.ready)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return self.kind.workers is None or sum(json.loads(answer)["ready_workers"].values()) == self.kind.workers

    def get(self, path: str) -> bytes:
        """What it answers to GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return bytes(answer.read())

    def draw(self, body: str) -> bytes:
        """Its answer to one request to draw."""
        url, headers = f"http://127.0.0.1:{self.port}{self.kind.path}", {"content-type": "application/json"}
        request = urllib.request.Request(url, body.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def usage(self) -> "Usage":
        """What has been used until now."""
        main = psutil.Process(self._process.pid)
        processes = [process.cpu_times() for process in (main, *main.children(recursive=True))]
        seconds = [times.user + times.system for times in processes]
        ticks, rows = self._ticks_and_rows() if self.kind.is_smalti else (0.0, 0.0)
        whole = psutil.cpu_times()
        machine = whole.user + whole.nice + whole.system + whole.irq + whole.softirq
        return Usage(time.perf_counter(), sum(seconds), seconds[0], machine, ticks, rows)

    def _ticks_and_rows(self) -> tuple[float, float]:
        text = self.get("/metrics").decode()
        return _metric(text, "smalti_ticks_total"), _metric(text, "smalti_rows_total")

    def pause(self) -> None:
        """Stop its processes where they are. Not smalti's: a parent that was away takes its workers for hung."""
        self._signal_all(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let paused processes run."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        if not self.kind.is_smalti:
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it and all of its processes."""
        if self._process.poll() is not None:
            return
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self.go_on()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in psutil.wait_procs(processes, timeout=2)[1]:
            process.kill()


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"no {name} in the metrics"
    return float(found[1])


def send_load(server: RunningServer, seconds: float, streams: list[dict[str, object]], until: str | None) -> dict:
    """What serving_load.py reports of streams sent to a server."""
    load = {
        "host": "127.0.0.1",
        "port": server.port,
        "path": server.kind.path,
        "seconds": seconds,
        "streams": streams,
        "until": until,
    }
    script = Path(__file__).parent / "serving_load.py"
    done = subprocess.run([sys.executable, str(script)], input=json.dumps(load).encode(), stdout=-1, check=True)
    return json.loads(done.stdout)
