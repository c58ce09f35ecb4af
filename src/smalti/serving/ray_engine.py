"""A replica on Ray: an engine in a thread of its own, and for each picture a stream of what happens to it.

The thread runs what a worker process runs, over a socket pair and memory of the same process, so there is one loop of
the engine and one wire format. Ray keeps the process; the heartbeat tells it when to end one.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import msgspec

from smalti.serving.channel import BlockingChannel, framed, received
from smalti.serving.checkpoint_slots import CheckpointSlots, anonymous_memory
from smalti.serving.messages import (
    Admitted,
    Cancel,
    CannotServe,
    Draw,
    Failed,
    Finished,
    FromWorker,
    PictureEvent,
    Preview,
    Ready,
    Slots,
    Tick,
    ToWorker,
)
from smalti.serving.model_settings import ModelSettings
from smalti.serving.ray_messages import Beat, Checkpoint
from smalti.serving.service import TERMINAL

MOST_PICTURES = 256  # that a replica holds, waiting ones included
QUEUED_COST = "queued_cost"  # a replica's metric: rows x tokens x calls still to do

_log = logging.getLogger("smalti.serving")
_SMOOTHING = 0.1  # of the mean step time


@dataclass
class _InFlight:
    """A picture in the engine. checkpoint: the newest that its stream was given."""

    slot: int
    events: "asyncio.Queue[PictureEvent | Checkpoint | None]" = field(default_factory=asyncio.Queue)
    checkpoint: bytes | None = None


class EngineReplica:
    """One engine. It lives on one event loop, which Ray Serve gives it."""

    async def __init__(self, settings: bytes, hang_seconds: float = 10.0) -> None:  # type: ignore[misc]
        """settings: ModelSettings as JSON. hang_seconds: see check_health.

        Raises RuntimeError, with the reason, where the run cannot be served.
        """
        self.settings = msgspec.json.decode(settings, type=ModelSettings)
        self.hang_seconds = hang_seconds
        self._loop = asyncio.get_running_loop()
        self._name = _replica_name(self.settings.name)
        self._in_flight: dict[int, _InFlight] = {}
        self._free_slots = list(range(MOST_PICTURES))
        self._numbers = count(1)
        self._heartbeat = time.monotonic()
        self._mean_step = 0.0
        self._tick = Tick(0, 0, 0, 0.0, 0, 0, 0.0)
        self._rows = self._padded_rows = 0
        ours, theirs = socket.socketpair()
        self._memory = anonymous_memory(1)
        self._thread = threading.Thread(target=self._run_engine, args=(theirs,), name="engine", daemon=True)
        self._thread.start()
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        messages = received(reader, FromWorker)
        first = await anext(messages, None)
        if not isinstance(first, Ready):
            reason = first.message if isinstance(first, CannotServe) else "the engine ended while it was loading"
            raise RuntimeError(f"{self.settings.name}: {reason}")
        self._card = first.card
        largest = self._card.trajectory_bytes
        os.ftruncate(self._memory, CheckpointSlots.size_of(MOST_PICTURES, largest))
        self._slots = CheckpointSlots(self._memory, MOST_PICTURES, largest)
        self._send(Slots(MOST_PICTURES, largest))
        self._listener = asyncio.create_task(self._listen(messages))

    def _run_engine(self, connection: socket.socket) -> None:
        from smalti.serving.worker import serve  # torch, which only this thread needs

        try:
            with suppress(ConnectionError):
                serve(BlockingChannel(connection, ToWorker), self._memory, self.settings, number=0)
        except Exception:
            _log.exception("%s: the engine's thread has ended", self.settings.name)
        finally:
            connection.close()

    def _send(self, message: msgspec.Struct) -> None:
        self._writer.write(framed([message]))

    async def _listen(self, messages: AsyncIterator[msgspec.Struct]) -> None:
        """Give each picture what the engine says of it, until the engine ends."""
        ticks = 0
        async for message in messages:
            self._heartbeat = time.monotonic()
            match message:
                case Tick():
                    self._count(message)
                    ticks += 1
                    if ticks % self.settings.checkpoint_every == 0:
                        self._tell_checkpoints()
                case Admitted() | Preview() | Finished() | Failed():
                    picture = self._in_flight.get(message.number)
                    if picture is not None:
                        picture.events.put_nowait(message)
                case _:
                    pass
        for picture in self._in_flight.values():
            picture.events.put_nowait(None)

    def _count(self, tick: Tick) -> None:
        if tick.rows:
            weight = _SMOOTHING if self._mean_step else 1.0
            self._mean_step += weight * (tick.seconds - self._mean_step)
        self._rows += tick.rows
        self._padded_rows += tick.padded_rows
        self._tick = tick

    def _tell_checkpoints(self) -> None:
        for number, picture in self._in_flight.items():
            state = self._slots.read(picture.slot, number)
            if state is not None and state != picture.checkpoint:
                picture.checkpoint = state
                picture.events.put_nowait(Checkpoint(number, state))

    def _beat(self) -> Beat:
        return Beat(
            self._name,
            os.getpid(),
            time.monotonic() - self._heartbeat,
            self._mean_step,
            self._tick.ticks,
            self._rows,
            self._padded_rows,
            self._tick.live,
            self._tick.waiting,
            self._tick.rows,
        )

    # --- what Ray and the API call

    async def card(self) -> bytes:
        """The model's card."""
        return msgspec.msgpack.encode(self._card)

    async def beat(self) -> bytes:
        """How this replica is, as ray_messages.Beat."""
        return msgspec.msgpack.encode(self._beat())

    async def draw(self, task: bytes, version: str, cost: float) -> AsyncGenerator[bytes, None]:
        """A picture's stream of ray_messages.FromReplica, under the number of its Draw; closing it drops the picture.

        version: of the weights that are to draw it. cost: for the router. Raises RuntimeError when the engine ended.
        """
        asked = msgspec.msgpack.decode(task, type=Draw)
        yield msgspec.msgpack.encode(self._beat())
        if version != self._card.version:
            reason = f"the run's weights have changed on the disk ({version} to {self._card.version})"
            yield msgspec.msgpack.encode(Failed(asked.number, "worker_lost", reason))
            return
        number, picture = next(self._numbers), _InFlight(self._free_slots.pop())
        self._in_flight[number] = picture
        self._send(Draw(number, asked.order, picture.slot, asked.resume))
        try:
            while not self._ended:
                event = await picture.events.get()
                if event is None:
                    break
                if isinstance(event, TERMINAL):
                    yield msgspec.msgpack.encode(self._beat())
                yield msgspec.msgpack.encode(msgspec.structs.replace(event, number=asked.number))
                if isinstance(event, TERMINAL):
                    return
            raise RuntimeError("the engine's thread has ended")
        finally:
            del self._in_flight[number]
            self._free_slots.append(picture.slot)
            self._send(Cancel(number))  # no effect on one that has ended

    @property
    def _ended(self) -> bool:
        return self._listener.done()

    async def check_health(self) -> None:
        """Raises RuntimeError where Ray should end this replica and start another.

        That is when the engine has ended, or has work and gave no sign for the larger of hang_seconds and 20 steps.
        """
        if self._ended:
            raise RuntimeError("the engine's thread has ended")
        silent, patience = time.monotonic() - self._heartbeat, max(self.hang_seconds, 20 * self._mean_step)
        if self._in_flight and silent > patience:
            raise RuntimeError(f"the engine has {len(self._in_flight)} pictures and gave no sign for {silent:.0f} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What ray_routing.QueuedCostPolicy scales by."""
        return {QUEUED_COST: self._tick.cost_left}

    def record_routing_stats(self) -> dict[str, float]:
        """What ray_routing.LeastQueuedCost knows of work that other handles sent here."""
        return {QUEUED_COST: self._tick.cost_left}

    def __del__(self) -> None:
        """Ends the engine. Serve calls it when the streams have ended, or were waited for long enough."""
        if hasattr(self, "_writer") and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._writer.close)


def _replica_name(model: str) -> str:
    """This replica's name in its cluster; outside of Ray Serve, a name of its process."""
    if "ray.serve" in sys.modules:
        with suppress(sys.modules["ray.serve"].exceptions.RayServeException):
            return str(sys.modules["ray.serve"].get_replica_context().replica_tag)
    return f"{model}-{os.getpid()}"
