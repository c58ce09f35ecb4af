"""The arguments of `smalti plan`; the docstring is what `smalti plan --help` prints."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class Plan:
    """Say what a run will take before anything is started: operations, memory by part, hours and money.

    Examples: smalti plan --model dit-xl-2 --data 1.3M --gpu h100x8
              smalti plan --recipe mnist
              smalti plan --recipe runs/mnist --gpu l4 --steps 50K --batch-size 256

    Memory is that of the training step itself, run on tensors without values. Hours are operations over the devices'
    peak and --mfu; on this machine (--gpu cpu) a recipe is trained for a moment and timed. docs/planning.md says what
    is measured and what assumed. Exits with 1 where the memory does not suffice, and says what to change.
    """

    model: str | None = None
    """A network by its paper's name: dit-xl-2, pixart-xl-2, sd3-medium."""
    recipe: str | None = None
    """A recipe's name, or a run directory, in place of --model."""
    gpu: str = "cpu"
    """Devices, as NAMExCOUNT: h100x8, h200, a100-80, a100-40, l40s, l4, a10, t4, rtx4090, rtx3090; or cpu, this
    machine's."""
    data: str | None = None
    """Pictures in the data, such as 1.3M: what an epoch is."""
    steps: str | None = None
    """How long: optimiser steps. Give at most one of these; the default is the recipe's, for --model 400K steps."""
    images: str | None = None
    """How long: pictures seen, repeats included."""
    epochs: float | None = None
    """How long: passes over --data."""
    flops: str | None = None
    """How long: operations, such as 1e18 (of the model; a backward counts two forwards)."""
    minutes: float | None = None
    """How long: minutes of training."""
    batch_size: int | None = None
    """Pictures a step, over all devices."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Of the products."""
    optimizer: Literal["adamw", "muon", "schedule_free"] | None = None
    """Whose state is counted."""
    ema: Annotated[int | None, arg(metavar="COUNT")] = None
    """Averages of the weights: 1, or 2 (ema=post_hoc)."""
    activation_checkpointing: bool = False
    """Run each block again in the backward pass in place of keeping its insides."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several devices: all weights in each (ddp), or a part of them in each (fsdp)."""
    set: tuple[str, ...] = ()
    """Config fields as field=value, as for `smalti train`."""
    mfu: float | None = None
    """Share of the peak that the model's products reach (default: 0.35, on a CPU 0.5; see docs/planning.md)."""
    price_per_hour: float | None = None
    """Dollars for an hour of one device (default: a typical one)."""
    no_measure: bool = False
    """On this machine: estimate from the rate of matrix products, in place of training for a moment."""
    measure_steps: int = 30
    """On this machine: how many steps are timed."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    json: bool = False
    """Print JSON in place of tables; bytes, seconds and operations."""
