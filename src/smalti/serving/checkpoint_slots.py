"""Checkpoints of pictures in memory that a parent and its worker share, so that a killed worker loses no step twice.

The parent makes anonymous memory and hands its file descriptor to the worker: there is no name that anybody would have
to remove, whoever dies. Each slot has two halves that are written in turn; a half that was torn by a kill fails its
checksum and the other is read. Beside them stands which pictures were in a forward when the process died: only those
can have killed it.
"""

import mmap
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass

# Number of the picture, number of the write, bytes, CRC-32 of all that and of the bytes.
_HEADER = struct.Struct("<QQQI")
# Number of the picture whose forward runs, and the network call that it is at; 0 where none does.
_MARK = struct.Struct("<QQ")


def anonymous_memory(size: int) -> int:
    """A file descriptor of `size` bytes of memory without a name; the caller closes it. Raises OSError."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("smalti", os.MFD_CLOEXEC)
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


@dataclass
class CheckpointSlots:
    """`count` slots for checkpoints of at most `largest` bytes. One process writes, another reads after its death.

    Pictures' numbers begin with 1.
    """

    descriptor: int
    count: int
    largest: int

    def __post_init__(self) -> None:
        self._memory = mmap.mmap(self.descriptor, self.size_of(self.count, self.largest))
        self._writes = [0] * self.count

    @staticmethod
    def size_of(count: int, largest: int) -> int:
        """Bytes of memory that so many slots take."""
        return count * (2 * (_HEADER.size + largest) + _MARK.size)

    def _place(self, slot: int, half: int) -> int:
        assert 0 <= slot < self.count
        return (2 * slot + half) * (_HEADER.size + self.largest)

    def _mark_place(self, slot: int) -> int:
        return self.count * 2 * (_HEADER.size + self.largest) + slot * _MARK.size

    def mark(self, slot: int, number: int, call: int) -> None:
        """Say that the forward of picture `number` for its network call `call` begins; unmark says that it ended."""
        _MARK.pack_into(self._memory, self._mark_place(slot), number, call)

    def unmark(self, slot: int) -> None:
        """No forward of the slot's picture is running."""
        _MARK.pack_into(self._memory, self._mark_place(slot), 0, 0)

    def marked_call(self, slot: int, number: int) -> int | None:
        """The network call that picture `number` was at in a forward that never ended; None where it was in none."""
        owner, call = _MARK.unpack_from(self._memory, self._mark_place(slot))
        return int(call) if owner == number else None

    def write(self, slot: int, number: int, state: bytes) -> bool:
        """Keep the state of picture `number`; False where it is larger than a slot, and the older one stays."""
        if len(state) > self.largest:
            return False
        self._writes[slot] += 1
        place = self._place(slot, self._writes[slot] % 2)
        checksum = _checksum(number, self._writes[slot], state)
        self._memory[place + _HEADER.size : place + _HEADER.size + len(state)] = state
        _HEADER.pack_into(self._memory, place, number, self._writes[slot], len(state), checksum)
        return True

    def read(self, slot: int, number: int) -> bytes | None:
        """The newest whole state of picture `number` in its slot; None where there is none."""
        found: tuple[int, bytes] | None = None
        for half in (0, 1):
            place = self._place(slot, half)
            owner, write, length, checksum = _HEADER.unpack_from(self._memory, place)
            if owner != number or length > self.largest or (found is not None and write <= found[0]):
                continue
            state = self._memory[place + _HEADER.size : place + _HEADER.size + length]
            if _checksum(owner, write, state) == checksum:
                found = write, state
        return None if found is None else found[1]

    def close(self) -> None:
        """Give the memory back, when the other process has closed its own view of it too."""
        self._memory.close()
        os.close(self.descriptor)


def _checksum(number: int, write: int, state: bytes) -> int:
    return zlib.crc32(state, zlib.crc32(struct.pack("<QQQ", number, write, len(state))))
