"""Pictures that somebody watches while they are drawn: the events of several tickets as one stream."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from smalti.serving.messages import Failed, Finished, PictureEvent, PictureOrder, Preview
from smalti.serving.service import TERMINAL, Ticket


@dataclass(frozen=True)
class Watched:
    """One picture and what is known of it."""

    order: PictureOrder
    ticket: Ticket
    preview: Preview | None = None
    end: Finished | Failed | None = None

    def after(self, event: PictureEvent) -> "Watched":
        """The same picture when the event has happened."""
        if isinstance(event, Preview):
            return replace(self, preview=event)
        if isinstance(event, TERMINAL):
            return replace(self, end=event)
        return self


async def watch(pictures: Sequence[Watched], pulse: float = 0.5) -> AsyncGenerator[list[Watched], None]:
    """The pictures after each news of any of them, and every `pulse` seconds without any, until all have ended.

    News that came while the caller was busy are told at once. Whoever stops to iterate, or whose task is cancelled,
    cancels the pictures that have not ended.
    """
    news: asyncio.Queue[tuple[int, PictureEvent]] = asyncio.Queue()

    async def listen(index: int, ticket: Ticket) -> None:
        try:
            async for event in ticket.events():
                news.put_nowait((index, event))
        except Exception as error:  # or the page would wait for ever
            news.put_nowait((index, Failed(ticket.number, "internal_error", str(error))))

    now = list(pictures)
    listeners = [asyncio.create_task(listen(i, picture.ticket)) for i, picture in enumerate(now)]
    try:
        while any(picture.end is None for picture in now):
            yield list(now)
            with contextlib.suppress(TimeoutError):
                index, event = await asyncio.wait_for(news.get(), pulse)
                now[index] = now[index].after(event)
            while not news.empty():
                index, event = news.get_nowait()
                now[index] = now[index].after(event)
        yield list(now)
    finally:
        for picture, listener in zip(now, listeners, strict=True):
            listener.cancel()
            if picture.end is None:
                picture.ticket.cancel()
