"""Averages of several widths side by side: how well each is reconstructed, and how well it predicts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from smalti.errors import UserError
from smalti.interop.load import load_backbone
from smalti.training.snapshots import Reconstruction
from smalti.training.validation import validation_of_run
from smalti.types import Backbone


def validation_losses(
    run: Path,
    made: Sequence[Reconstruction],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The run's fixed-t validation loss with each average, which must have been written (save_reconstruction).

    progress(done, total) counts averages. Raises UserError where the run's data cannot be opened or holds no rows out.
    """
    validate, losses = validation_of_run(run, device), []
    for entry in made:
        network = load_backbone(run, checkpoint=entry.name, device=device)
        assert isinstance(network, Backbone)
        losses.append(validate(network))
        if progress is not None:
            progress(len(losses), len(made))
    return losses


def widths_table(made: Sequence[Reconstruction], losses: Sequence[float] | None = None) -> Table:
    """A row a width, the smallest first; the lowest loss is starred."""
    table = Table("relative std", "reconstruction error", *(["validation loss"] if losses else []), "--checkpoint")
    for number in sorted(range(len(made)), key=lambda n: made[n].profile.relative_std):
        entry = made[number]
        best = losses is not None and losses[number] == min(losses)
        loss = [f"{losses[number]:.5f}{' *' if best else ''}"] if losses else []
        table.add_row(f"{entry.profile.relative_std:g}", f"{entry.combination.error:.2%}", *loss, entry.name)
    return table


def weights_table(made: Reconstruction) -> Table:
    """What each stored average counts for in a reconstructed one, oldest first."""
    table = Table("step", "relative std", "weight", title=f"{made.name} is the sum of", title_justify="left")
    for entry, weight in zip(made.stored, made.combination.weights, strict=True):
        table.add_row(str(entry.profile.step), f"{entry.profile.relative_std:g}", f"{weight:+.6f}")
    return table


def plot_widths(made: Sequence[Reconstruction], losses: Sequence[float], path: Path) -> None:
    """Validation loss against width; the suffix of path says the format (png, svg, pdf).

    Raises UserError without matplotlib, for an unknown suffix, and where path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'smalti[eval]'") from None
    rows = sorted(zip((entry.profile.relative_std for entry in made), losses, strict=True))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([width for width, _ in rows], [loss for _, loss in rows], "o-")
    axes.set(xlabel="relative standard deviation of the average", ylabel="validation loss", xscale="log")
    axes.set_xticks([width for width, _ in rows], [f"{width:g}" for width, _ in rows])
    axes.minorticks_off()
    axes.set_title(f"averages after step {made[0].profile.step}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None
