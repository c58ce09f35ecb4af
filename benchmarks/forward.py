"""A forward of each architecture: smalti's network against diffusers' class with the same weights and inputs.

    python benchmarks/forward.py [--cases dit-s-2 flux] [--batch-sizes 1 8] [--rounds 15] [--compile] [--threads 2]

Each candidate lives in a process of its own and they take turns; the outputs are compared first. Float32, inference
mode, sizes that a CPU runs in a fraction of a second (forward_cases.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import tyro
from forward_cases import CASES, randomised
from rich.console import Console
from rich.table import Table
from timing import interleaved, machine, write_row
from torch import Tensor, nn

import smalti


def _maybe_compiled(module: nn.Module, compiled: bool) -> Any:
    return torch.compile(module) if compiled else module


def theirs(name: str, batch_size: int, compiled: bool) -> Callable[[], Tensor]:
    """One forward of diffusers' class."""
    case = CASES[name]
    inputs = case.inputs(batch_size)
    network = _maybe_compiled(randomised(case.reference()), compiled)
    return torch.inference_mode()(lambda: case.call(network, inputs))


def ours(name: str, batch_size: int, compiled: bool) -> Callable[[], Tensor]:
    """One forward of ours with its weights."""
    case = CASES[name]
    x, t, cond = case.inputs(batch_size)
    network = _maybe_compiled(smalti.load_backbone(randomised(case.reference())), compiled)
    return torch.inference_mode()(lambda: network(x, t, cond))


def main(
    cases: tuple[str, ...] = tuple(CASES),
    batch_sizes: tuple[int, ...] = (1, 8),
    rounds: int = 15,
    compile: bool = False,
    threads: int = 2,
) -> None:
    """Measure, print a table and append a row a case and batch size to benchmarks/results/forward.jsonl."""
    table = Table("case", "batch", "way", "diffusers", "smalti", "ratio", "ratio of fastest")
    for name in cases:
        for batch_size in batch_sizes:
            expected, output = theirs(name, batch_size, False)(), ours(name, batch_size, False)()
            assert (output - expected).abs().max() <= 1e-5 * expected.abs().max(), f"{name}: other outputs"
            results: dict[str, dict[str, float]] = {}
            for compiled in (False, True) if compile else (False,):
                seconds = interleaved(
                    {
                        "diffusers": partial(theirs, name, batch_size, compiled),
                        "smalti": partial(ours, name, batch_size, compiled),
                    },
                    rounds,
                    threads,
                )
                them, us = seconds["diffusers"], seconds["smalti"]
                way = "compiled" if compiled else "eager"
                results[way] = {
                    "diffusers_seconds": round(them["median"], 5),
                    "smalti_seconds": round(us["median"], 5),
                    "ratio": round(them["median"] / us["median"], 3),
                    "ratio_fastest": round(them["fastest"] / us["fastest"], 3),
                }
                row = results[way]
                table.add_row(
                    name, str(batch_size), way, f"{1e3 * row['diffusers_seconds']:.1f} ms",
                    f"{1e3 * row['smalti_seconds']:.1f} ms", f"{row['ratio']:.2f}", f"{row['ratio_fastest']:.2f}",
                )  # fmt: skip
            setting = {"case": name, "batch_size": batch_size, "rounds": rounds, "diffusers": diffusers.__version__}
            write_row("forward", {**setting, **machine(threads), "results": results})
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
