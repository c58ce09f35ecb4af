"""The commands `smalti mup coord-check` and `smalti mup transfer`."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.cli_mup_arguments import Mup, MuPCoordCheck, MuPTransfer
from smalti.cli_options import check_device, set_threads
from smalti.cli_progress import progress_bar
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.config import RunConfig
    from smalti.training.transfer import Curve, Transfer


def mup_command(command: Mup) -> int:
    """smalti mup: the chosen one of its commands."""
    chosen = command.command
    return _coord_check(chosen) if isinstance(chosen, MuPCoordCheck) else _transfer(chosen)


def _studied(command: MuPCoordCheck | MuPTransfer) -> "RunConfig":
    """The recipe with AdamW and the command's overrides, in the threads that it asks for."""
    from smalti.config import apply_overrides
    from smalti.recipes import recipe

    set_threads(command.threads)
    check_device(command.device)
    config = apply_overrides(recipe(command.recipe), ["optimizer=adamw", *command.set])
    if config.parametrisation is not None:
        raise UserError("--set parametrisation: the study compares both; give --base-width")
    return config


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None


def _coord_check(command: MuPCoordCheck) -> int:
    from rich.console import Console
    from rich.table import Table

    from smalti.run_folder import write_json
    from smalti.training.coordinates import FLAT, check_coordinates
    from smalti.training.width_plots import plot_coordinates
    from smalti.training.widths import PARAMETRISATIONS

    config = _studied(command)
    _make_folder(command.out)
    with progress_bar("training") as progress:
        check = check_coordinates(
            config,
            command.widths,
            base_width=command.base_width,
            steps=command.steps,
            learning_rate=command.learning_rate,
            seeds=command.seeds,
            keep_heads=command.keep_heads,
            device=command.device,
            progress=progress,
        )
    table = Table("part", "standard: size", "change", "muP: size", "change", title="slopes of log size by log width")
    slopes = {name: check.slopes(name) for name in PARAMETRISATIONS}
    for part in slopes["mup"]:
        values = [value for name in PARAMETRISATIONS for value in slopes[name][part]]
        table.add_row(part, *("-" if math.isnan(value) else f"{value:+.2f}" for value in values))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    write_json(command.out / "coord-check.json", check.to_json())
    plot_coordinates(check, command.out / "coord-check.png")
    flat = {}
    for name in PARAMETRISATIONS:
        part, slope = check.steepest(name)
        flat[name] = abs(slope) <= FLAT
        verdict = "flat" if flat[name] else "grows with the width" if slope > 0 else "vanishes with the width"
        print(f"{name}: {verdict} (steepest: {part}, {slope:+.2f}; flat is within {FLAT:g})")
    print(f"written: {command.out / 'coord-check.json'}, {command.out / 'coord-check.png'}")
    return 0 if flat["mup"] else 1


def _transfer(command: MuPTransfer) -> int:
    from smalti.run_folder import write_json
    from smalti.training.memory import keep_freed_memory
    from smalti.training.transfer import Grid, run_transfer
    from smalti.training.width_plots import plot_transfer

    config = _studied(command)
    grid = Grid(
        command.widths,
        command.learning_rates,
        command.steps,
        command.base_width,
        command.keep_heads,
        command.seeds,
    )
    _make_folder(command.out)
    keep_freed_memory()
    with progress_bar("training") as progress:
        transfer = run_transfer(
            config, grid, command.out, max_cells=command.max_cells, device=command.device, progress=progress
        )
    write_json(command.out / "transfer.json", transfer.to_json(config))
    plot_transfer(transfer, command.out / "transfer.png")
    _print_transfer(transfer)
    print(f"written: {command.out / 'transfer.json'}, {command.out / 'transfer.png'}")
    return 0


def _print_transfer(transfer: "Transfer") -> None:
    if transfer.missing:
        print(f"{transfer.missing} runs are left: the same command goes on")
        return
    for name, curves in transfer.curves.items():
        if not all(any(map(math.isfinite, curve.losses)) for curve in curves):
            print(f"{name}: every run of a width diverged: give lower --learning-rates")
            continue
        for curve in curves:
            print(f"{name}, width {curve.width}: {_best(curve)}")
        penalty = transfer.penalty(name)
        cost = "diverges" if math.isnan(penalty) else f"has a loss {100 * penalty:.1f} % above its lowest"
        print(
            f"{name}: the best rate moved by {transfer.moved(name):+d} grid points from width {curves[0].width} to "
            f"{curves[-1].width}, the lowest point of the curve by {transfer.drift(name):+.1f} factors of 2; at width "
            f"{curves[0].width}'s best rate, width {curves[-1].width} {cost}"
        )


def _best(curve: "Curve") -> str:
    i, last = curve.best, len(curve.learning_rates) - 1
    diverged = sum(not math.isfinite(loss) for loss in curve.losses)
    return (
        f"best rate {curve.learning_rates[i]:.3g} (2^{math.log2(curve.learning_rates[i]):.4g}), loss "
        f"{curve.losses[i]:.4f}"
        + (f"; {diverged} diverged" if diverged else "")
        + ("; at the edge of the grid: the best may lie outside" if i in (0, last) else "")
    )
