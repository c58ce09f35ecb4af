"""Interleaved timing of several candidates, and rows with the machine they were measured on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, measured in turn round by round: median, and the fastest round.

    On a shared machine the fastest round is the one that was least disturbed; quote the ratio of both.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"median": statistics.median(s), "fastest": min(s)} for name, s in seconds.items()}


def matmul_gflops(threads: int, seconds: float = 0.5) -> float:
    """The best rate of a 1024 x 1024 float32 product on this machine, in GFLOP/s."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, 1024, 1024).unbind(0)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_row(name: str, row: dict[str, object]) -> None:
    """Append a row to benchmarks/results/NAME.jsonl and print it."""
    path = Path(__file__).parent / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
