"""What a source holds, before any picture is decoded; and which of its rows are held out."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smalti.data.decode import Fit
from smalti.errors import UserError

# (path or key, why it cannot be used)
Skipped = tuple[tuple[str, str], ...]

# What Pillow reads and people keep pictures in.
PICTURE_SUFFIXES = frozenset(
    ("avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif",
     "tiff", "webp")
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """A row a picture, none of them decoded.

    origin: the source in words, for messages. keys: what names each row for good (a relative path); the held-out split
    hangs on it. read_bytes(row, limit): the row's picture file, or only its first `limit` bytes; OSError where it
    cannot be read. held_out: bool [rows]. class_labels: int64 [rows] or None. captions: of each row, () for a row
    without; None where no row has any. pixels: uint8 [rows, channels, height, width] where the source holds its
    pictures decoded. skipped: what was found unusable so far.
    """

    origin: str
    keys: Sequence[str]
    read_bytes: Callable[[int, int | None], bytes]
    held_out: Tensor
    class_labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    captions: Sequence[tuple[str, ...]] | None = None
    fit: Fit = "crop"
    pixels: Tensor | None = None
    skipped: Skipped = field(default=())

    def __len__(self) -> int:
        return len(self.keys)


def held_out_by_key(keys: Sequence[str], share: float) -> Tensor:
    """Which rows are held out: bool [rows], about `share` of them.

    A row is held out if the hash of its key, read as a number in [0, 1), lies below share: rows that come or go change
    nothing for the others. Where that leaves the held-out rows empty (and there are two rows or more), the row with the
    smallest hash is held out; where it leaves nothing to train on, the row with the largest is trained on.
    """
    if not keys:
        return torch.zeros(0, dtype=torch.bool)
    positions = torch.tensor(
        [int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48 for key in keys], dtype=torch.float64
    )
    held_out = positions < share
    if share > 0 and not held_out.any() and len(keys) > 1:
        held_out[positions.argmin()] = True
    if held_out.all():
        held_out[positions.argmax()] = False
    return held_out


def check_share(share: float) -> None:
    """Raises UserError for a held-out share outside [0, 0.9]."""
    if not 0 <= share <= 0.9:
        raise UserError(f"data.held_out={share} must lie in 0 .. 0.9: the share of the pictures that is not trained on")


def read_file(path: Path, limit: int | None) -> bytes:
    """A file's bytes, or its first `limit`."""
    with path.open("rb") as file:
        return file.read() if limit is None else file.read(limit)


def as_captions(value: object) -> tuple[str, ...]:
    """What a caption field holds as a row's captions: a text, a list of texts, or nothing. ValueError for the rest."""
    if value is None:
        return ()
    if isinstance(value, str):
        return one_caption(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(caption for item in value for caption in one_caption(item))
    raise ValueError(f"a text or a list of texts, not {value!r:.60}")


def one_caption(text: str) -> tuple[str, ...]:
    """A text as a row's captions: one with its white space joined, or none where it is blank."""
    joined = " ".join(text.split())
    return (joined,) if joined else ()


def caption_of_name(name: str) -> str:
    """A class's name as a caption: golden_retriever -> golden retriever."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def captions_or_none(captions: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]] | None:
    """The captions, or None where no row has any."""
    return captions if any(captions) else None


def labels_of(names: Sequence[str | int | None]) -> tuple[Tensor | None, tuple[str, ...]]:
    """(int64 labels [rows], class names) of each row's class. Integers are labels already; None where any is missing.

    Names are sorted; the class names of integer labels are the numbers 0 .. the largest.
    """
    known = [name for name in names if name is not None]
    if not known or len(known) != len(names):
        return None, ()
    if all(isinstance(name, int) for name in known):
        labels = torch.tensor(known, dtype=torch.int64)
        return (labels, tuple(str(i) for i in range(int(labels.max()) + 1))) if labels.min() >= 0 else (None, ())
    classes = tuple(sorted({str(name) for name in known}))
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[str(name)] for name in known], dtype=torch.int64), classes


def pgm_bytes(picture: Tensor) -> bytes:
    """A grey picture, uint8 [1, height, width], as a PGM file: what stands for its file where it never had one."""
    _, height, width = picture.shape
    return b"P5 %d %d 255\n" % (width, height) + picture.contiguous().numpy().tobytes()
