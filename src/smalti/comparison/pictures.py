"""Sample grids, small enough to be carried in a report."""

import base64
import io

from torch import Tensor

from smalti.images import grid_picture

GRID_ROWS = 4


def grid_png(pictures: Tensor, columns: int = 10) -> str:
    """The first pictures, a class in each column, as a PNG file in base64."""
    grid = grid_picture(pictures[: GRID_ROWS * columns], columns, gap=1)
    if grid.mode == "L":  # 32 levels of grey are enough to look at, and half the bytes
        grid = grid.quantize(32)
    file = io.BytesIO()
    grid.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
