"""The planner against what is then measured: time of the digits recipe, memory of a DiT-B/4 step.

    python benchmarks/planner.py [--steps 300] [--threads 2]

Time: `smalti plan --recipe mnist`'s, which times 30 steps, then the wall time of `smalti train mnist --steps N`, from
the start of the process to its end. Memory: a fresh process makes the training state and takes two steps of random
latents with the loop's own functions, the last one logged; its resident set's highest minus what it was before the
state was made. Beside it stands the plan, by part, at the plan's peak. Writes benchmarks/results/planner.json.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timing import machine

from smalti.comparison.memory import peak_memory
from smalti.config import Budget, RunConfig
from smalti.diffusion.processes import make_process
from smalti.recipes import recipe
from smalti.run_folder import RunFolder, read_record, write_json
from smalti.scaling.accelerators import parse_devices
from smalti.scaling.measured_training import measure_training
from smalti.scaling.planned_config import planned_config
from smalti.scaling.planner import Amount, plan_run
from smalti.scaling.step_memory import STEP_MOMENTS
from smalti.training.batch import Batch
from smalti.training.memory import keep_freed_memory
from smalti.training.state import new_state
from smalti.training.step import clip_gradients, compute_gradients, squared_sizes, update_weights, weights_copy
from smalti.types import Condition

_STEPS = 2  # of each memory measurement: the first makes the optimiser's state


def digits_time(steps: int, threads: int) -> dict[str, Any]:
    """The digits recipe's planned and measured seconds."""
    config = replace(recipe("mnist"), budget=Budget("steps", float(steps)))
    devices, amount = parse_devices("cpu"), Amount(steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        measured = measure_training(config, Path(folder) / "measured")
        measuring = time.perf_counter() - began
        planned = plan_run(config, devices, amount, measured=measured)
        estimated = plan_run(config, devices, amount)
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "smalti", "train", "mnist", "--steps", str(steps), "--out", str(run)]
        began = time.perf_counter()
        subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        training = read_record(RunFolder(run))["seconds"]
    return {
        "recipe": "mnist",
        "steps": steps,
        "seconds_measuring": round(measuring, 2),
        "planned_seconds": round(planned.seconds, 2),
        "measured_seconds": round(seconds, 2),
        "planned_over_measured": round(planned.seconds / seconds, 3),
        "measured_seconds_since_first_step": training,
        "estimated_seconds_without_measuring": round(estimated.seconds, 2),
        "estimated_over_measured": round(estimated.seconds / seconds, 3),
        "parts": {name: round(value, 4) for name, value in asdict(measured).items()},
    }


def _take_steps(connection: Connection, config: RunConfig, threads: int) -> None:
    """In a process of its own: train a few steps; sends the resident set before, and how far it grew."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model, rows = config.model, config.loop.batch_size
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with peak_memory() as peak:
        state, process = new_state(config, torch.device("cpu")), make_process(config.process)
        x0, eps = (torch.randn(rows, model.in_channels, *model.image_size) for _ in range(2))
        cond = Condition(class_labels=torch.arange(rows) % 10)
        batch = Batch(x0, eps, torch.linspace(0.05, 0.95, rows, dtype=torch.float64), cond)
        for step in range(_STEPS):
            compute_gradients(config, process, state, state.model, [batch])
            clip_gradients(config, state)
            before = weights_copy(state) if step == _STEPS - 1 else None
            update_weights(config, state, 0.5)
            if before is not None:
                squared_sizes(state, before)
                del before
    connection.send((resident, peak.bytes))


def step_memory_row(model: str, batch_size: int, precision: Any, optimizer: str, threads: int) -> dict[str, Any]:
    """A step's planned and measured memory, in bytes."""
    config = planned_config(model)
    if optimizer == "muon":
        config = replace(config, optimizer=recipe("mnist").optimizer)
    config = replace(config, loop=replace(config.loop, batch_size=batch_size, precision=precision))
    plan = plan_run(config, parse_devices("cpu"), Amount(steps=1))
    moment = max(STEP_MOMENTS, key=lambda name: plan.peaks[name].total)
    parts = plan.peaks[moment]
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_take_steps, args=(theirs, config, threads))
    process.start()
    resident, grown = ours.recv()
    process.join()
    planned = parts.total - parts.framework
    return {
        "model": model,
        "batch_size": batch_size,
        "precision": precision,
        "optimizer": optimizer,
        "planned_peak": moment,
        "planned_bytes": planned,
        "measured_bytes": grown,
        "planned_over_measured": round(planned / grown, 3),
        "planned_framework": parts.framework,
        "measured_framework": resident,
        "with_framework": round(parts.total / (grown + resident), 3),
        "parts": asdict(parts),
    }


_CASES = ("float32,16", "float32,32", "bfloat16,32")


def main(
    steps: int = 300,
    threads: int = 2,
    time_only: bool = False,
    memory_only: bool = False,
    cases: tuple[str, ...] = _CASES,
    model: str = "dit-b-4",
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> None:
    """Measure, writing the file after each; a row that is not measured again stays. cases: PRECISION,BATCH."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    path = Path(__file__).parent / "results" / "planner.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows |= machine(threads)

    def keep(topic: str, row: dict[str, Any], key: tuple[str, ...]) -> None:
        others = [old for old in rows.get(topic, []) if any(old[name] != row[name] for name in key)]
        rows[topic] = [*others, row]
        write_json(path, rows)
        print(json.dumps(row, indent=1), flush=True)

    if not memory_only:
        keep("time", digits_time(steps, threads), ("steps",))
    if not time_only:
        for case in cases:
            precision, batch_size = case.split(",")
            row = step_memory_row(model, int(batch_size), precision, optimizer, threads)
            keep("memory", row, ("model", "batch_size", "precision", "optimizer"))


if __name__ == "__main__":
    tyro.cli(main)
