"""One accepted picture as its caller sees it: what has happened to it, and a way to drop it."""

import asyncio
from collections.abc import AsyncIterator, Callable

from smalti.serving.messages import ModelCard, PictureEvent, Preview
from smalti.serving.service import TERMINAL


class PictureTicket:
    """A picture's events, kept until they are fetched; implements service.Ticket.

    cancel_picture, place_of: what the service does when asked. A preview that was not fetched gives way to the next.
    """

    def __init__(
        self,
        number: int,
        card: ModelCard,
        cancel_picture: Callable[[int], None],
        place_of: Callable[[int], int | None],
    ) -> None:
        self.number, self.card = number, card
        self._cancel, self._place = cancel_picture, place_of
        self._events: list[PictureEvent] = []
        self._news = asyncio.Event()
        self.ended = False

    def add(self, event: PictureEvent) -> None:
        """Something happened. After a terminal event nothing does."""
        assert not self.ended
        if isinstance(event, Preview):
            self._events = [e for e in self._events if not isinstance(e, Preview)]
        self.ended = isinstance(event, TERMINAL)
        self._events.append(event)
        self._news.set()

    async def events(self) -> AsyncIterator[PictureEvent]:
        """What happens to it, the terminal event last."""
        while True:
            while self._events:
                event = self._events.pop(0)
                yield event
                if isinstance(event, TERMINAL):
                    return
            self._news.clear()
            await self._news.wait()

    def cancel(self) -> None:
        """Drop it."""
        self._cancel(self.number)

    @property
    def place(self) -> int | None:
        """Pictures of its model that are before it; None when it has ended."""
        return self._place(self.number)
