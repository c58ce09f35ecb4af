"""Time of 16 pictures: a masked model at 12 calls against DDPM at 1,000, and other numbers of calls, in one run.

    python benchmarks/masked_decoding.py --masked RUN --diffusion RUN [--rounds 5]

Both runs are of the digits, as `smalti train mnist-tokens` and `smalti train mnist-ddpm` (or mnist) make them. Guided
pictures take two rows of each forward. Beside the times stand the judge's accuracies, of 500 pictures each.
"""

from functools import partial
from pathlib import Path

import torch
import tyro
from timing import Step, interleaved, machine, write_row

from smalti.evaluation.judge import judge_features, load_judge
from smalti.pipeline import load

_CALLS = {"masked 4": ("masked", 4), "masked 8": ("masked", 8), "masked 12": ("masked", 12),
          "dpmpp_2m 12": ("dpmpp_2m", 12), "ddim 50": ("ddim", 50), "ddpm 1000": ("ddpm", 1000)}  # fmt: skip


def sixteen(run: Path, solver: str, calls: int) -> Step:
    """What draws 16 pictures."""
    pipe, labels = load(run), torch.arange(16) % 10
    return lambda: pipe(labels, solver=solver, num_inference_steps=calls)


def accuracy(run: Path, solver: str, calls: int, pictures: int) -> float:
    """Share of a run's pictures that the judge reads as what was asked for."""
    labels = torch.arange(pictures) % 10
    _, read = judge_features(load_judge(), load(run)(labels, solver=solver, num_inference_steps=calls).tensor)
    return float((read == labels).float().mean())


def main(masked: Path, diffusion: Path, rounds: int = 5, threads: int = 2, pictures: int = 500) -> None:
    """Measure and append a row. pictures: that accuracies are of; DDPM's, which takes minutes, is of 100."""
    runs = {"masked": masked}
    factories = {name: partial(sixteen, runs.get(solver, diffusion), solver, n) for name, (solver, n) in _CALLS.items()}
    times = interleaved(factories, rounds, threads, warmup=1)
    torch.set_num_threads(threads)
    accuracies = {
        name: round(accuracy(runs.get(solver, diffusion), solver, n, 100 if n == 1000 else pictures), 4)
        for name, (solver, n) in _CALLS.items()
    }
    ours = times["masked 12"]["median"]
    write_row(
        "masked_decoding",
        {
            "runs": {"masked": masked.name, "diffusion": diffusion.name},
            "rounds": rounds,
            **machine(threads),
            "times": times,
            "accuracy": accuracies,
            "times_masked_12": {name: round(one["median"] / ours, 2) for name, one in times.items()},
        },
    )


if __name__ == "__main__":
    tyro.cli(main)
