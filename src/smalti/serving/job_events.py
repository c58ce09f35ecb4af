"""What happens to a job, as its listeners are told: numbered, kept while the job lives, and resumable by number."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from smalti.serving.job_schemas import picture_url
from smalti.serving.store_tables import Job, JobPicture

# Numbers grow over a server's death too: those of attempt k begin at k times this.
EVENTS_PER_ATTEMPT = 1_000_000


@dataclass(frozen=True)
class JobEvent:
    """kind: queued, running, progress, preview, picture, succeeded, failed or cancelled.

    data: of JSON's types. image: a preview's file. slot: an event takes the place of an older one with the same, so
    that a listener who is slow, or comes late, gets the latest only.
    """

    number: int
    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None
    slot: str | None = None


class EventLog:
    """The events of a job that lives. Any number of listeners, each at its own pace, and none is waited for."""

    def __init__(self, attempt: int, before: list[JobEvent]) -> None:
        self._events = before
        self._number = attempt * EVENTS_PER_ATTEMPT
        self._news = asyncio.Event()
        self._closed = False

    @property
    def next_number(self) -> int:
        """The number of the event that tell takes next."""
        return self._number + 1

    def tell(self, kind: str, data: dict[str, Any], image: bytes | None = None, slot: str | None = None) -> None:
        """Add an event."""
        self._number += 1
        if slot is not None:
            self._events = [event for event in self._events if event.slot != slot]
        self._events.append(JobEvent(self._number, kind, data, image, slot))
        self._wake()

    def tell_if_new(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event in the place of the last of its kind, unless that told the same."""
        if not any(event.slot == kind and event.data == data for event in self._events):
            self.tell(kind, data, slot=kind)

    def close(self) -> None:
        """Let the listeners go when they have been told everything."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def after(self, number: int) -> AsyncGenerator[JobEvent, None]:
        """The events with higher numbers, those to come too."""
        while True:
            news, closed = self._news, self._closed
            # Looked for anew each time: while a slow listener took the last, previews may have been replaced.
            event = next((event for event in self._events if event.number > number), None)
            if event is not None:
                number = event.number
                yield event
            elif closed:
                return
            else:
                await news.wait()


def picture_event(job: str, picture: JobPicture) -> JobEvent:
    """A picture is done, and can be fetched."""
    data = {
        "index": picture.index,
        "seed": picture.seed,
        "size": f"{picture.width}x{picture.height}",
        "model": picture.card,
        "url": picture_url(job, picture.index),
    }
    return JobEvent(picture.event, "picture", data)


def terminal_data(job: Job) -> dict[str, Any]:
    """What the last event tells beside the state."""
    error = None
    if job.error is not None:
        error = {"code": job.error.code, "message": job.error.message, "param": job.error.param}
    return {"finished": len(job.pictures), "n": len(job.orders), "error": error}


def events_of_ended(job: Job) -> Iterator[JobEvent]:
    """What of a job's events lasts: the server that told them may be gone."""
    yield JobEvent(EVENTS_PER_ATTEMPT + 1, "queued", {"attempt": 1})
    if job.started is not None:
        yield JobEvent(EVENTS_PER_ATTEMPT + 2, "running")
    for picture in sorted(job.pictures, key=lambda p: p.event):
        yield picture_event(job.id, picture)
    if job.finished:
        yield JobEvent(job.last_event, job.status, terminal_data(job))
