"""A folder of pictures in Hugging Face's ImageFolder layout, with or without captions or classes."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from smalti.data.decode import Fit
from smalti.data.listing import (
    PICTURE_SUFFIXES,
    Listing,
    as_captions,
    caption_of_name,
    captions_or_none,
    check_share,
    held_out_by_key,
    labels_of,
    one_caption,
    read_file,
)
from smalti.errors import UserError

_EMOJI = "emoji"  # where `smalti data emoji` writes and the emoji recipes read
_HELD_OUT_FOLDERS = ("validation", "valid", "val", "test", "eval")


@dataclass(frozen=True)
class FolderData:
    """A folder of pictures.

    metadata.jsonl (or metadata.csv) in it names the pictures: `file_name`, `text` (a text, in JSON also a list of
    texts) and, if wished, `label`. Without it, two or more folders of pictures are classes, and their names captions;
    else all pictures below are taken. Without metadata, a text file beside a picture (cat.txt, cat.png) is its caption.
    A folder that holds only `train` and `validation` or `test` is read as these two parts; otherwise about the share
    `held_out` is held out, by the hash of the pictures' paths.
    """

    path: str = ""
    fit: Fit = "crop"  # what becomes of pictures of another shape than the network's
    held_out: float = 0.05
    kind: ClassVar[str] = "folder"

    def __post_init__(self) -> None:
        check_share(self.held_out)


@dataclass(frozen=True)
class _Row:
    """A picture: its path, the captions it was given, its class."""

    path: Path
    captions: tuple[str, ...] = ()
    label: str | int | None = None


def _pictures_below(folder: Path) -> list[Path]:
    found = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(directory, name)
            for name in sorted(names)
            if name.rpartition(".")[2].lower() in PICTURE_SUFFIXES and not name.startswith(".")
        ]
    return found


def _metadata_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of a metadata file. Raises UserError for a line that does not parse."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    body = json.loads(line)
                    if not isinstance(body, dict):
                        raise UserError(f"{path} line {number}: an object is needed, such as "
                                        '{"file_name": "a.png", "text": "a cat"}')  # fmt: skip
                    yield number, body
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not JSON: {error}") from None
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None


def _metadata_rows(path: Path) -> list[_Row]:
    """The pictures that a metadata file names; of several lines on a picture, all captions. UserError if some miss."""
    rows: dict[str, _Row] = {}
    for number, body in _metadata_lines(path):
        name = body.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{path} line {number}: file_name is missing; it has {', '.join(map(str, body)) or 'nothing'}"
            )
        try:
            captions = as_captions(body.get("text"))
        except ValueError as error:
            raise UserError(f"{path} line {number}: text must be {error}") from None
        label = body.get("label")
        if label is not None and not isinstance(label, (str, int)):
            raise UserError(f"{path} line {number}: label must be a text or an integer, not {label!r}")
        before = rows.get(name, _Row(path.parent / name))
        rows[name] = _Row(before.path, before.captions + captions, label if label is not None else before.label)
    missing = [name for name, row in rows.items() if not row.path.is_file()]
    if missing:
        few = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{path} names {len(missing)} of {len(rows)} pictures that are not there: {few}")
    return list(rows.values())


def _caption_beside(path: Path) -> tuple[str, ...]:
    try:
        return one_caption(path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ()


def _rows(folder: Path) -> list[_Row]:
    """The pictures of a folder by its metadata file, its class folders, or alone."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return _metadata_rows(folder / name)
    paths = _pictures_below(folder)
    tops = [path.relative_to(folder).parts[0] for path in paths]
    classes = len(set(tops)) > 1 and all(path.parent != folder for path in paths)
    if not classes:
        return [_Row(path, _caption_beside(path)) for path in paths]
    return [
        _Row(path, _caption_beside(path) or one_caption(caption_of_name(top)), top)
        for path, top in zip(paths, tops, strict=True)
    ]


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """(training folder, held-out folder), where the folder holds nothing but splits."""
    inside = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    held_out = [name for name in _HELD_OUT_FOLDERS if name in inside]
    if "train" not in inside or not held_out or not inside <= {"train", *_HELD_OUT_FOLDERS}:
        return None
    return folder / "train", folder / held_out[0]


def list_folder(config: FolderData) -> Listing:
    """The pictures of a folder.

    Raises UserError for a folder that does not exist or holds no picture, and for metadata that does not parse or names
    pictures that are not there.
    """
    if not config.path:
        raise UserError(
            "data.path is empty: give the folder with your pictures, as --set data=folder data.path=PICTURES"
        )
    folder = Path(config.path)
    if not folder.is_dir():
        hint = "; `smalti data emoji` makes it" if config.path == _EMOJI else ""
        raise UserError(f"data.path={config.path!r} is no folder{hint}")
    parts = _parts(folder)
    rows = [row for part in parts for row in _rows(part)] if parts else _rows(folder)
    if not rows:
        raise UserError(f"data.path={config.path!r} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    keys = [_key(row.path, folder) for row in rows]
    labels, names = labels_of([row.label for row in rows])
    return Listing(
        origin=f"the folder {folder}",
        keys=keys,
        read_bytes=lambda row, limit: read_file(rows[row].path, limit),
        held_out=_held_out(rows, parts, keys, config.held_out),
        class_labels=labels,
        class_names=names,
        captions=captions_or_none([row.captions for row in rows]),
        fit=config.fit,
    )


def _key(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _held_out(rows: Sequence[_Row], parts: tuple[Path, Path] | None, keys: Sequence[str], share: float) -> torch.Tensor:
    if parts is None:
        return held_out_by_key(keys, share)
    return torch.tensor([parts[1] in row.path.parents for row in rows])
