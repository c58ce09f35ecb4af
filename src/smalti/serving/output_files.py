"""Pictures that were asked for as URLs: kept in memory, bounded in bytes and in time, under ids nobody can guess."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFile:
    """A file and what it is. expires: on the store's clock."""

    content: bytes
    media_type: str
    expires: float


class OutputFiles:
    """Files for a while: the oldest go first where there is no room. Used from one event loop."""

    def __init__(self, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.max_bytes, self.clock = seconds, max_bytes, clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self.bytes_held = 0

    def add(self, content: bytes, media_type: str) -> str:
        """Keep a file; returns its id. Raises ValueError for one that is larger than the whole store."""
        if len(content) > self.max_bytes:
            raise ValueError(f"a file of {len(content)} bytes is larger than the store of {self.max_bytes}")
        self._drop_expired()
        while self.bytes_held + len(content) > self.max_bytes:
            self._drop_oldest()
        file_id = f"file-{secrets.token_urlsafe(24)}"
        self._files[file_id] = StoredFile(content, media_type, self.clock() + self.seconds)
        self.bytes_held += len(content)
        return file_id

    def get(self, file_id: str) -> StoredFile | None:
        """The file, or None where it never was or is gone."""
        self._drop_expired()
        return self._files.get(file_id)

    def seconds_left(self, file: StoredFile) -> int:
        """For how long a file is still kept."""
        return max(int(file.expires - self.clock()), 0)

    def _drop_expired(self) -> None:
        # All live equally long, so the first in is the first to go.
        while self._files and next(iter(self._files.values())).expires <= self.clock():
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self.bytes_held -= len(file.content)
