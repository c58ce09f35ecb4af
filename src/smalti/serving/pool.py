"""The workers of one model version and the pictures that it has accepted: balancing, loss, suspicion, quarantine.

What a worker had in flight when it died goes on elsewhere from its checkpoints. A picture that was in a forward at two
deaths, at the same network call, is a suspect: suspects are tried apart from the others, on a worker that holds nothing
else, in halves each time it dies, until the one that kills is alone. When it has killed twice alone, it is quarantined;
the others never notice but in time. Workers that die of something else are at other calls each time.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from smalti.errors import UserError
from smalti.serving.messages import (
    Admitted,
    Cancel,
    CannotServe,
    Draw,
    Failed,
    FailureCode,
    Finished,
    ModelCard,
    PictureOrder,
    Preview,
    Ready,
    Stop,
    Tick,
)
from smalti.serving.service import WorkerState
from smalti.serving.ticket import PictureTicket
from smalti.serving.work_rate import WorkRate
from smalti.serving.worker_process import WorkerProcess, start_worker

_log = logging.getLogger("smalti.serving")

Balancing = Literal["least_loaded", "round_robin"]


@dataclass(frozen=True)
class PoolSettings:
    """workers: processes. slots: pictures that a worker holds at most, waiting ones included.

    hang_seconds: a worker without a tick for the larger of this and 20 mean steps is killed. start_seconds: until it
    is ready. max_backoff: seconds between restarts of one that keeps dying. suspect_after: deaths at one
    call after which a picture is tried apart; quarantine_after: deaths alone at one call, and quarantine_in_any_case:
    at any.
    """

    workers: int = 1
    slots: int = 256
    balancing: Balancing = "least_loaded"
    hang_seconds: float = 10.0
    start_seconds: float = 600.0
    first_backoff: float = 0.1
    max_backoff: float = 30.0
    give_up_after: int = 6
    suspect_after: int = 2
    quarantine_after: int = 2
    quarantine_in_any_case: int = 12


@dataclass
class AcceptedPicture:
    """The parent's truth about one picture."""

    number: int
    order: PictureOrder
    ticket: PictureTicket
    cost: float
    accepted: float
    worker: int | None = None
    slot: int = -1
    resume: bytes | None = None
    admitted: bool = False
    previews: int = 0  # told
    reported: bool = False  # whether its worker's ticks count it
    died_at: int | None = None  # the network call of its last forward that killed a worker
    deaths: int = 0  # in a row at that call
    deaths_alone: int = 0
    deaths_in_all: int = 0


@dataclass
class _Place:
    """A worker's place in the pool; the process in it comes and goes."""

    number: int
    process: WorkerProcess | None = None
    in_flight: dict[int, AcceptedPicture] = field(default_factory=dict)
    restarts: int = 0
    deaths_in_a_row: int = 0  # without a picture finished between
    on_trial: bool = False  # holds suspects alone
    state: str = "starting"

    @property
    def ready(self) -> bool:
        return self.process is not None and self.process.ready


class Pool:
    """All of one model version. Lives on one event loop.

    module, settings: what a worker process runs. ended: told of each picture that reached its end. work:
    told of what is done.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        module: str,
        model_settings: bytes,
        settings: PoolSettings,
        ended: Callable[[AcceptedPicture, Finished | Failed], None],
        work: WorkRate,
    ) -> None:
        self.name, self.run, self.settings = name, run, settings
        self.card: ModelCard | None = None
        self.retired = False
        self.pictures: dict[int, AcceptedPicture] = {}
        self.ticks = self.rows = self.padded_rows = 0
        self._work = work
        self._module, self._model_settings = module, model_settings
        self._ended = ended
        self._waiting: deque[AcceptedPicture] = deque()
        self._trials: deque[list[AcceptedPicture]] = deque()  # groups of suspects, to be tried apart
        self._places = [_Place(i) for i in range(settings.workers)]
        self._tasks: list[asyncio.Task[None]] = []
        self._turn = 0
        self._refusal: str | None = None
        self._news = asyncio.Event()
        self._stopping = False

    # --- life

    def start(self) -> None:
        """Start the workers."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(place)) for place in self._places]
        self._tasks.append(loop.create_task(self._watch()))

    async def until_ready(self) -> ModelCard:
        """Wait for the first worker. Raises UserError where the run cannot be served."""
        while self.card is None or not self.has_worker:
            if self._refusal is not None:
                raise UserError(f"{self.name}: {self._refusal}")
            if all(place.state == "failed" for place in self._places):
                raise UserError(f"{self.name}: its worker dies at the start, see the log")
            await self._changed()
        return self.card

    async def until_empty(self) -> None:
        """Wait until everything accepted has ended."""
        while self.pictures:
            await self._changed()

    async def stop(self) -> None:
        """End the workers. What has not ended fails with "shutting_down"."""
        self._stopping = True
        for picture in list(self.pictures.values()):
            self._fail(picture, "shutting_down", "the server was shut down before the picture was done")
        for place in self._places:
            if place.process is not None:
                place.process.send(Stop())
        keepers = self._tasks
        _, late = await asyncio.wait(keepers, timeout=2.0)
        for place in self._places:
            if place.process is not None:
                place.process.kill()
        if late:
            await asyncio.wait(late, timeout=2.0)
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _changed(self) -> None:
        self._news.clear()
        await self._news.wait()

    @property
    def has_worker(self) -> bool:
        """Whether a worker is ready."""
        return any(place.ready for place in self._places)

    @property
    def given_up(self) -> bool:
        """Whether every worker keeps dying before it is of use."""
        return all(place.state in ("failed", "refused") for place in self._places)

    # --- pictures

    def accept(self, picture: AcceptedPicture) -> None:
        """Take a picture; from here it ends in exactly one Finished or Failed."""
        self.pictures[picture.number] = picture
        self._waiting.append(picture)
        self._dispatch()

    def cancel(self, number: int) -> None:
        """Drop a picture that has not ended."""
        picture = self.pictures.get(number)
        if picture is None:
            return
        if picture.worker is not None:
            process = self._places[picture.worker].process
            if process is not None:
                process.send(Cancel(number))
        self._fail(picture, "cancelled", "cancelled")

    def place_of(self, number: int) -> int | None:
        """Pictures that were accepted before and have not ended."""
        if number not in self.pictures:
            return None
        return sum(other < number for other in self.pictures)

    def _dispatch(self) -> None:
        """Hand waiting pictures to workers that have room."""
        self._begin_trials()
        while self._waiting:
            place = self._next_place()
            if place is None:
                return
            self._hand(self._waiting.popleft(), place)

    def _begin_trials(self) -> None:
        self._trials = deque(group for group in self._trials if any(p.number in self.pictures for p in group))
        for place in self._places:
            if place.on_trial and not place.in_flight:
                place.on_trial = False
        if not self._trials:
            return
        if not any(place.on_trial for place in self._places):
            # The least loaded one takes nothing new until it is empty.
            ready = [place for place in self._places if place.ready]
            if not ready:
                return
            min(ready, key=lambda place: len(place.in_flight)).on_trial = True
        for place in self._places:
            if self._trials and place.on_trial and place.ready and not place.in_flight:
                for picture in self._trials.popleft():
                    if picture.number in self.pictures:
                        self._hand(picture, place)

    def _next_place(self) -> _Place | None:
        open_places = [
            p for p in self._places if p.ready and not p.on_trial and p.process is not None and p.process.free_slots
        ]
        if not open_places:
            return None
        if self.settings.balancing == "round_robin":
            self._turn += 1
            return min(open_places, key=lambda p: (p.number - self._turn) % len(self._places))
        return min(open_places, key=lambda p: sum(one.cost for one in p.in_flight.values()))

    def _hand(self, picture: AcceptedPicture, place: _Place) -> None:
        assert place.process is not None
        picture.worker, picture.slot = place.number, place.process.free_slots.pop()
        picture.reported = False
        place.in_flight[picture.number] = picture
        order = picture.order
        if order.deadline_seconds is not None:  # of what is left of it
            left = order.deadline_seconds - (time.monotonic() - picture.accepted)
            order = msgspec.structs.replace(order, deadline_seconds=max(0.0, left))
        place.process.send(Draw(picture.number, order, picture.slot, picture.resume))

    def _fail(self, picture: AcceptedPicture, code: FailureCode, message: str) -> None:
        self._end(picture, Failed(picture.number, code, message))

    def _end(self, picture: AcceptedPicture, event: Finished | Failed) -> None:
        del self.pictures[picture.number]
        if picture in self._waiting:
            self._waiting.remove(picture)
        if picture.worker is not None:
            self._free(picture)
        picture.ticket.add(event)
        self._ended(picture, event)
        self._news.set()
        if not self._stopping:
            self._dispatch()

    def _free(self, picture: AcceptedPicture) -> None:
        assert picture.worker is not None
        place = self._places[picture.worker]
        place.in_flight.pop(picture.number, None)
        if place.process is not None and picture.slot >= 0:
            place.process.free_slots.append(picture.slot)
        picture.worker, picture.slot, picture.reported = None, -1, False

    # --- workers

    async def _keep(self, place: _Place) -> None:
        """Have a process in a place, again and again, until the pool stops or the run turns out not to be servable."""
        while not self._over():
            place.state = "starting"
            try:
                process = await start_worker(place.number, self._module, self._model_settings, self.settings.slots)
            except OSError as error:  # no memory or no more processes, which may pass
                _log.error("%s worker %d cannot be started: %s", self.name, place.number, error)
            else:
                place.process = process
                status = await process.run(partial(self._hear, place))
                place.process = None
                self._lost(place, process, status)
                process.release()
            if self._over():
                break
            place.restarts += 1
            place.deaths_in_a_row += 1
            if place.deaths_in_a_row > self.settings.give_up_after:
                place.state = "failed"
                self._give_up()
            else:
                place.state = "backing_off"
            self._news.set()
            # The first death is no reason to wait: what it was drawing waits too.
            waits = max(0, place.deaths_in_a_row - 2)
            await asyncio.sleep(min(self.settings.max_backoff, self.settings.first_backoff * 2**waits))
        place.state = "refused" if self._refusal is not None else "stopped"
        self._news.set()

    def _over(self) -> bool:
        return self._stopping or self._refusal is not None

    def _give_up(self) -> None:
        """No worker stays alive: say so to those who wait, rather than leave them waiting. Restarts go on."""
        if not self.given_up:
            return
        for picture in list(self.pictures.values()):
            self._fail(picture, "worker_lost", "no worker could be kept alive to draw it")

    def _hear(self, place: _Place, message: msgspec.Struct) -> None:
        match message:
            case Ready(card=card):
                if self.card is not None and self.card.version != card.version:
                    self._refusal = f"its weights have changed on the disk ({self.card.version} to {card.version})"
                    assert place.process is not None
                    place.process.kill()
                    return
                self.card, place.state = card, "ready"
                self._news.set()
                self._dispatch()
            case CannotServe(message=reason):
                if self.card is None:
                    self._refusal = reason
                else:  # it has been served: what is wrong now may pass
                    _log.error("%s worker %d: %s", self.name, place.number, reason)
                self._news.set()
            case Admitted() | Preview() | Finished() | Failed():
                picture = place.in_flight.get(message.number)
                if picture is not None:
                    self._hear_of(place, picture, message)
            case Tick(rows=rows):
                self.ticks += bool(rows)
                self.rows += rows
                self.padded_rows += message.padded_rows
                if rows and self.card is not None:
                    self._work.add(rows * self.card.tokens)

    def _hear_of(self, place: _Place, picture: AcceptedPicture, event: Admitted | Preview | Finished | Failed) -> None:
        if isinstance(event, Admitted):
            picture.reported = True
            if not picture.admitted:
                picture.admitted = True
                picture.cost = event.cost
                picture.ticket.add(event)
        elif isinstance(event, Preview):
            if event.index >= picture.previews:  # one that goes on from a checkpoint may send one again
                picture.previews = event.index + 1
                picture.ticket.add(event)
        else:
            if isinstance(event, Finished):
                place.deaths_in_a_row = 0
            self._end(picture, event)

    def _lost(self, place: _Place, process: WorkerProcess, status: int) -> None:
        """A process is gone: what it had in flight goes on elsewhere from its checkpoints, suspects apart."""
        lost, trial = list(place.in_flight.values()), place.on_trial
        place.on_trial = False
        if not self._stopping and not self.retired:
            _log.warning(
                "%s worker %d (pid %d) is gone, status %d, with %d pictures in flight",
                self.name, place.number, process.process.pid, status, len(lost),
            )  # fmt: skip
        for picture in lost:
            if process.slots is not None:
                picture.resume = process.slots.read(picture.slot, picture.number) or picture.resume
                _accuse(picture, process.slots.marked_call(picture.slot, picture.number), trial and len(lost) == 1)
            self._free(picture)
        if trial:
            self._judge(lost)
        else:
            suspects = [p for p in lost if p.deaths >= self.settings.suspect_after]
            if suspects:
                self._trials.append(suspects)
            self._waiting.extendleft(p for p in reversed(lost) if p not in suspects)
        self._dispatch()

    def _judge(self, group: list[AcceptedPicture]) -> None:
        """A group of suspects has killed another worker."""
        if len(group) == 1:
            picture = group[0]
            limits = self.settings.quarantine_after, self.settings.quarantine_in_any_case
            if picture.deaths_alone >= limits[0] or picture.deaths_in_all >= limits[1]:
                _log.error("picture %d of request %s is quarantined", picture.number, picture.order.request_id)
                died = f"{picture.deaths_in_all} workers died while they drew it, {picture.deaths_alone} of it alone"
                self._fail(picture, "quarantined", died)
            else:
                self._trials.appendleft(group)
        elif group:
            half = len(group) // 2
            self._trials.extendleft([group[half:], group[:half]])

    async def _watch(self) -> None:
        """Kill workers that have stopped ticking and those that never get ready; expire what waits for one."""
        while not self._stopping:
            await asyncio.sleep(min(0.25, self.settings.hang_seconds / 4))
            now = time.monotonic()
            for picture in [p for p in self._waiting if _is_late(p, now)]:
                self._fail(picture, "deadline_exceeded", "no worker was free by the deadline")
            for place in self._places:
                process = place.process
                if process is None:
                    continue
                silent = now - process.heartbeat
                if process.ready:
                    limit = max(self.settings.hang_seconds, 20 * process.mean_step_seconds)
                else:
                    limit = self.settings.start_seconds
                if silent > limit:
                    _log.error("%s worker %d has not ticked for %.1f s: killed", self.name, place.number, silent)
                    process.kill()

    # --- state

    def cost_left(self) -> float:
        """Rows x tokens x network calls accepted and still to do."""
        cost = sum(p.cost for p in self.pictures.values() if not p.reported)
        for place in self._places:
            if place.process is not None and place.process.last_tick is not None:
                cost += place.process.last_tick.cost_left
        return cost

    def worker_states(self) -> list[WorkerState]:
        """Each worker as others see it."""
        return [self._state_of(place) for place in self._places]

    def _state_of(self, place: _Place) -> WorkerState:
        process = place.process
        tick = None if process is None else process.last_tick
        state = "draining" if self.retired and place.state == "ready" else place.state
        return WorkerState(
            place.number,
            self.name if self.card is None else self.card.key,
            state,
            None if process is None else process.process.pid,
            place.restarts,
            0.0 if process is None else time.monotonic() - process.heartbeat,
            0.0 if process is None else process.mean_step_seconds,
            0 if tick is None else tick.live,
            0 if tick is None else tick.waiting,
            0 if tick is None else tick.rows,
        )


def _accuse(picture: AcceptedPicture, call: int | None, alone: bool) -> None:
    """A worker died with this picture in a forward for its network call `call`, or in none."""
    if call is None:
        return
    if call != picture.died_at:
        picture.deaths = picture.deaths_alone = 0
    picture.died_at = call
    picture.deaths += 1
    picture.deaths_alone += alone
    picture.deaths_in_all += 1


def _is_late(picture: AcceptedPicture, now: float) -> bool:
    seconds = picture.order.deadline_seconds
    return seconds is not None and now - picture.accepted > seconds
