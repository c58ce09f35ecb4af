"""The report's charts as SVG that stands in the page: text is text, and follows the page's colours, light or dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smalti.errors import UserError

COLOURS = ("#3b82d6", "#e07b2a", "#2f9e5b", "#b0509f", "#8a7a1f", "#5b5fc7")
"""Of the contenders, in their order."""
_MARKERS = "osD^vP"
_INK = "#010203"  # what becomes the page's text colour
_ASIDE = 1.03
_SIZE = (5.0, 3.3)  # inches; small, so that text stays readable at 400 pixels


@dataclass(frozen=True)
class Line:
    """A contender's line: x, y and the ends of y's interval."""

    name: str
    number: int
    points: Sequence[tuple[float, float, float, float]]


def charts_available() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the report's charts need matplotlib: pip install 'smalti[eval]'") from None


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
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    ink: dict[Any, Any] = {
        name: _INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": chart_id, "font.size": 9, "axes.spines.top": False}
    with rc_context({**ink, **style, "axes.spines.right": False}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
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
            axes.axhline(level[0], color=_INK, linewidth=1.2, linestyle=":", label=level[1])
        if x_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        if y_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_a_page(file.getvalue(), chart_id)


def _for_a_page(svg: str, chart_id: str) -> str:
    """The <svg> element alone, without a fixed size, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{chart_id}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{chart_id}-", svg)
    svg = re.sub(r"'DejaVu Sans',?[^;\"]*", "inherit", svg)
    return svg.replace(_INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
