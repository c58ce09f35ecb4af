"""A folder of coloured shapes with captions: text to image in miniature."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")


def write_shapes(folder: Path, each: int = 6, size: int = 20) -> Path:
    """each pictures of every colour and shape, slightly moved, in the ImageFolder layout."""
    folder.mkdir(parents=True)
    rows, draw_at = [], np.random.default_rng(0)
    for colour, rgb in COLOURS.items():
        for shape in SHAPES:
            for number in range(each):
                picture = Image.new("RGB", (size, size), "white")
                left, top = draw_at.integers(2, 6, 2).tolist()
                box = (left, top, left + size // 2, top + (size // 2 if shape != "bar" else size // 6))
                pen = ImageDraw.Draw(picture)
                (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=rgb)
                name = f"{colour}-{shape}-{number}.png"
                picture.save(folder / name)
                rows.append({"file_name": name, "text": [f"a {colour} {shape}", f"{shape}, {colour}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
