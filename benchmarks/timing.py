"""Interleaved timing of several candidates, and rows with the machine they were measured on."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

Step = Callable[[], object]  # one round of a candidate


def _serve_rounds(connection: Connection, factory: Callable[[], Step], threads: int) -> None:
    """In a candidate's own process: build it, then time one round for each message that comes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = factory()
    connection.send("built")
    while connection.recv() == "go":
        started = time.perf_counter()
        run()
        connection.send(time.perf_counter() - started)
    connection.send(peak_memory_mib())


def interleaved(
    factories: dict[str, Callable[[], Step]], rounds: int, threads: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, measured in turn round by round: median, and the fastest round.

    Each candidate lives in a process of its own, so that none gains from what another does to its process (allocator
    settings, thread pools); only one runs at a time. On a shared machine the fastest round is the one that was least
    disturbed; quote the ratio of both. Factories must be importable (functools.partial of a module's function).
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    for name, factory in factories.items():
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve_rounds, args=(theirs, factory, threads), daemon=True))
        processes[-1].start()
        theirs.close()
        assert ours.recv() == "built"
        connections[name] = ours

    def one_round(connection: Connection) -> float:
        connection.send("go")
        return float(connection.recv())

    for connection in connections.values():
        for _ in range(warmup):
            one_round(connection)
    seconds: dict[str, list[float]] = {name: [] for name in factories}
    for _ in track(range(rounds), "rounds", console=Console(stderr=True), transient=True):
        for name, connection in connections.items():
            seconds[name].append(one_round(connection))
    results = {}
    for name, connection in connections.items():
        connection.send("end")
        s = seconds[name]
        results[name] = {"median": statistics.median(s), "fastest": min(s), "peak_memory_mib": float(connection.recv())}
    for process in processes:
        process.join()
    return results


def peak_memory_mib() -> float:
    """The most memory that this process has held: of the GPU where it used one, else its resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def device_name(device: str) -> str:
    """What stands in a row for the device: the GPU's name, or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def machine(threads: int) -> dict[str, object]:
    """What the figures were measured on."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append_row(path: Path, row: dict[str, object], show: bool = False) -> None:
    """Append a row to a JSONL file, whose folder is made where it is missing; show: print it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if show:
        print(json.dumps(row, indent=1))


def write_row(name: str, row: dict[str, object]) -> None:
    """Append a row to benchmarks/results/NAME.jsonl and print it."""
    append_row(Path(__file__).parent / "results" / f"{name}.jsonl", row, show=True)
