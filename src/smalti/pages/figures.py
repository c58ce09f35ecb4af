"""Figures as SVG that stands in a page: text is text, and follows the page's colours, light or dark."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from smalti.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b82d6", "#e07b2a", "#2f9e5b", "#b0509f", "#8a7a1f", "#5b5fc7")
"""Of lines, in their order."""
INK = "#010203"
"""What becomes the page's text colour."""
_SIZE = (5.0, 3.3)  # inches; small, so that text stays readable at 400 pixels


def charts_available() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the report's charts need matplotlib: pip install 'smalti[eval]'") from None


def figure_svg(draw: "Callable[[Axes], None]", figure_id: str) -> str:
    """What draw(axes) draws, as an SVG element. figure_id: unique on the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = {
        name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure_id,
        "font.size": 9,
        "axes.spines.top": False,
    }
    with rc_context({**ink, **style, "axes.spines.right": False}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_a_page(file.getvalue(), figure_id)


def _for_a_page(svg: str, figure_id: str) -> str:
    """The <svg> element alone, without a fixed size, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{figure_id}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{figure_id}-", svg)
    svg = re.sub(r"'DejaVu Sans',?[^;\"]*", "inherit", svg)
    return svg.replace(INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
