"""A PictureService over engines that are replicas of Ray Serve. Neither Ray nor torch is imported here.

The API's replica holds the truth about what it has accepted: an order whose replica is lost is sent again, with its
newest checkpoint, to whichever replica has the least work. Its seed was fixed when it was accepted, so the picture is
the same.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import msgspec

from smalti.errors import UserError, unknown_name
from smalti.serving.messages import (
    Admitted,
    Draw,
    Failed,
    FailureCode,
    Finished,
    ModelCard,
    PictureEvent,
    PictureOrder,
    Preview,
)
from smalti.serving.queue_bound import QueueBound, expected_cost
from smalti.serving.ray_messages import Beat, Checkpoint, FromReplica
from smalti.serving.service import TERMINAL, NotReady, ServiceState, ShuttingDown, Ticket, WorkerState
from smalti.serving.ticket import PictureTicket

_log = logging.getLogger("smalti.serving")
_DECODER: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)
_FORGET_SECONDS = 30.0  # after which a replica that was not heard of is not told of any more


class ReplicaStream(Protocol):
    """What a replica says of one picture. It raises whatever Ray raises when the replica is lost."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Encoded ray_messages.FromReplica."""
        ...

    def cancel(self) -> None:
        """Drop the picture."""
        ...


OpenStream = Callable[[bytes, str, float], ReplicaStream]
"""EngineReplica.draw of some replica: a Draw, the weights' version and the cost -> its stream."""


@dataclass(frozen=True)
class RayServiceSettings:
    """cost_limit: rows x tokens x network calls that one replica of the API accepts. most_losses: replicas that may be
    lost under a picture before it is given up. first_backoff: seconds before it is sent again, doubled each time.
    """

    cost_limit: float = 2e6
    most_losses: int = 5
    first_backoff: float = 0.05
    max_backoff: float = 5.0


@dataclass
class _Accepted:
    """What is known of a picture that has not ended."""

    number: int
    order: PictureOrder
    ticket: PictureTicket
    open_stream: OpenStream
    cost: float
    accepted: float
    resume: bytes | None = None
    admitted: bool = False
    previews: int = 0  # told
    losses: int = 0
    stream: ReplicaStream | None = None
    task: "asyncio.Task[None] | None" = None


class RayPictureService:
    """Implements service.VersionedService, of which versions come by set_engines alone. Lives on one event loop."""

    def __init__(self, settings: RayServiceSettings | None = None) -> None:
        self.settings = settings or RayServiceSettings()
        self._engines: dict[str, tuple[ModelCard, OpenStream]] = {}  # by card's key, the newest of a name last
        self._pictures: dict[int, _Accepted] = {}
        self._beats: dict[str, tuple[float, str, Beat]] = {}  # by replica: when, of which card
        self._totals: dict[str, Beat] = {}  # by replica, also of those that are gone
        self._numbers = count(1)
        self._bound = QueueBound(self.settings.cost_limit)
        self._finished = 0  # pictures
        self._draining = False

    # --- models

    def set_engines(self, engines: Sequence[tuple[ModelCard, OpenStream]]) -> None:
        """Serve these versions and no others. What was accepted for one that is not among them goes on."""
        self._engines = {card.key: (card, open_stream) for card, open_stream in engines}

    def cards(self) -> Sequence[ModelCard]:
        """The versions that take requests, the newest of a name last."""
        return tuple(card for card, _ in self._engines.values())

    def _engine(self, model: str) -> tuple[ModelCard, OpenStream]:
        for card, open_stream in reversed(self._engines.values()):
            if model in (card.name, card.key):
                return card, open_stream
        if not self._engines:
            raise NotReady("no engine is up yet", 2.0)
        raise unknown_name("model", model, {card.name for card, _ in self._engines.values()})

    async def add_version(self, name: str, run: Path) -> ModelCard:
        """Versions on Ray are applications, which are deployed from outside. Raises UserError that says so."""
        raise UserError(f"{name}: on Ray, versions are added by deploying them: `smalti serve --ray` with {run}")

    async def retire_version(self, key: str) -> None:
        """See add_version. Raises UserError."""
        raise UserError(f"{key}: on Ray, versions are retired by deploying the others: `smalti serve --ray`")

    # --- pictures

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        """Accept all orders or none. Raises UserError, QueueFull, NotReady or ShuttingDown."""
        if self._draining:
            raise ShuttingDown("the server is shutting down", 5.0)
        card, open_stream = self._engine(model)
        costs = [expected_cost(card, order) for order in orders]
        self._bound.check(self._cost, costs)
        tickets: list[Ticket] = []
        for order, cost in zip(orders, costs, strict=True):
            number = next(self._numbers)
            ticket = PictureTicket(number, card, self._cancel, self._place_of)
            picture = _Accepted(number, order, ticket, open_stream, cost, time.monotonic())
            self._pictures[number] = picture
            picture.task = asyncio.get_running_loop().create_task(self._draw(picture))
            tickets.append(ticket)
        return tickets

    @property
    def _cost(self) -> float:
        return sum(picture.cost for picture in self._pictures.values())

    def _place_of(self, number: int) -> int | None:
        """Pictures of the same card that were accepted before and have not ended."""
        if number not in self._pictures:
            return None
        key = self._pictures[number].ticket.card.key
        return sum(other.ticket.card.key == key and n < number for n, other in self._pictures.items())

    def _cancel(self, number: int) -> None:
        picture = self._pictures.get(number)
        if picture is not None:
            self._fail(picture, "cancelled", "cancelled")
            if picture.stream is not None:
                picture.stream.cancel()
            assert picture.task is not None
            picture.task.cancel()

    def _fail(self, picture: _Accepted, code: FailureCode, message: str) -> None:
        self._end(picture, Failed(picture.number, code, message))

    def _end(self, picture: _Accepted, event: Finished | Failed) -> None:
        del self._pictures[picture.number]
        picture.ticket.add(event)
        if isinstance(event, Finished):
            self._bound.rate.add(event.cost)
            self._finished += 1

    async def _draw(self, picture: _Accepted) -> None:
        """Have the picture drawn, by as many replicas as it takes."""
        deadline = picture.order.deadline_seconds
        try:
            async with asyncio.timeout(None if deadline is None else deadline + 1.0):  # the engine's own comes first
                while not await self._drawn_by_a_replica(picture):
                    picture.losses += 1
                    if picture.losses > self.settings.most_losses:
                        message = f"{picture.losses} replicas were lost while they drew it"
                        self._fail(picture, "worker_lost", message)
                        return
                    waits = self.settings.first_backoff * 2 ** (picture.losses - 1)
                    await asyncio.sleep(min(self.settings.max_backoff, waits))
        except TimeoutError:
            if picture.stream is not None:
                picture.stream.cancel()
            self._fail(picture, "deadline_exceeded", f"it was not done in {deadline} s")
        except Exception as error:  # or its caller would wait for ever
            _log.exception("picture %d", picture.number)
            self._fail(picture, "internal_error", f"{type(error).__name__}: {error}")

    async def _drawn_by_a_replica(self, picture: _Accepted) -> bool:
        """Send the picture to a replica; False where that was lost before the picture ended."""
        order, replica = picture.order, ""
        if order.deadline_seconds is not None:  # of what is left of it
            left = order.deadline_seconds - (time.monotonic() - picture.accepted)
            order = msgspec.structs.replace(order, deadline_seconds=max(0.0, left))
        task = msgspec.msgpack.encode(Draw(picture.number, order, 0, picture.resume))
        try:
            picture.stream = picture.open_stream(task, picture.ticket.card.version, picture.cost)
            async for part in picture.stream:
                message = _DECODER.decode(part)
                if isinstance(message, Beat):
                    replica = message.replica
                    self.hear_of_replica(picture.ticket.card, message)
                elif isinstance(message, Checkpoint):
                    picture.resume = message.state
                else:
                    self._hear(picture, message)
                    if isinstance(message, TERMINAL):
                        return True
            reason = "its stream ended early"
        except Exception as error:  # what Ray raises depends on how the replica was lost
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._beats.pop(replica, None)
        _log.warning("replica %s is lost with picture %d: %s", replica or "(none)", picture.number, reason)
        return False

    def _hear(self, picture: _Accepted, event: PictureEvent) -> None:
        match event:
            case Admitted():
                if not picture.admitted:  # one that is sent again is admitted again
                    picture.admitted = True
                    picture.cost = event.cost
                    picture.ticket.add(event)
            case Preview():
                if event.index >= picture.previews:
                    picture.previews = event.index + 1
                    picture.ticket.add(event)
            case _:
                self._end(picture, event)

    def hear_of_replica(self, card: ModelCard, beat: Beat) -> None:
        """Take note of how a replica is."""
        self._beats[beat.replica] = (time.monotonic(), card.key, beat)
        self._totals[beat.replica] = beat

    # --- life

    async def drain(self, seconds: float) -> None:
        """Take nothing new and wait for what is there; what is left then fails with "shutting_down"."""
        self._draining = True
        tasks = [picture.task for picture in self._pictures.values() if picture.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for picture in list(self._pictures.values()):
            self._fail(picture, "shutting_down", "the server was shut down before the picture was done")
            assert picture.task is not None
            picture.task.cancel()

    def state(self) -> ServiceState:
        """As this replica of the API knows it: engines as they were when they last began or ended a picture of its."""
        now = time.monotonic()
        self._beats = {name: heard for name, heard in self._beats.items() if now - heard[0] < _FORGET_SECONDS}
        workers = [
            WorkerState(
                number,
                card,
                "ready",
                beat.pid,
                0,
                now - heard + beat.heartbeat_age,
                beat.mean_step_seconds,
                beat.live,
                beat.waiting,
                beat.last_rows,
            )
            for number, (heard, card, beat) in enumerate(self._beats.values())
        ]
        totals = self._totals.values()
        return ServiceState(
            tuple(workers),
            self._cost,
            self.settings.cost_limit,
            self._bound.rate.a_second(),
            sum(beat.ticks for beat in totals),
            sum(beat.rows for beat in totals),
            sum(beat.padded_rows for beat in totals),
            self._draining,
            self._finished,
        )
