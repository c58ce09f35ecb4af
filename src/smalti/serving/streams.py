"""Waiting for pictures while somebody listens: whole answers, and server-sent events with previews.

Who goes away takes its pictures along: both kinds watch the connection while they wait. A stream holds one event a
picture at most; the next is fetched when the client has taken the last, and a ticket leaves previews out meanwhile.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smalti.serving.api_errors import ApiError, of_exception, of_failure
from smalti.serving.messages import Failed, Finished, PictureEvent, Preview
from smalti.serving.service import TERMINAL, Ticket

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Event = TypeVar("Event")
SourceEvent = TypeVar("SourceEvent", covariant=True)
# An event's name and data, and a number to resume behind where the stream can be resumed.
EventText = Callable[[int, Event], tuple[str, str] | tuple[str, str, int]]


class EventSource(Protocol[SourceEvent]):
    """What a stream of server-sent events is made of."""

    def pictures(self) -> AsyncGenerator[tuple[int, SourceEvent], None]:
        """The events, each with its place or number."""
        ...

    async def close(self) -> None:
        """Nobody listens any more."""
        ...


async def client_gone(receive: Receive) -> None:
    """Return when the connection is closed. To be awaited after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(work: Awaitable[Result], receive: Receive) -> Result:
    """The work's result; it is cancelled when the client goes away. Raises ApiError 499 then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(client_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client closed the connection", code="cancelled")
    finally:
        await _stopped([working, leaving])


async def all_finished(tickets: Sequence[Ticket]) -> list[Finished]:
    """What the tickets end with, in their order. Raises ApiError with the first failure; the others are cancelled."""
    waiting = [asyncio.create_task(_finished(ticket)) for ticket in tickets]
    try:
        return await asyncio.gather(*waiting)
    finally:
        await _stopped(waiting)
        cancel_all(tickets)


async def _finished(ticket: Ticket) -> Finished:
    last: PictureEvent | None = None
    async for event in ticket.events():
        last = event
    if isinstance(last, Failed):
        raise of_failure(last)
    assert isinstance(last, Finished), f"ticket {ticket.number} has no end"
    return last


def cancel_all(tickets: Iterable[Ticket]) -> None:
    """Cancel what has not ended."""
    for ticket in tickets:
        ticket.cancel()


class PictureStream:
    """The events of several tickets, merged as they come. To be opened, then iterated, then closed."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self.tickets = tickets
        self._events = [ticket.events() for ticket in tickets]
        self._fetching: dict[asyncio.Task[PictureEvent], int] = {}

    async def open(self) -> None:
        """Wait until each order was found sound. Raises ApiError for the first that was not."""
        for events in self._events:
            event = await anext(events)
            if isinstance(event, Failed):
                raise of_failure(event)
        self._fetching = {self._fetch(i): i for i in range(len(self.tickets))}

    def _fetch(self, i: int) -> asyncio.Task[PictureEvent]:
        async def fetch() -> PictureEvent:
            return await anext(self._events[i])

        return asyncio.create_task(fetch())

    async def pictures(self) -> AsyncGenerator[tuple[int, Preview | Finished], None]:
        """Previews and pictures, each with its ticket's place. Raises ApiError with the first failure."""
        while self._fetching:
            done, _ = await asyncio.wait(self._fetching, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i, event = self._fetching.pop(task), task.result()
                if isinstance(event, Failed):
                    raise of_failure(event)
                if isinstance(event, Preview | Finished):
                    yield i, event
                if not isinstance(event, TERMINAL):
                    self._fetching[self._fetch(i)] = i

    async def close(self) -> None:
        """Cancel what has not ended."""
        await _stopped(self._fetching)
        cancel_all(self.tickets)


class EventStreamResponse(Response):
    """Server-sent events of an opened stream. Closes it at the end, when the client goes and when it does not read.

    text(place, event) gives an event's name and data. ping_seconds: between comments while nothing comes.
    stall_seconds: for the client to take an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, stream: EventSource[Event], text: EventText[Event], ping_seconds: float, stall_seconds: float
    ) -> None:
        self.stream: EventSource[Any] = stream
        self.text: EventText[Any] = text
        self.ping_seconds, self.stall_seconds = ping_seconds, stall_seconds
        super().__init__(None, 200, {"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""

        async def write(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self.stall_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        state = scope.setdefault("state", {})
        leaving = asyncio.create_task(client_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._parts(leaving)) as parts:
                async for part in parts:
                    await write(part)
            if not leaving.done():
                await write(b"", more=False)
        except TimeoutError:
            state["error_code"] = "client_stalled"
            _log.info("a stream's client took nothing for %s s: dropped", self.stall_seconds)
        except Exception as error:
            if not isinstance(error, ApiError):
                _log.exception("a stream broke")
            answer = of_exception(error)
            state["error_code"] = answer.code
            await write(format_sse_event(event="error", data_str=json.dumps(answer.body())))
            await write(b"", more=False)
        finally:
            await _stopped([leaving])
            await self.stream.close()

    async def _parts(self, leaving: asyncio.Task[None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.stream.pictures()) as pictures:
            while True:
                coming = asyncio.ensure_future(_next(pictures))
                try:
                    while not coming.done():
                        await asyncio.wait(
                            {coming, leaving}, timeout=self.ping_seconds, return_when=asyncio.FIRST_COMPLETED
                        )
                        if leaving.done():
                            return
                        if not coming.done():
                            yield KEEPALIVE_COMMENT
                finally:
                    await _stopped([coming])
                found = coming.result()
                if found is None:
                    return
                name, data, *number = self.text(*found)
                yield format_sse_event(event=name, data_str=data, id=str(number[0]) if number else None)


async def _next(pictures: AsyncIterator[Result]) -> Result | None:
    return await anext(pictures, None)


async def _stopped(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended, however they do."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
