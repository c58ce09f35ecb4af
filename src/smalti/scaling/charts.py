"""The report's pictures: isoFLOP curves, the frontier, what compute buys, residuals. Each draws on given axes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smalti.pages.figures import COLOURS, INK, figure_svg
from smalti.scaling.analysis import Analysis
from smalti.scaling.compute import ComputeLaw
from smalti.scaling.published import DIFFUSION_TRANSFORMERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]
_BAND = 0.18  # opacity


def isoflop_curves(analysis: Analysis) -> Draw:
    """Loss against parameters, a parabola for each budget, its minimum marked."""

    def draw(axes: "Axes") -> None:
        for number, minimum in enumerate(analysis.minima):
            colour = COLOURS[number % len(COLOURS)]
            part = minimum.slice
            axes.plot(part.n, part.loss, "o", color=colour, markersize=4, label=f"{part.budget:.1e} FLOPs")
            if minimum.coefficients is not None and minimum.centre is not None:
                u = np.linspace(np.log(part.n[0]), np.log(part.n[-1]), 60)
                axes.plot(np.exp(u), np.exp(np.polyval(minimum.coefficients, u - minimum.centre)), color=colour, lw=1.2)
            if minimum.n is not None and minimum.loss is not None:
                axes.plot([minimum.n.value], [minimum.loss.value], "*", color=colour, markersize=11)
        if analysis.held_out is not None:
            held = analysis.held_out
            axes.plot([held.parameters], [held.loss], "D", color=INK, markersize=5, label=f"held out, {held.flops:.1e}")
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel("held-out loss")

    return draw


def best_sizes(analysis: Analysis) -> Draw:
    """The best N of each budget, the power law through them, that of the fitted law, and the published exponent."""

    def draw(axes: "Axes") -> None:
        fitted = analysis.fitted
        flops = np.geomspace(fitted.runs.flops.min(), 10 * fitted.runs.flops.max(), 40)
        sizes = np.array([fitted.law.best(float(c), fitted.cost)[0] for c in flops])
        low, high = fitted.band(lambda law: np.array([law.best(float(c), fitted.cost)[0] for c in flops]))
        axes.plot(flops, sizes, color=COLOURS[0], label="by L(N, D)")
        axes.fill_between(flops, low, high, color=COLOURS[0], alpha=_BAND, linewidth=0)
        anchor = sizes[0]
        if analysis.frontier is not None:
            line = analysis.frontier.n.law
            axes.plot(flops, line.at(flops), color=COLOURS[1], label=f"through the minima: C^{line.power:.2f}")
            anchor = float(line.at(float(flops[0])))
        power = DIFFUSION_TRANSFORMERS.n.power
        published = anchor * (flops / flops[0]) ** power
        axes.plot(flops, published, ":", color=INK, label=f"published slope: C^{power:g}")
        for minimum in analysis.minima:
            if minimum.n is not None:
                below, above = minimum.n.value - minimum.n.low, minimum.n.high - minimum.n.value
                spread = [[max(0.0, below)], [max(0.0, above)]]
                axes.errorbar(
                    [minimum.slice.mean_flops], [minimum.n.value], yerr=spread, fmt="o", color=COLOURS[1], capsize=3
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _keep_in_view(axes, [*sizes, *(m.n.value for m in analysis.minima if m.n is not None)])
        axes.set_xlabel("training FLOPs C")
        axes.set_ylabel("best parameters N")

    return draw


def _keep_in_view(axes: "Axes", values: list[float]) -> None:
    """Limits from values, so that an interval that ends nowhere near does not squeeze them."""
    axes.set_ylim(min(values) / 4, max(values) * 4)


def _plain_ticks(axes: "Axes", values: list[float]) -> None:
    """A logarithmic axis about values, with round numbers on it (0.17) where they span less than a power of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = min(values), max(values)
    margin = max(1.05, (high / low) ** 0.75)
    axes.set_ylim(low / margin, high * margin)
    if high / low * margin**2 < 10:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")


def loss_of_compute(analysis: Analysis) -> Draw:
    """The best loss of each budget, both curves fitted to it, and the published slope."""
    best = [(row["flops"], row["loss"], bool(row["held_out"])) for row in analysis.best_rows]
    return _of_compute(best, analysis.loss_of_compute, "held-out loss", -DIFFUSION_TRANSFORMERS.loss.power)


def distance_of_compute(analysis: Analysis) -> Draw:
    """The Frechet distance of each budget's best run, both curves fitted to it, and the published slope."""
    scored = [
        (row["flops"], analysis.scores[row["key"]]["fd"]["value"], bool(row["held_out"]))
        for row in analysis.best_rows
        if row["key"] in analysis.scores
    ]
    return _of_compute(scored, analysis.fd_of_compute, "Frechet distance", -DIFFUSION_TRANSFORMERS.fid.power)


def _of_compute(
    points: list[tuple[float, float, bool]], law: ComputeLaw | None, y_label: str, published: float
) -> Draw:
    def draw(axes: "Axes") -> None:
        for held, marker, colour, label in (
            (False, "o", COLOURS[0], "best of each budget"),
            (True, "D", INK, "held out"),
        ):
            chosen = [(x, y) for x, y, is_held in points if is_held == held]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, color=colour, markersize=5, label=label)
        first, last = min(x for x, *_ in points), max(x for x, *_ in points)
        flops = np.geomspace(first, 5 * last, 60)
        if law is not None:
            for number, (fit, name) in enumerate(((law.power, "k C^-p"), (law.with_asymptote, "E + k C^-p"))):
                chosen_one = fit is law.chosen
                label = f"{name}, p = {fit.curve.power:.3f}{' (chosen)' if chosen_one else ''}"
                axes.plot(
                    flops, fit.curve.at(flops), "-" if chosen_one else "--", color=COLOURS[1 + number], label=label
                )
                if chosen_one:
                    ends = np.quantile([curve.at(flops) for curve in fit.replicates], [0.025, 0.975], axis=0)
                    axes.fill_between(flops, *ends, color=COLOURS[1 + number], alpha=_BAND, linewidth=0)
        at_first = next(y for x, y, _ in points if x == first)
        axes.plot(
            flops, at_first * (flops / first) ** -published, ":", color=INK, label=f"published slope: {published:g}"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, [y for _, y, _ in points])
        axes.set_xlabel("training FLOPs C")
        axes.set_ylabel(y_label)

    return draw


def residuals(analysis: Analysis) -> Draw:
    """Measured over fitted loss, in percent, against compute; the held-out run with its predicted interval."""

    def draw(axes: "Axes") -> None:
        runs = analysis.fitted.runs
        for number, part in enumerate(analysis.slices):
            expected = analysis.fitted.law.loss(part.n, part.d)
            axes.plot(
                part.flops, 100 * (part.loss / expected - 1), "o", color=COLOURS[number % len(COLOURS)], markersize=4,
                label=f"{part.budget:.1e} FLOPs",
            )  # fmt: skip
        if not analysis.slices:
            axes.plot(runs.flops, 100 * np.expm1(analysis.fitted.residuals), "o", color=COLOURS[0], label="runs")
        if analysis.held_out is not None:
            held, law = analysis.held_out, analysis.held_out.predicted
            spread = [[100 * (1 - law.low / law.value)], [100 * (law.high / law.value - 1)]]
            axes.errorbar([held.flops], [0], yerr=spread, fmt="_", color=INK, capsize=4, label="predicted, 95 %")
            axes.plot([held.flops], [100 * (held.loss / law.value - 1)], "D", color=INK, markersize=5, label="held out")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs C")
        axes.set_ylabel("loss above the law, %")

    return draw


def charts(analysis: Analysis) -> dict[str, tuple[str, Draw]]:
    """Title and drawing of each picture by file name; those alone for which there are results."""
    shown: dict[str, tuple[str, Draw]] = {}
    if analysis.minima:
        shown["isoflop"] = ("Loss against size at equal compute", isoflop_curves(analysis))
    shown["best-sizes"] = ("The best size of a budget", best_sizes(analysis))
    shown["loss-of-compute"] = ("What compute buys: loss", loss_of_compute(analysis))
    if analysis.scores:
        shown["distance-of-compute"] = ("What compute buys: pictures", distance_of_compute(analysis))
    shown["residuals"] = ("How far runs lie from the law", residuals(analysis))
    return shown


def chart_svg(draw: Draw, figure_id: str) -> str:
    """A picture for a page."""
    return figure_svg(draw, f"scaling-{figure_id}")


def write_png(draw: Draw, title: str, path: Path) -> None:
    """A picture as a file of its own, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
