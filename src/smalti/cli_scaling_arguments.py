"""The arguments of `smalti scaling ...`; the docstrings are what `smalti scaling COMMAND --help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand


@dataclass(frozen=True)
class _Planned:
    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """A bundled study (digits, fashion), or a .json file."""
    budget: str = "60min"
    """For the whole study: a time (90s, 60min, 2h) or training FLOPs (1e15)."""
    set: tuple[str, ...] = ()
    """Config fields as field=value, as for `smalti train`: the same in every run."""
    jobs: int | None = None
    """Runs at the same time on this machine (default: one a core; on a GPU one)."""
    threads: int = 1
    """CPU threads of each run."""
    device: str = "cpu"
    """Where to train: cpu, cuda, mps."""


@dataclass(frozen=True)
class ScalingPlan(_Planned):
    """Show the runs that a study would train, and how long they take, before anything is started.

    Example: smalti scaling plan digits --budget 60min

    For a budget in time the speed of training steps is measured first (about half a minute). Sizes of later slices are
    those expected: `scaling run` chooses them by what earlier slices show.
    """


@dataclass(frozen=True)
class ScalingRun(_Planned):
    """Train a study: networks of several widths at several compute budgets, muP's learning rate for all, and one
    largest run that is held out to test what the others predict. Then fit the law and write the report.

    Examples: smalti scaling run digits --budget 60min
              smalti scaling run my-study.json --budget 1e17 --device cuda --ray

    Each slice of equal compute starts around the size that the slices below it point to, and grows until it brackets
    its minimum. Every result is a line of results.jsonl, also of runs that diverged, failed or were stopped: delete the
    line to have one run again. After a crash or Ctrl-C the same command goes on, inside the runs it was in; several
    processes may share one --out, and no run is trained twice.

    A study of your own is a JSON file: {"name": "birds", "recipe": "folder", "set": ["data.path=birds"],
    "widths": [64, 96, 128, 192, 256, 384], "base_width": 128, "slices": 4, "compute_range": 40, "samples": 0}.
    """

    out: Path | None = None
    """The folder to write (default: runs/scaling-NAME)."""
    ray: bool = False
    """Run on the Ray cluster that this machine belongs to; --out must be a path that all of it reaches."""
    max_runs: int | None = None
    """Stop after so many runs; the same command goes on."""
    give_up: float = 5.0
    """Of a --budget in time: stop a run that takes so many times what was planned for it."""


@dataclass(frozen=True)
class ScalingFit:
    """Fit L(N, D) = E + A/N^a + B/D^b, isoFLOP parabolas and power laws of compute to results, with 95 % intervals.

    Examples: smalti scaling fit runs/scaling-digits
              smalti scaling fit my-runs.csv

    A table of your own (.csv with a header, or .jsonl) has the columns parameters, images, loss and flops, and may have
    budget: what a run's slice was planned for. Writes fit.json beside the results.
    """

    results: Annotated[Positional[Path], arg(metavar="PATH")]
    """A study's folder, a .csv or a .jsonl."""


@dataclass(frozen=True)
class ScalingPredict:
    """The best size, length and loss that a budget buys, by the fitted law, with intervals.

    Examples: smalti scaling predict runs/scaling-digits --flops 1e16
              smalti scaling predict my-runs.csv --gpu-hours 100 --gpu h100
              smalti scaling predict my-runs.csv --money 500 --gpu h100 --price-per-hour 2.5

    Beyond 100 times the largest measured budget it warns: an interval holds only as far as the law does.
    """

    results: Annotated[Positional[Path], arg(metavar="PATH")]
    """A study's folder, a .csv or a .jsonl, as for `scaling fit`."""
    flops: float | None = None
    """The budget in training FLOPs."""
    gpu_hours: float | None = None
    """The budget in hours of one --gpu."""
    money: float | None = None
    """The budget in money, spent on hours of one --gpu."""
    gpu: str | None = None
    """Its name, as for `smalti plan`."""
    price_per_hour: float | None = None
    """Of one --gpu (default: what the table of `smalti plan` says)."""
    mfu: float | None = None
    """Share of the GPU's peak that training reaches (default: as `smalti plan`)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ScalingReport:
    """Write report.html and PNG pictures of a study anew, from its results.

    Example: smalti scaling report runs/scaling-digits
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """The study's folder."""


@dataclass(frozen=True)
class Scaling:
    """Scaling laws of your own data: plan, run, fit, predict and report a study of many sizes and budgets.

    Example: smalti scaling run digits --budget 60min
    """

    command: (
        Annotated[ScalingPlan, subcommand("plan", prefix_name=False)]
        | Annotated[ScalingRun, subcommand("run", prefix_name=False)]
        | Annotated[ScalingFit, subcommand("fit", prefix_name=False)]
        | Annotated[ScalingPredict, subcommand("predict", prefix_name=False)]
        | Annotated[ScalingReport, subcommand("report", prefix_name=False)]
    )
