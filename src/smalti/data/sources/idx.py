"""IDX files: MNIST's format (LeCun's page, "THE IDX FILE FORMAT"), as Fashion-MNIST, KMNIST and EMNIST are given."""

import gzip
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smalti.data.listing import Listing, held_out_by_key, pgm_bytes
from smalti.errors import UserError

_FASHION_MNIST = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
_FASHION_CAPTIONS = (
    ("a t-shirt", "a top with short sleeves"), ("a pair of trousers", "trousers"), ("a pullover", "a jumper"),
    ("a dress",), ("a coat",), ("a sandal",), ("a shirt",), ("a sneaker", "a sports shoe"), ("a bag", "a handbag"),
    ("an ankle boot", "a boot"),
)  # fmt: skip
_FASHION_LABELS_CRC32 = 0x2ED6E46A  # of the 60,000 training labels, which tell this set from others in the same files


@dataclass(frozen=True)
class IdxData:
    """A folder of IDX files, packed by gzip or not.

    Training files have "train" in their names, held-out ones "t10k" or "test"; without those, a tenth of the rows is
    held out by the hash of its number. Debian's dataset-fashion-mnist installs into the default folder.
    """

    path: str = "/usr/share/datasets/fashion-mnist"
    kind: ClassVar[str] = "idx"


def _read(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes with so many dimensions. Raises UserError where the file is not exactly that."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise UserError(f"{path} is no IDX file: {len(data)} bytes are shorter than its header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:start])
    if magic != 0x0800 + dimensions:
        raise UserError(
            f"{path} begins with {magic:#010x}; an IDX file of bytes in {dimensions} dimensions begins with "
            f"{0x0800 + dimensions:#010x}"
        )
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected or 0 in shape:
        sizes = " x ".join(map(str, shape))
        raise UserError(f"{path} says {sizes} and should have {expected} bytes; it has {len(data)}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def _find(folder: Path, part: str, dimensions: int) -> Path | None:
    """The file of pictures (3 dimensions) or labels (1) of a part; unpacked before packed. UserError where several."""
    wanted = re.compile(rf"({part}).*idx{dimensions}-ubyte(\.gz)?$", re.IGNORECASE)
    found = [path for path in sorted(folder.iterdir()) if wanted.search(path.name)]
    names = {path.name.removesuffix(".gz") for path in found}
    if len(names) > 1:
        raise UserError(f"{folder} holds several sets: {', '.join(sorted(names))}; give each a folder of its own")
    return min(found, key=lambda path: path.suffix == ".gz") if found else None


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor | None] | None:
    """(pictures [rows, 1, height, width], labels int64 [rows] or None) of a part; None where there is no such file."""
    path = _find(folder, part, 3)
    if path is None:
        return None
    pixels = _read(path, 3)[:, None]
    labels_path = _find(folder, part, 1)
    if labels_path is None:
        return pixels, None
    labels = _read(labels_path, 1).long()
    if len(labels) != len(pixels):
        raise UserError(f"{path} has {len(pixels)} pictures and {labels_path} {len(labels)} labels")
    return pixels, labels


def list_idx(config: IdxData) -> Listing:
    """The pictures of a folder of IDX files. Raises UserError for missing and damaged files."""
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(
            f"data.path={config.path!r} is no folder: give one with IDX files, or install Fashion-MNIST by "
            "`apt install dataset-fashion-mnist`"
        )
    training = _read_part(folder, "train")
    if training is None:
        raise UserError(
            f"data.path={config.path!r} holds no training pictures: no file such as train-images-idx3-ubyte"
        )
    test = _read_part(folder, "t10k|test")
    pixels, labels = training
    count = len(pixels)
    keys = [f"train/{i:05}" for i in range(count)]
    if test is not None:
        if test[0].shape[1:] != pixels.shape[1:] or (test[1] is None) != (labels is None):
            raise UserError(
                f"data.path={config.path!r}: training and test files differ in their pictures' size or labels"
            )
        pixels = torch.cat([pixels, test[0]])
        keys += [f"test/{i:05}" for i in range(len(test[0]))]
        held_out = torch.arange(len(pixels)) >= count
    else:
        held_out = held_out_by_key(keys, 0.1)
    names: tuple[str, ...] = ()
    captions = None
    if labels is not None:
        fashion = zlib.crc32(labels.to(torch.uint8).numpy().tobytes()) == _FASHION_LABELS_CRC32
        if test is not None and test[1] is not None:
            labels = torch.cat([labels, test[1]])
        names = _FASHION_MNIST if fashion else tuple(str(i) for i in range(int(labels.max()) + 1))
        captions = [_FASHION_CAPTIONS[label] for label in labels.tolist()] if fashion else None
    return Listing(
        origin=f"the IDX files in {folder}",
        keys=keys,
        read_bytes=lambda row, limit: pgm_bytes(pixels[row])[:limit],
        held_out=held_out,
        class_labels=labels,
        class_names=names,
        captions=captions,
        pixels=pixels,
    )
