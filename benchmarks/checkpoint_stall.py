"""What a checkpoint costs the steps beside which it is written: in the background, and in the foreground.

    python benchmarks/checkpoint_stall.py [--case digits] [--batch-size 64] [--rounds 10] [--save-every 8]

Steps of `smalti train`'s own functions, in rounds of `save_every`: rounds without a save, with one in the background
and with one in the foreground take turns. blocked: how long begin() keeps the step waiting; the rest of what a round
loses goes to the thread that writes, which takes a core.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from timing import machine, write_row

from smalti.config import apply_overrides
from smalti.data.rows import PicturesInMemory
from smalti.diffusion.processes import make_process
from smalti.models.dit import dit_presets
from smalti.recipes import recipe
from smalti.training.batch import training_batch
from smalti.training.memory import keep_freed_memory
from smalti.training.parallel import Ranks
from smalti.training.saving import CheckpointWriter
from smalti.training.state import new_state
from smalti.training.step import clip_gradients, compute_gradients, update_weights

MODELS = {"digits": recipe("mnist").model, "dit-s-2": replace(dit_presets()["DiT-S/2"], learn_sigma=False)}


def main(
    case: Literal["digits", "dit-s-2"] = "digits",
    batch_size: int = 64,
    rounds: int = 10,
    save_every: int = 8,
    threads: int = 2,
    folder: Path | None = None,
) -> None:
    """Measure and append a row to benchmarks/results/checkpoint_stall.jsonl. folder: the disk to write to."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    config = replace(
        apply_overrides(recipe("mnist"), [f"batch_size={batch_size}", "optimizer=adamw", "precision=float32"]),
        model=MODELS[case],
    )
    shape = (config.model.in_channels, *config.model.image_size)
    pictures = torch.randint(0, 256, (512, *shape), dtype=torch.uint8)
    rows = PicturesInMemory(pictures, torch.randint(0, 10, (512,)))
    state, process = new_state(config, torch.device("cpu")), make_process(config.process)

    def step() -> None:
        batch = training_batch(config, process, (rows,), state.step)
        compute_gradients(config, process, state, state.model, [batch])
        clip_gradients(config, state)
        update_weights(config, state, 0.0)
        state.step += 1

    seconds: dict[str, list[float]] = {"none": [], "background": [], "foreground": []}
    blocked: list[float] = []
    with tempfile.TemporaryDirectory(dir=folder) as disk:
        writer = CheckpointWriter(Path(disk), 1, Ranks(), sharded=False)
        for _ in range(2):
            step()
        for _ in range(rounds):
            for name, spent in seconds.items():
                started = time.perf_counter()
                if name != "none":
                    writer.begin(state, {})
                if name == "background":
                    blocked.append(time.perf_counter() - started)
                if name == "foreground":
                    writer.wait()
                for _ in range(save_every):
                    step()
                spent.append(time.perf_counter() - started)
                writer.wait()
                assert writer.failure is None
    one_step = statistics.median(seconds["none"]) / save_every
    write_row(
        "checkpoint_stall",
        {
            "case": case,
            "batch_size": batch_size,
            "rounds": rounds,
            "save_every": save_every,
            **machine(threads),
            "parameters": sum(p.numel() for p in state.parameters),
            "step_seconds": round(one_step, 4),
            "blocked_seconds": round(statistics.median(blocked), 4),
            "blocked_share_of_a_step": round(statistics.median(blocked) / one_step, 4),
            "slowdown_of_a_round": {
                name: round(statistics.median(seconds[name]) / statistics.median(seconds["none"]) - 1, 4)
                for name in ("background", "foreground")
            },
        },
    )


if __name__ == "__main__":
    tyro.cli(main)
