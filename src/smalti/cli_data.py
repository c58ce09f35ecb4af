"""The commands on data: emoji, show; cache is in cli_latents.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.cli_data_arguments import Data, DataCache, DataEmoji, DataShow
from smalti.cli_latents import cache_command
from smalti.cli_progress import progress_bar, skipped_lines
from smalti.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from smalti.data.opening import OpenedRows
    from smalti.data.rows import TrainingRows
    from smalti.data.sources import DataConfig

_LISTED = 10  # classes that are printed


def data_command(command: Data) -> int:
    """smalti data."""
    match command.command:
        case DataEmoji():
            return _emoji(command.command)
        case DataShow():
            return _show(command.command)
        case DataCache():
            return cache_command(command.command)


def _write_sheet(rows: "TrainingRows", chosen: "Tensor", columns: int, path: Path) -> None:
    from smalti.images import grid_picture

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid_picture(rows.read(chosen), columns).save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not know
        raise UserError(f"cannot write --out {path}: {error}") from None


def _emoji(command: DataEmoji) -> int:
    import torch

    from smalti.data.emoji import find_emoji_font, render_emoji
    from smalti.data.opening import open_rows
    from smalti.data.sources import FolderData

    font = command.font or find_emoji_font()
    with progress_bar("drawing") as progress:
        written = render_emoji(
            font, command.out, size=command.size, overwrite=command.overwrite, progress=progress
        )  # fmt: skip
    with progress_bar("contact sheet") as progress:
        rows = open_rows(FolderData(str(command.out), held_out=0.0), 3, (32, 32), progress=progress).training
    sheet = command.out / "contact-sheet.png"
    _write_sheet(rows, torch.arange(len(rows)), 64, sheet)
    print(f"{written.pictures} emoji with {written.captions} captions -> {command.out}")
    if written.not_in_font:
        print(f"{written.not_in_font} emoji of newer Unicode versions are not in {font}")
    print(f"contact sheet: {sheet}")
    return 0


def _show(command: DataShow) -> int:
    import torch

    from smalti.data.opening import open_rows
    from smalti.data.sources import source_of

    if command.num_images < 1 or not 8 <= command.size <= 512:
        raise UserError(f"--num-images {command.num_images} must be at least 1, --size {command.size} in 8 .. 512")
    config: DataConfig = source_of(command.source)
    with progress_bar("reading") as progress:
        opened = open_rows(config, 3, (command.size, command.size), progress=progress)
    for line in _findings(opened):
        print(line)
    count = min(command.num_images, len(opened.training))
    chosen = torch.linspace(0, len(opened.training) - 1, count).round().long()
    _write_sheet(opened.training, chosen, min(count, 10), command.out)
    print(f"contact sheet of {count} pictures: {command.out}")
    return 0


def _span(values: Sequence[int]) -> str:
    """The least, the median and the greatest of some numbers."""
    ordered = sorted(values)
    return f"{ordered[0]} .. {ordered[len(ordered) // 2]} .. {ordered[-1]}"


def _findings(opened: "OpenedRows") -> list[str]:
    """What a source holds, a line a fact."""
    from collections import Counter

    import torch

    parts = (opened.training, opened.held_out)
    lines = [f"{len(opened.training)} pictures to train on, {len(opened.held_out)} held out"]
    sizes = Counter(map(tuple, torch.cat([opened.sizes, opened.held_out_sizes]).tolist()))
    heights, widths = ([size[i] for size in sizes.elements()] for i in (0, 1))
    common = ", ".join(f"{w} x {h} ({count})" for (h, w), count in sizes.most_common(3))
    lines.append(f"sizes: width {_span(widths)}, height {_span(heights)} (least .. median .. greatest)")
    lines.append(f"{len(sizes)} different sizes; most of them: {common}")
    captions = [row for rows in parts for row in rows.captions or ()]
    lengths = [len(caption) for row in captions for caption in row]
    if lengths:
        bare = sum(not row for row in captions)
        lines.append(f"captions: {len(lengths)}, {_span(lengths)} characters, {_span([*map(len, captions)])} a picture")
        lines += [f"{bare} pictures have no caption"] if bare else []
    else:
        lines.append("captions: none")
    labels = [rows.class_labels for rows in parts if rows.class_labels is not None]
    if labels:
        found = Counter(opened.class_names[label] for label in torch.cat(labels).tolist())
        shown = ", ".join(f"{name} ({count})" for name, count in found.most_common(_LISTED))
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        lines.append(f"classes: {len(opened.class_names)}: {shown}{more}")
    else:
        lines.append("classes: none")
    return lines + skipped_lines(opened.skipped)
