"""Tensors to pictures: PIL images and grids."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smalti.data.rows import to_bytes, to_signed_unit
from smalti.errors import UserError

_LINE = 12  # pixels of a line of text


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures in [-1, 1], [batch, 1 or 3, height, width], as PIL images (mode L or RGB)."""
    arrays = to_bytes(images.detach().cpu()).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def grid_picture(images: Tensor, columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Pictures in [-1, 1] side by side, `columns` a row, each pixel zoom times as large."""
    arrays = to_bytes(images.detach().cpu()).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = arrays.shape
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 40, dtype=np.uint8)
    for i, array in enumerate(arrays):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = array
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int, zoom: int = 3) -> Image.Image:
    """Pictures in [-1, 1] side by side, `columns` a row, each with its caption below, in up to three lines."""
    pictures = to_pil(images)
    width, height, text_height = pictures[0].width * zoom, pictures[0].height * zoom, 3 * _LINE
    gap, rows = 6, math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_LINE - 2)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + text_height + gap)
        canvas.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        characters = max(8, int(width / pen.textlength("n", font)))
        lines = textwrap.wrap(caption, characters, max_lines=3, placeholder="...")
        pen.text((left, top + height + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return canvas


def class_columns(num_classes: int, rows: int) -> Tensor:
    """Labels for a grid with a class in each column: int64 [rows * num_classes]."""
    return torch.arange(num_classes).repeat(rows)


def read_picture(path: Path, field: str, channels: int) -> Tensor:
    """A picture file in [-1, 1], [channels, height, width], 1 (grey) or 3 (RGB) channels.

    Raises UserError naming field where the file is missing or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{field} {path} cannot be read as a picture: {error}") from None
    return decode_picture(content, f"{field} {path}", channels)


def decode_picture(content: bytes, field: str, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """The bytes of a picture file in [-1, 1], [channels, height, width], 1 (grey) or 3 (RGB) channels.

    size: (height, width) that it must have. Raises UserError naming field for another size and for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if size is not None and (picture.height, picture.width) != size:
                raise UserError(
                    f"{field} is {picture.width}x{picture.height}, this network draws {size[1]}x{size[0]}: resize it"
                )
            array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{field} cannot be read as a picture: {error}") from None
    return to_signed_unit(torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1))
