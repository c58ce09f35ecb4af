"""A cache of tensors by content: what an encoder made of a picture or a caption, computed once.

    CACHE/shard-00000001.safetensors ...   immutable; appear whole, by rename
    CACHE/lock                             held while a process fills the cache

An entry is a few named tensors under a key: the SHA-256 of all that decides its values (picture_key, text_key). Each
shard's header lists its entries with a checksum over key, names, types, shapes and bytes. The index is read from the
headers whenever the cache is opened; there is none on the disk that could disagree with them. A key that is in two
shards, because its first entry was damaged, is read from the newer one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smalti.data.durable import publish
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError

Entry = Mapping[str, Tensor]  # named tensors on the CPU

_PATTERN, PARTIAL = "shard-????????.safetensors", ".partial-shard.safetensors"
_ENTRIES = "entries"  # the header's field: {key: [checksum, tensor name, ...]}
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError)


class CacheDamage(UserError):
    """An entry or a shard whose bytes are not those that were written; the message names the file."""


class MissingEntry(UserError):
    """A key that the cache does not have."""


def picture_key(content: str, encoder: str, transform: Mapping[str, object], *, flipped: bool = False) -> str:
    """The key of a picture's moments.

    content: SHA-256 of the file's bytes. encoder: the encoder's fingerprint. transform: what is done to the pixels
    before the encoder sees them (size, crop, channels), as JSON can hold it. flipped: whether the encoder sees the
    picture's mirror image.
    """
    return _key("picture", content, encoder, dict(transform), flipped)


def text_key(caption: str, encoder: str) -> str:
    """The key of a caption's features. encoder: the text encoder's fingerprint, its length limit included."""
    return _key("text", caption, encoder)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """The entries of a cache folder at the time it was opened, memory-mapped, each checked when it is first read.

    damaged_shards: files of which not even the header can be read. Needs no lock: shards never change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged_shards: list[Path] = []
        self._places: dict[str, tuple[Path, str, tuple[str, ...]]] = {}  # key -> shard, checksum, tensor names
        self._open: dict[Path, Any] = {}
        self._checked: set[str] = set()
        for shard in sorted(folder.glob(_PATTERN)):
            try:
                self._places |= _shard_entries(shard)
            except FileNotFoundError:  # found damaged by another process, and set aside
                continue
            except _UNREADABLE:
                self.damaged_shards.append(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def tensor_names(self, key: str) -> tuple[str, ...]:
        """Names of an entry's tensors, unread; () for a key that is not there, too."""
        return self._places[key][2] if key in self._places else ()

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, views of the mapped file: not to be changed in place.

        Raises CacheDamage where their bytes are not those that were written, MissingEntry where there is none.
        """
        if key not in self._places:
            raise MissingEntry(f"{self.folder} has no entry {key[:12]}...: fill the cache again (`smalti data cache`)")
        shard, checksum, names = self._places[key]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(shard, "pt")
            entry = {name: self._open[shard].get_tensor(f"{key}/{name}") for name in names}
        except (*_UNREADABLE, OSError) as error:
            raise _damage(shard, key, str(error)) from None
        if key not in self._checked:
            if fingerprint(key, entry) != checksum:
                raise _damage(shard, key, "its checksum does not match")
            self._checked.add(key)
        return entry


def _damage(shard: Path, key: str, what: str) -> CacheDamage:
    return CacheDamage(f"{shard} is damaged at entry {key[:12]}...: {what}; `smalti data cache` encodes it again")


def _shard_entries(shard: Path) -> dict[str, tuple[Path, str, tuple[str, ...]]]:
    with safe_open(shard, "pt") as file:
        listed = json.loads((file.metadata() or {})[_ENTRIES])
        return {str(key): (shard, str(checksum), tuple(names)) for key, (checksum, *names) in listed.items()}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies as safetensors takes them: contiguous, and no two of them in one memory, as rows of a batch are."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def write_shard(folder: Path, entries: Mapping[str, Entry]) -> Path:
    """Write the next shard. Raises OSError (disk full, read-only), which leaves no trace of it.

    Only who fills the cache may call this (filling.py holds the lock).
    """
    newest = max((int(path.name[6:14]) for path in folder.glob("shard-????????.*")), default=0)
    target, partial = folder / f"shard-{newest + 1:08d}.safetensors", folder / PARTIAL
    listed = {key: [fingerprint(key, entry), *entry] for key, entry in entries.items()}
    tensors = {f"{key}/{name}": tensor for key, entry in entries.items() for name, tensor in entry.items()}
    try:
        save_file(storable(tensors), partial, metadata={_ENTRIES: json.dumps(listed)})
        publish(partial, target)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {partial}: {error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target
