"""A job that a server has in hand: its state, its events, and what of it the store has not taken yet."""

import asyncio
import logging
from collections import deque

from smalti.serving.job_events import EventLog, picture_event
from smalti.serving.service import Ticket, Unavailable
from smalti.serving.store import Operation, Store
from smalti.serving.store_tables import Job

_log = logging.getLogger(__name__)


class LiveJob:
    """All that changes it holds its lock, so that what happens is stored and told in one order.

    attempt: that its events are numbered by. files: of pictures that the store has not taken yet.
    """

    def __init__(self, job: Job, attempt: int) -> None:
        self.job = job
        before = sorted((picture_event(job.id, p) for p in job.pictures), key=lambda e: e.number)
        self.log = EventLog(attempt, before)
        self.lock = asyncio.Lock()
        self.tickets: list[Ticket] = []
        self.unwritten: deque[Operation[bool | None]] = deque()
        self.files: dict[int, bytes] = {}

    @property
    def place(self) -> int | None:
        """Pictures before the first of its own, None when it has ended."""
        return min((ticket.place for ticket in self.tickets if ticket.place is not None), default=None)

    async def write(self, store: Store, operation: Operation[bool | None]) -> bool:
        """Write now or, where the store has no room, later and in order; False where the store said no."""
        assert self.lock.locked()
        if not self.unwritten:
            try:
                return await store.write(operation) is not False
            except Unavailable as error:
                _log.warning("job %s: %s; kept in memory until there is room", self.job.id, error)
        self.unwritten.append(operation)
        return True

    async def flush(self, store: Store) -> bool:
        """Write what found no room before; whether there was room for all of it."""
        async with self.lock:
            try:
                while self.unwritten:
                    await store.write(self.unwritten[0])
                    self.unwritten.popleft()
            except Unavailable:
                return False
            self.files.clear()
            return True
