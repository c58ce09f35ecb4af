"""Jobs: pictures that are drawn while nobody waits, and that outlive the server that accepted them.

A job is accepted when the service has taken its orders and the store holds it. From then on it reaches exactly one
terminal state, by a compare-and-set in the store; a server that starts finishes what another left. What the store
cannot take for want of room stays in memory until it can.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from smalti.errors import UserError
from smalti.serving.answers import MEDIA_TYPES
from smalti.serving.api_errors import ApiError
from smalti.serving.job_events import JobEvent, events_of_ended, picture_event, terminal_data
from smalti.serving.job_schemas import JobObject, job_object
from smalti.serving.live_job import LiveJob
from smalti.serving.messages import Admitted, Failed, Finished, PictureOrder, Preview
from smalti.serving.service import PictureService, ShuttingDown, Ticket, Unavailable
from smalti.serving.store import Store
from smalti.serving.store_tables import (
    Job,
    JobError,
    JobPicture,
    JobStatus,
    begin_attempt,
    end_job,
    find_job,
    find_job_of_key,
    give_back_room,
    insert_job,
    keep_picture,
    list_jobs,
    picture_file,
    start_job,
    sweep,
    unfinished_jobs,
    webhook_of_job,
)
from smalti.serving.webhooks import Webhooks

_log = logging.getLogger(__name__)

_SWEPT_AT_ONCE = 20  # jobs a transaction, so that a sweep keeps no other write waiting for long


class JobNotFound(ApiError):
    """There is no such job of this tenant's, or no longer."""

    def __init__(self, what: str = "job") -> None:
        super().__init__(404, f"there is no such {what}, or no longer", code=f"{what}_not_found")


class IdempotencyConflict(ApiError):
    """The idempotency key belongs to a job of another body."""

    def __init__(self) -> None:
        message = "this idempotency key was used with another body: take another key"
        super().__init__(409, message, code="idempotency_conflict", param="idempotency-key")


@dataclass(frozen=True)
class JobSettings:
    """keep_seconds: how long a job and its pictures are kept after its end. max_attempts: how often a job is given to
    the service when servers die over it. progress_seconds, sweep_seconds, flush_seconds: between progress events,
    deletions of what has expired, and tries to write what found no room. close_seconds: to finish writing at the end.
    """

    keep_seconds: float = 86_400.0
    max_attempts: int = 3
    progress_seconds: float = 1.0
    sweep_seconds: float = 60.0
    flush_seconds: float = 1.0
    close_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class NewJob:
    """What is asked for. request: as it was sent; with the idempotency key it tells a repetition from a mistake."""

    tenant: str
    model: str
    orders: Sequence[PictureOrder]
    request: dict[str, Any]
    webhook_url: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None

    @property
    def body_hash(self) -> str:
        """SHA-256 of the request, however its JSON was laid out."""
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()


class Jobs:
    """The jobs of a service. To be started on the event loop that it is used on, when the service takes requests."""

    def __init__(
        self, service: PictureService, store: Store, webhooks: Webhooks, settings: JobSettings | None = None
    ) -> None:
        self.service, self.store, self.webhooks = service, store, webhooks
        self.settings = settings or JobSettings()
        self._live: dict[str, LiveJob] = {}
        self._creating: dict[tuple[str, str], tuple[str, asyncio.Task[tuple[Job, bool]]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._closed = False

    # --- life

    async def start(self) -> None:
        """Take up what an earlier server left, and begin to sweep and to send messages."""
        await self.webhooks.start()
        waiting: dict[str, list[LiveJob]] = {}
        for job in await self.store.read(unfinished_jobs):
            live = self._live[job.id] = _left_over(job)
            waiting.setdefault(job.model, []).append(live)
        for lives in waiting.values():
            self._spawn(self._resume(lives))
        for work, seconds in (
            (self._tell_progress, self.settings.progress_seconds),
            (self._sweep, self.settings.sweep_seconds),
            (self._flush, self.settings.flush_seconds),
        ):
            self._loops.append(asyncio.create_task(_repeated(work, seconds)))

    async def close(self) -> None:
        """Let go of the jobs: what has not ended stays in the store for the next server."""
        self._closed = True
        for live in self._live.values():
            live.log.close()
        ending = set(self._tasks)
        if ending:
            await asyncio.wait(ending, timeout=self.settings.close_seconds)
        await _stopped([*self._loops, *self._tasks])
        await self._flush()
        lost = sum(bool(live.unwritten) for live in self._live.values())
        if lost:
            _log.error("%d jobs that ended could not be written: the next server draws them again", lost)
        await self.webhooks.close()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- what callers ask

    async def create(self, asked: NewJob) -> tuple[Job, bool]:
        """Accept a job, or find the one that its idempotency key has made; and whether it is new.

        Raises IdempotencyConflict, UserError for what the model cannot draw, Unavailable where there is no room for it
        in the queue or on the disk: then nothing was accepted.
        """
        if self._closed:
            raise ShuttingDown("the server is shutting down", self.settings.close_seconds)
        # A task of its own: a caller who goes away must not leave half a job behind.
        if asked.idempotency_key is None:
            return await asyncio.shield(self._spawn(self._accept(asked))), True
        key = (asked.tenant, asked.idempotency_key)
        found = self._creating.get(key)
        if found is not None:
            if found[0] != asked.body_hash:
                raise IdempotencyConflict
            return (await asyncio.shield(found[1]))[0], False
        task = self._spawn(self._accept_once(asked, asked.idempotency_key))
        self._creating[key] = (asked.body_hash, task)
        task.add_done_callback(lambda _: self._creating.pop(key))
        job, new = await asyncio.shield(task)
        return job, new

    async def _accept_once(self, asked: NewJob, key: str) -> tuple[Job, bool]:
        made = await self.store.read(partial(find_job_of_key, tenant=asked.tenant, key=key, now=time.time()))
        if made is None:
            return await self._accept(asked), True
        if made.body_hash != asked.body_hash:
            raise IdempotencyConflict
        return self._current(made), False

    async def _accept(self, asked: NewJob) -> Job:
        # The service first: what it refuses never touches the disk, which may be full.
        tickets = self.service.submit(asked.model, asked.orders)
        job = Job(
            id=f"job_{secrets.token_hex(12)}",
            tenant=asked.tenant,
            created=time.time(),
            model=asked.model,
            card=tickets[0].card.key,
            request=asked.request,
            orders=tuple(asked.orders),
            body_hash=asked.body_hash,
            idempotency_key=asked.idempotency_key,
            webhook_url=asked.webhook_url,
            metadata=asked.metadata,
        )
        try:
            await self.store.write(partial(insert_job, job=job))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        live = self._live[job.id] = LiveJob(job, job.attempts)
        live.log.tell("queued", {"attempt": 1})
        live.tickets = tickets
        self._spawn(self._follow(live, dict(enumerate(tickets))))
        return job

    async def get(self, tenant: str, id: str) -> Job:
        """A tenant's job. Raises JobNotFound."""
        live = self._live.get(id)
        if live is not None and live.job.tenant == tenant:
            return live.job
        job = await self.store.read(partial(find_job, tenant=tenant, id=id, now=time.time()))
        if job is None:
            raise JobNotFound
        return self._current(job)

    async def page(
        self, tenant: str, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[Job], bool]:
        """A page of a tenant's jobs, those behind the job `after`; and whether there are more. Raises JobNotFound."""
        last = None if after is None else await self.get(tenant, after)
        found = await self.store.read(
            partial(list_jobs, tenant=tenant, now=time.time(), limit=limit + 1, after=last, newest_first=newest_first)
        )
        return [self._current(job) for job in found[:limit]], len(found) > limit

    async def describe(self, job: Job) -> JobObject:
        """The job as the API tells it."""
        message = None
        if job.webhook_url is not None and job.finished:
            message = await self.store.read(partial(webhook_of_job, id=job.id))
        live = self._live.get(job.id)
        return job_object(job, None if live is None else live.place, message)

    async def cancel(self, tenant: str, id: str) -> Job:
        """End a job at the next step, unless it has ended; its state then. Raises JobNotFound."""
        job = await self.get(tenant, id)
        if not job.finished:
            live = self._live.get(id) or _left_over(job)
            await self._end(live, "cancelled", None)
            for ticket in live.tickets:
                ticket.cancel()
        return await self.get(tenant, id)

    async def events(self, tenant: str, id: str, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """What happens to a job from an event's number on; ends with the job. Raises JobNotFound at the first."""
        job = await self.get(tenant, id)
        live = self._live.get(id)
        if live is None:
            for event in events_of_ended(job):
                if event.number > after:
                    yield event
            return
        async for event in live.log.after(after):
            yield event

    async def image(self, tenant: str, id: str, index: int) -> tuple[str, bytes]:
        """A picture's media type and file. Raises JobNotFound where it is not there (yet)."""
        job = await self.get(tenant, id)
        live = self._live.get(id)
        if live is not None and index in live.files:
            return MEDIA_TYPES[job.orders[index].output_format], live.files[index]
        found = await self.store.read(partial(picture_file, tenant=tenant, id=id, index=index, now=time.time()))
        if found is None:
            raise JobNotFound("picture")
        return found

    def _current(self, stored: Job) -> Job:
        live = self._live.get(stored.id)
        return stored if live is None else live.job

    # --- a job's life

    async def _resume(self, lives: Sequence[LiveJob]) -> None:
        """Give jobs of one model to the service again, in the order in which they had been accepted."""
        for live in lives:
            job = live.job
            missing = sorted(set(range(len(job.orders))) - {picture.index for picture in job.pictures})
            if not missing:
                await self._end(live, "succeeded", None)
                continue
            if job.attempts >= self.settings.max_attempts:
                message = f"the server ended {job.attempts} times while this job was drawn"
                await self._end(live, "failed", JobError("attempts_exhausted", message))
                continue
            try:
                tickets = await self._submitted_again(live, missing)
            except UserError as error:
                await self._end(live, "failed", JobError("invalid_request", str(error)))
            except ShuttingDown:
                return
            else:
                self._spawn(self._follow(live, tickets))

    async def _submitted_again(self, live: LiveJob, missing: Sequence[int]) -> dict[int, Ticket]:
        async with live.lock:
            job = replace(live.job, status="queued", attempts=live.job.attempts + 1)
            live.job = job
            await live.write(self.store, partial(begin_attempt, id=job.id, attempts=job.attempts))
            live.log.tell("queued", {"attempt": job.attempts})
        orders = [job.orders[i] for i in missing]
        while not live.job.finished:
            served = any(card.key == job.card for card in self.service.cards())
            try:
                # The same weights where they are still served; else what the model's name means by now.
                live.tickets = self.service.submit(job.card if served else job.model, orders)
            except ShuttingDown:
                raise
            except Unavailable as error:
                await asyncio.sleep(error.retry_after)
            else:
                return dict(zip(missing, live.tickets, strict=True))
        return {}

    async def _follow(self, live: LiveJob, tickets: dict[int, Ticket]) -> None:
        """Bring a job whose pictures were accepted to its end."""
        try:
            outcomes = await asyncio.gather(*(self._picture(live, i, ticket) for i, ticket in tickets.items()))
        except Exception as error:
            _log.exception("job %s", live.job.id)
            for ticket in tickets.values():
                ticket.cancel()
            await self._end(live, "failed", JobError("internal_error", f"the server failed: {type(error).__name__}"))
            return
        failures = [failure for failure in outcomes if failure is not None]
        if any(failure.code == "shutting_down" for failure in failures):
            live.log.close()  # not its end: the next server takes it up
        elif failures:
            await self._end(live, "failed", failures[0])
        else:
            await self._end(live, "succeeded", None)

    async def _picture(self, live: LiveJob, index: int, ticket: Ticket) -> JobError | None:
        async for event in ticket.events():
            async with live.lock:
                if live.job.finished:
                    continue  # cancelled; the ticket's end is waited for, and told to nobody
                match event:
                    case Admitted():
                        await self._begin(live)
                    case Preview():
                        data = {"index": index, "call": event.call, "calls": event.calls}
                        live.log.tell("preview", data, event.image, f"preview {index}")
                    case Finished():
                        await self._keep(live, index, ticket, event)
                    case Failed():
                        return JobError(event.code, event.message, event.param, index)
        return None

    async def _begin(self, live: LiveJob) -> None:
        if live.job.status != "queued":
            return
        now = time.time()
        live.job = replace(live.job, status="running", started=live.job.started or now)
        await live.write(self.store, partial(start_job, id=live.job.id, now=now))
        live.log.tell("running", {})

    async def _keep(self, live: LiveJob, index: int, ticket: Ticket, done: Finished) -> None:
        order = live.job.orders[index]
        media_type = MEDIA_TYPES[order.output_format]
        number = live.log.next_number
        picture = JobPicture(index, number, order.seed, done.width, done.height, ticket.card.key, media_type)
        live.files[index] = done.image
        await live.write(self.store, partial(keep_picture, id=live.job.id, picture=picture, file=done.image))
        if not live.unwritten:
            del live.files[index]
        # In the order that the store gives them in, whichever was finished first.
        pictures = tuple(sorted((*live.job.pictures, picture), key=lambda other: other.index))
        live.job = replace(live.job, pictures=pictures)
        live.log.tell("picture", picture_event(live.job.id, picture).data, slot=f"preview {index}")

    async def _end(self, live: LiveJob, status: JobStatus, error: JobError | None) -> bool:
        """The terminal transition; False where it had happened."""
        async with live.lock:
            if live.job.finished:
                return False
            now, number = time.time(), live.log.next_number
            expires = now + self.settings.keep_seconds
            job = replace(live.job, status=status, error=error, last_event=number, ended=now, expires=expires)
            message = self.webhooks.message_of(job)
            won = await live.write(
                self.store,
                partial(
                    end_job,
                    id=job.id,
                    status=status,
                    error=error,
                    last_event=number,
                    now=now,
                    expires=expires,
                    message=message,
                ),
            )
            if won:
                live.job = job
                live.log.tell(status, terminal_data(job))
            else:
                _log.error("job %s had ended in the store, not here: another server uses it", job.id)
                live.job = replace(live.job, status="cancelled")
            live.log.close()
        self._let_go(live)
        self.webhooks.wake()
        return won

    def _let_go(self, live: LiveJob) -> None:
        if live.job.finished and not live.unwritten:
            self._live.pop(live.job.id, None)

    # --- again and again

    async def _flush(self) -> None:
        """Write what found no room before."""
        for live in list(self._live.values()):
            if live.unwritten and await live.flush(self.store):
                self._let_go(live)
                self.webhooks.wake()

    async def _tell_progress(self) -> None:
        for live in self._live.values():
            if live.job.finished or live.lock.locked() or not live.tickets:
                continue
            data = {"finished": len(live.job.pictures), "n": len(live.job.orders), "place": live.place}
            live.log.tell_if_new("progress", data)

    async def _sweep(self) -> None:
        try:
            gone = more = await self.store.write(partial(sweep, now=time.time(), limit=_SWEPT_AT_ONCE))
            while more == _SWEPT_AT_ONCE:
                more = await self.store.write(partial(sweep, now=time.time(), limit=_SWEPT_AT_ONCE))
                gone += more
            if gone:
                await self.store.write(give_back_room)
        except Unavailable as error:
            _log.warning("expired jobs cannot be deleted now: %s", error)


def _left_over(job: Job) -> LiveJob:
    """A job of an earlier server's, whose listeners have heard events of its last attempt already."""
    return LiveJob(job, job.attempts + 1)


async def _repeated(work: Any, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            _log.exception("%s", work.__name__)


async def _stopped(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
