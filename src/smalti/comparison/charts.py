"""The report's charts: lines with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smalti.pages.figures import COLOURS, INK, figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP"
_ASIDE = 1.03


@dataclass(frozen=True)
class Line:
    """A contender's line: x, y and the ends of y's interval."""

    name: str
    number: int
    points: Sequence[tuple[float, float, float, float]]


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    chart_id: str,
    *,
    x_log: bool = False,
    y_log: bool = False,
    x_ticks: Sequence[float] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """Lines with intervals as an SVG element. chart_id: unique on the page. level: a line across, and what it is."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    def draw(axes: "Axes") -> None:
        for line in lines:
            if not line.points:
                continue
            places, y, low, high = zip(*sorted(line.points), strict=True)
            x = list(places)
            if x_ticks:  # of the same places: beside each other, so that no bar hides another
                x = [place * _ASIDE ** (line.number - (len(lines) - 1) / 2) for place in x]
            below = [max(0.0, a - b) for a, b in zip(y, low, strict=True)]
            above = [max(0.0, b - a) for a, b in zip(y, high, strict=True)]
            axes.errorbar(
                x, y, yerr=[below, above], label=line.name, color=COLOURS[line.number % len(COLOURS)], capsize=3,
                marker=_MARKERS[line.number % len(_MARKERS)], markersize=5, linewidth=1.6, elinewidth=1,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level[0], color=INK, linewidth=1.2, linestyle=":", label=level[1])
        for logarithmic, axis, scale in ((x_log, axes.xaxis, axes.set_xscale), (y_log, axes.yaxis, axes.set_yscale)):
            if logarithmic:
                scale("log")
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(ScalarFormatter())
                axis.set_minor_locator(NullLocator())
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return figure_svg(draw, chart_id)
