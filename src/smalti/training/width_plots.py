"""Studies across widths as pictures: a panel for the standard parametrisation, one for muP."""

import math
from pathlib import Path
from typing import Any

from smalti.errors import UserError
from smalti.training.coordinates import CoordinateCheck
from smalti.training.transfer import Transfer
from smalti.training.widths import PARAMETRISATIONS, Parametrisation

_TITLES: dict[Parametrisation, str] = {"standard": "standard parametrisation", "mup": "muP"}


def _figure(rows: int) -> tuple[Any, Any]:
    """A figure of rows x 2 panels that share their axes row by row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install 'smalti[eval]'") from None
    figure = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, 2, sharex=True, sharey="row", squeeze=False)


def plot_coordinates(check: CoordinateCheck, path: Path) -> None:
    """Draw the sizes of activations after training, and of their change, against width, as PNG.

    Raises UserError without matplotlib, OSError where path cannot be written.
    """
    figure, panels = _figure(2)
    from matplotlib import colormaps

    for column, name in enumerate(PARAMETRISATIONS):
        measured = check.sizes[name]
        for row, what in enumerate(("after", "change")):
            axes = panels[row][column]
            axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in range(20)])
            for part in getattr(measured[0], what):
                sizes = [getattr(c, what)[part] for c in measured]
                shown = [size if math.isfinite(size) and size > 0 else math.nan for size in sizes]
                axes.plot(check.widths, shown, marker="o", markersize=3, label=part)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(f"{_TITLES[name]}, after {check.steps} steps" if row == 0 else "how far training moved it")
            axes.set_xlabel("width")
            if column == 0:
                axes.set_ylabel("mean |activation|" if row == 0 else "mean |change of the activation|")
    panels[0][1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, format="png")


def plot_transfer(transfer: Transfer, path: Path) -> None:
    """Draw loss against learning rate, a line for each width with its lowest point marked and the range over the
    seeds shaded, as PNG.

    Diverged cells are left out; the loss axis ends where a loss is hopeless. Raises UserError without matplotlib,
    OSError where path cannot be written.
    """
    figure, panels = _figure(1)
    losses = [loss for curves in transfer.curves.values() for c in curves for loss in c.losses if math.isfinite(loss)]
    for column, name in enumerate(PARAMETRISATIONS):
        axes = panels[0][column]
        for number, curve in enumerate(transfer.curves[name]):
            axes.plot(curve.learning_rates, curve.losses, marker="o", color=f"C{number}", label=f"width {curve.width}")
            low, high = ([end(row) for row in curve.by_seed] for end in (min, max))
            axes.fill_between(curve.learning_rates, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            if any(map(math.isfinite, curve.losses)):
                best = curve.best
                axes.plot(
                    curve.learning_rates[best], curve.losses[best], "*", markersize=16, color=f"C{number}", zorder=5
                )
        axes.set_xscale("log", base=2)
        axes.set(title=_TITLES[name], xlabel="learning rate" if name == "standard" else "learning rate (base)")
        axes.grid(alpha=0.3)
        axes.legend()
    if losses:
        bottom = min(losses)
        top = min(max(losses), sorted(losses)[len(losses) // 2] * 1.6)
        margin = 0.05 * (top - bottom) or 0.1
        panels[0][0].set_ylim(bottom - margin, top + margin)
    panels[0][0].set_ylabel("validation loss")
    figure.savefig(path, dpi=110, format="png")
