"""WebDataset shards: tar files whose members of one name are a sample (cat.jpg, cat.txt, cat.json, cat.cls).

The webdataset library reads shards as a stream, and has no indexed access; a run that resumes at any step needs it. So
the members' offsets are read once, and a picture is then a slice of its shard. Grouping is the library's: a sample's
key is the member's path up to the first dot of its name, and its members follow each other.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from smalti.data.decode import Fit
from smalti.data.listing import (
    PICTURE_SUFFIXES,
    Listing,
    as_captions,
    captions_or_none,
    check_share,
    held_out_by_key,
    labels_of,
)
from smalti.errors import UserError

_MEMBER = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")
_TEXT_FIELDS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class TarData:
    """WebDataset shards, uncompressed: a folder of .tar files, one file, or a pattern such as "shards/{000..127}.tar".

    A caption is a sample's .txt, or `text`, `caption` or `prompt` of its .json; its label is its .cls or the .json's
    `label`. About the share `held_out` is held out, by the hash of the samples' keys.
    """

    path: str = ""
    fit: Fit = "crop"
    held_out: float = 0.02
    kind: ClassVar[str] = "tar"

    def __post_init__(self) -> None:
        check_share(self.held_out)


@dataclass(frozen=True)
class _Member:
    """Where a member's bytes lie in its shard."""

    shard: Path
    offset: int
    size: int

    def read(self, limit: int | None = None) -> bytes:
        wanted = self.size if limit is None else min(limit, self.size)
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            data = file.read(wanted)
        if len(data) < wanted:
            raise OSError(f"{self.shard} ends within it")
        return data


@dataclass(frozen=True)
class _Sample:
    """Members of one key, by their suffix in lower case."""

    key: str
    members: Mapping[str, _Member] = field(default_factory=dict)


def _shards(path: str) -> list[Path]:
    """The files that a path or a pattern means, sorted. Raises UserError where one is not there."""
    if not path:
        raise UserError(
            "data.path is empty: give a .tar file, a folder of them, or a pattern such as shards/{000..127}.tar"
        )
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
        if not found:
            raise UserError(f"data.path={path!r} holds no .tar files")
        return found
    names = [path]
    if "{" in path:
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise UserError("a pattern of shards needs the package braceexpand: pip install 'smalti[data]'") from None
        names = list(braceexpand(path))
    elif glob.has_magic(path):
        names = sorted(glob.glob(path))
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        few = ", ".join(missing[:3])
        raise UserError(f"data.path={path!r}: {len(missing)} of {len(names)} shards are not there{few and ': ' + few}")
    return [Path(name) for name in names]


def _ends_whole(shard: Path) -> bool:
    """Whether the file ends as tar files do, with two blocks of zeros. (tarfile reads one cut between members too.)"""
    with shard.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 1024))
        return not any(file.read())


def _samples(shard: Path, skipped: list[tuple[str, str]]) -> Iterator[_Sample]:
    """The samples of a shard, in order; of a damaged one those before the damage, without the last, which may lack
    members. Raises UserError for a file that is no tar file at all."""
    key, members = "", dict[str, _Member]()
    damage = "" if _ends_whole(shard) else "it is cut off"
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                match = _MEMBER.match(info.name)
                if not info.isreg() or not match:
                    continue
                if match[1] != key:
                    if members:
                        yield _Sample(key, members)
                    key, members = match[1], {}
                members[match[2].lower()] = _Member(shard, info.offset_data, info.size)
    except tarfile.ReadError as error:
        damage = str(error)
        if not key:
            with shard.open("rb") as file:
                hint = ": unpack it first" if file.read(2) == b"\x1f\x8b" else ""
            raise UserError(f"{shard} is no uncompressed tar file ({error}){hint}") from None
    if damage:
        skipped.append((str(shard), f"damaged in the sample {key}, the rest is left out: {damage}"))
    elif members:
        yield _Sample(key, members)


def _picture(sample: _Sample) -> _Member | None:
    """The sample's picture: key.jpg before key.left.jpg, and of several the first by suffix."""
    suffixes = [suffix for suffix in sample.members if suffix.rpartition(".")[2] in PICTURE_SUFFIXES]
    return sample.members[min(suffixes, key=lambda suffix: ("." in suffix, suffix))] if suffixes else None


def _annotations(sample: _Sample) -> tuple[tuple[str, ...], str | int | None]:
    """(captions, label) of a sample. Raises ValueError for what does not parse."""
    body = json.loads(sample.members["json"].read()) if "json" in sample.members else {}
    if not isinstance(body, dict):
        body = {}
    text: object = next((body[name] for name in _TEXT_FIELDS if body.get(name)), None)
    if "txt" in sample.members:
        text = sample.members["txt"].read().decode(errors="replace")
    label = body.get("label")
    if "cls" in sample.members:
        label = int(sample.members["cls"].read())
    return as_captions(text), label if isinstance(label, (str, int)) else None


def list_tar(config: TarData) -> Listing:
    """The samples of the shards. Raises UserError for shards that are not there or no tar files, and for none with a
    picture."""
    skipped: list[tuple[str, str]] = []
    keys: list[str] = []
    pictures: list[_Member] = []
    captions: list[tuple[str, ...]] = []
    labels: list[str | int | None] = []
    for shard in _shards(config.path):
        for sample in _samples(shard, skipped):
            key = f"{shard.name}/{sample.key}"
            picture = _picture(sample)
            if picture is None:
                skipped.append((key, "no picture among its members: " + ", ".join(sample.members)))
                continue
            try:
                caption, label = _annotations(sample)
            except (ValueError, OSError) as error:
                skipped.append((key, f"its text cannot be read: {error}"))
                continue
            keys.append(key)
            pictures.append(picture)
            captions.append(caption)
            labels.append(label)
    if not keys:
        reason = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UserError(f"data.path={config.path!r}: the shards hold no sample with a picture{reason}")
    class_labels, class_names = labels_of(labels)
    return Listing(
        origin=f"the shards {config.path}",
        keys=keys,
        read_bytes=lambda row, limit: pictures[row].read(limit),
        held_out=held_out_by_key(keys, config.held_out),
        class_labels=class_labels,
        class_names=class_names,
        captions=captions_or_none(captions),
        fit=config.fit,
        skipped=tuple(skipped),
    )
