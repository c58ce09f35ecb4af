"""The arguments of `smalti mup ...`; the docstrings are what `smalti mup COMMAND --help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand


@dataclass(frozen=True)
class _WidthStudy:
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")] = "mnist"
    """A recipe whose network is a DiT, an MM-DiT or a U-ViT."""
    base_width: int = 64
    """muP's base width, at which both parametrisations are the same."""
    keep_heads: bool = False
    """Let heads grow wider instead of more (the width of a head then changes, and muP scales the logits)."""
    set: tuple[str, ...] = ()
    """Config fields as field=value, as for `smalti train`. The optimiser is AdamW unless set."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class MuPCoordCheck(_WidthStudy):
    """Train networks of several widths for a few steps and measure their activations: under muP their size, and how far
    training moves them, does not depend on the width.

    Example: smalti mup coord-check mnist --widths 64 128 256 512 --steps 10 --out runs/mup-coordinates

    Writes coord-check.json and coord-check.png and prints the slopes of log size against log width. Exits with 1 where
    muP's are not flat.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Widths of the networks."""
    steps: int = 10
    """Training steps before the measurement."""
    learning_rate: float = 2**-8
    """At the base width; under the standard parametrisation at every width."""
    seeds: int = 3
    """Networks that each size is the mean of."""
    out: Path = Path("runs/mup-coordinates")
    """The folder to write."""


@dataclass(frozen=True)
class MuPTransfer(_WidthStudy):
    """Measure loss against learning rate at several widths, under the standard parametrisation and muP: does the best
    rate of the narrow network serve the wide one?

    Example: smalti mup transfer mnist --widths 64 128 256 --steps 300 --out runs/mup-transfer

    Each cell is a run of its own; its result is kept in results.jsonl. A study that was stopped goes on with the same
    command, and a second process with the same --out takes cells that the first has not. Writes transfer.json and
    transfer.png. The loss is the validation loss at fixed t and noise of the mean of about the last ten steps' weights.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    """Widths of the networks."""
    learning_rates: tuple[float, ...] = tuple(2.0**-k for k in range(10, 3, -1))
    """Learning rates, at the base width."""
    steps: int = 300
    """Steps of each run, with the recipe's schedule."""
    seeds: int = 1
    """Runs that each loss is the mean of."""
    max_cells: int | None = None
    """Stop after so many runs; the same command goes on."""
    out: Path = Path("runs/mup-transfer")
    """The folder to write."""


@dataclass(frozen=True)
class Mup:
    """muP, with which a learning rate found on a narrow network serves a wide one: check it, and measure it.

    Examples: smalti mup coord-check mnist
              smalti mup transfer mnist --widths 64 128 256
              smalti train mnist --set parametrisation=mup base_width=64 model.width=256 num_heads=8

    docs/mup.md has the rules for each layer.
    """

    command: Annotated[MuPCoordCheck, subcommand("coord-check")] | Annotated[MuPTransfer, subcommand("transfer")]
