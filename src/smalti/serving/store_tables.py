"""The job store's tables, and what is asked of them: each function is one operation inside a transaction.

Times are Unix seconds. A job's only terminal transition is `end_job`, a compare-and-set on its status.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from sqlalchemy import (
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from smalti.serving.messages import PictureOrder

SCHEMA_VERSION = 1

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
WebhookStatus = Literal["pending", "delivered", "dead"]
UNFINISHED: tuple[JobStatus, ...] = ("queued", "running")

tables = MetaData()
facts = Table("smalti_facts", tables, Column("name", String, primary_key=True), Column("value", Text, nullable=False))
jobs = Table(
    "jobs",
    tables,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("created", Double, nullable=False),
    Column("model", String, nullable=False),
    Column("card", String, nullable=False),
    Column("request", Text, nullable=False),
    Column("orders", LargeBinary, nullable=False),
    Column("status", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("expires", Double),
    Column("error", Text),
    Column("last_event", Integer, nullable=False),
    Column("idempotency_key", String),
    Column("body_hash", String, nullable=False),
    Column("webhook_url", Text),
    Column("metadata", Text, nullable=False),
    UniqueConstraint("tenant", "idempotency_key"),
    Index("jobs_of_tenant", "tenant", "created", "id"),
    Index("jobs_by_status", "status"),
    Index("jobs_by_expiry", "expires"),
)
pictures = Table(
    "pictures",
    tables,
    Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("event", Integer, nullable=False),
    Column("seed", String, nullable=False),  # up to 2^63 - 1
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("card", String, nullable=False),
    Column("media_type", String, nullable=False),
    Column("file", LargeBinary, nullable=False),
)
webhooks = Table(
    "webhooks",
    tables,
    Column("id", String, primary_key=True),
    Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("tenant", String, nullable=False),
    Column("url", Text, nullable=False),
    Column("host", String, nullable=False),
    Column("body", Text, nullable=False),
    Column("status", String, nullable=False),  # pending, delivered, dead
    Column("due", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("last_error", Text),
    Index("webhooks_due", "status", "due"),
)


@dataclass(frozen=True)
class JobError:
    """Why a job failed. index: of the picture it failed for. param: the field at fault, where it is the caller's."""

    code: str
    message: str
    param: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class JobPicture:
    """A picture that a job has drawn. event: the number of the event that told it. card: the version that drew it."""

    index: int
    event: int
    seed: int
    width: int
    height: int
    card: str
    media_type: str


@dataclass(frozen=True)
class Job:
    """A job as it is stored. card: the version it was accepted for. attempts: how often it was given to the service.

    last_event: number of the terminal event, 0 before.
    """

    id: str
    tenant: str
    created: float
    model: str
    card: str
    request: Mapping[str, Any]
    orders: tuple[PictureOrder, ...]
    body_hash: str
    status: JobStatus = "queued"
    attempts: int = 1
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    error: JobError | None = None
    last_event: int = 0
    idempotency_key: str | None = None
    webhook_url: str | None = None
    metadata: Mapping[str, str] | None = None
    pictures: tuple[JobPicture, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether it has reached its terminal state."""
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class Webhook:
    """A message for a receiver: id names it for good, so that a receiver can tell a repetition."""

    id: str
    job: str
    tenant: str
    url: str
    host: str
    body: str
    due: float
    attempts: int = 0


# --- jobs


def insert_job(connection: Connection, job: Job) -> None:
    """Keep a new job. An expired one no longer holds its idempotency key."""
    expired = (jobs.c.tenant == job.tenant) & (jobs.c.idempotency_key == job.idempotency_key)
    connection.execute(delete(jobs).where(expired, jobs.c.expires <= job.created))
    connection.execute(
        insert(jobs).values(
            id=job.id,
            tenant=job.tenant,
            created=job.created,
            model=job.model,
            card=job.card,
            request=json.dumps(job.request),
            orders=msgspec.msgpack.encode(job.orders),
            status=job.status,
            attempts=job.attempts,
            last_event=job.last_event,
            idempotency_key=job.idempotency_key,
            body_hash=job.body_hash,
            webhook_url=job.webhook_url,
            metadata=json.dumps(job.metadata or {}),
        )
    )


def find_job(connection: Connection, tenant: str, id: str, now: float) -> Job | None:
    """A tenant's job, unless it has expired."""
    return _one(connection, [jobs.c.id == id, jobs.c.tenant == tenant, _kept(now)])


def find_job_of_key(connection: Connection, tenant: str, key: str, now: float) -> Job | None:
    """The job that a tenant's idempotency key made, unless it has expired."""
    return _one(connection, [jobs.c.tenant == tenant, jobs.c.idempotency_key == key, _kept(now)])


def list_jobs(
    connection: Connection, tenant: str, now: float, limit: int, after: Job | None, newest_first: bool
) -> list[Job]:
    """A tenant's jobs by age, those behind `after` only."""
    conditions = [jobs.c.tenant == tenant, _kept(now)]
    if after is not None:
        here, there = jobs.c.created, after.created
        beyond = here < there if newest_first else here > there
        tied = jobs.c.id < after.id if newest_first else jobs.c.id > after.id
        conditions.append(or_(beyond, (here == there) & tied))
    order = [column.desc() if newest_first else column for column in (jobs.c.created, jobs.c.id)]
    return _some(connection, select(jobs).where(*conditions).order_by(*order).limit(limit))


def unfinished_jobs(connection: Connection) -> list[Job]:
    """All tenants' jobs that have not ended, the oldest first."""
    return _some(connection, select(jobs).where(jobs.c.status.in_(UNFINISHED)).order_by(jobs.c.created, jobs.c.id))


def begin_attempt(connection: Connection, id: str, attempts: int) -> None:
    """Note that an unfinished job is given to the service once more."""
    _update_unfinished(connection, id, status="queued", attempts=attempts)


def start_job(connection: Connection, id: str, now: float) -> None:
    """Note that a queued job has begun."""
    _update_unfinished(connection, id, status="running", started=func.coalesce(jobs.c.started, now))


def keep_picture(connection: Connection, id: str, picture: JobPicture, file: bytes) -> bool:
    """Keep a picture of an unfinished job; False where the job has ended or has it already."""
    held = select(jobs.c.id).where(jobs.c.id == id, jobs.c.status.in_(UNFINISHED)).with_for_update()
    if connection.execute(held).first() is None or _pictures_of(connection, [id], picture.index):
        return False
    connection.execute(
        insert(pictures).values(
            job=id,
            place=picture.index,
            event=picture.event,
            seed=str(picture.seed),
            width=picture.width,
            height=picture.height,
            card=picture.card,
            media_type=picture.media_type,
            file=file,
        )
    )
    return True


def end_job(
    connection: Connection,
    id: str,
    status: JobStatus,
    error: JobError | None,
    last_event: int,
    now: float,
    expires: float,
    message: Webhook | None,
) -> bool:
    """Bring a job to its terminal state and put its message into the outbox; False where it had reached one."""
    told = None if error is None else json.dumps(msgspec.to_builtins(error))
    won = _update_unfinished(
        connection, id, status=status, error=told, last_event=last_event, ended=now, expires=expires
    )
    if won and message is not None:
        connection.execute(insert(webhooks).values(status="pending", **msgspec.to_builtins(message)))
    return won


def picture_file(connection: Connection, tenant: str, id: str, index: int, now: float) -> tuple[str, bytes] | None:
    """A picture's media type and file."""
    found = connection.execute(
        select(pictures.c.media_type, pictures.c.file)
        .join(jobs)
        .where(jobs.c.id == id, jobs.c.tenant == tenant, pictures.c.place == index, _kept(now))
    ).first()
    return None if found is None else (found[0], found[1])


def sweep(connection: Connection, now: float, limit: int) -> int:
    """Delete expired jobs with their pictures and messages, `limit` at most; returns how many."""
    expired = select(jobs.c.id).where(jobs.c.expires <= now).limit(limit)
    gone = connection.execute(delete(jobs).where(jobs.c.id.in_(expired))).rowcount
    return int(gone)


def give_back_room(connection: Connection) -> None:
    """Shrink an SQLite file by what was deleted; PostgreSQL's vacuum does so by itself."""
    if connection.dialect.name == "sqlite":
        # As a script: executed alone, Python's driver takes the first step of it and frees one page. 80 MB at most, so
        # that writes do not wait for long; the rest at the next sweep.
        driver: Any = connection.connection.driver_connection
        driver.executescript("PRAGMA incremental_vacuum(20000)")


def _update_unfinished(connection: Connection, id: str, **values: Any) -> bool:
    condition = (jobs.c.id == id) & jobs.c.status.in_(UNFINISHED)
    return bool(connection.execute(update(jobs).where(condition).values(**values)).rowcount)


def _kept(now: float) -> Any:
    return or_(jobs.c.expires.is_(None), jobs.c.expires > now)


def _one(connection: Connection, conditions: Sequence[Any]) -> Job | None:
    return next(iter(_some(connection, select(jobs).where(*conditions))), None)


def _some(connection: Connection, query: Any) -> list[Job]:
    rows = connection.execute(query).all()
    drawn = _pictures_of(connection, [row.id for row in rows])
    return [_job(row, drawn.get(row.id, ())) for row in rows]


def _pictures_of(
    connection: Connection, ids: Iterable[str], index: int | None = None
) -> dict[str, tuple[JobPicture, ...]]:
    columns = [column for column in pictures.c if column is not pictures.c.file]
    query = select(*columns).where(pictures.c.job.in_(list(ids))).order_by(pictures.c.job, pictures.c.place)
    if index is not None:
        query = query.where(pictures.c.place == index)
    found: dict[str, tuple[JobPicture, ...]] = {}
    for job, place, event, seed, width, height, card, media_type in connection.execute(query):
        picture = JobPicture(place, event, int(seed), width, height, card, media_type)
        found[job] = (*found.get(job, ()), picture)
    return found


def _job(row: Row[Any], drawn: tuple[JobPicture, ...]) -> Job:
    values = dict(row._mapping)
    error = values.pop("error")
    return Job(
        **values
        | {
            "request": json.loads(values["request"]),
            "orders": msgspec.msgpack.decode(values["orders"], type=tuple[PictureOrder, ...]),
            "metadata": json.loads(values["metadata"]),
            "error": None if error is None else JobError(**json.loads(error)),
            "pictures": drawn,
        }
    )


# --- the outbox of webhooks


def next_webhook(
    connection: Connection, now: float, not_these: Sequence[str], not_hosts: Sequence[str]
) -> Webhook | None:
    """The message that is due the longest."""
    columns = [webhooks.c[name] for name in Webhook.__dataclass_fields__]
    conditions = (*_pending(not_these, not_hosts), webhooks.c.due <= now)
    found = connection.execute(select(*columns).where(*conditions).order_by(webhooks.c.due).limit(1)).first()
    return None if found is None else Webhook(**found._mapping)


def next_due(connection: Connection, not_these: Sequence[str], not_hosts: Sequence[str]) -> float | None:
    """When the next message is due, or None without any."""
    query = select(func.min(webhooks.c.due)).where(*_pending(not_these, not_hosts))
    due: float | None = connection.execute(query).scalar_one()
    return due


def _pending(not_these: Sequence[str], not_hosts: Sequence[str]) -> tuple[Any, ...]:
    return (
        webhooks.c.status == "pending",
        webhooks.c.id.not_in(list(not_these)),
        webhooks.c.host.not_in(list(not_hosts)),
    )


def note_delivery(connection: Connection, id: str, status: WebhookStatus, due: float, error: str | None) -> None:
    """Keep what became of an attempt to send a message."""
    connection.execute(
        update(webhooks)
        .where(webhooks.c.id == id)
        .values(status=status, due=due, last_error=error, attempts=webhooks.c.attempts + 1)
    )


def webhook_of_job(connection: Connection, id: str) -> tuple[WebhookStatus, int, str | None] | None:
    """Status, attempts and last error of a job's message."""
    columns = (webhooks.c.status, webhooks.c.attempts, webhooks.c.last_error)
    found = connection.execute(select(*columns).where(webhooks.c.job == id)).first()
    return None if found is None else (found[0], found[1], found[2])


# --- facts


def fact(connection: Connection, name: str, otherwise: str) -> str:
    """A fact about this store; `otherwise` is kept where it had none."""
    found = connection.execute(select(facts.c.value).where(facts.c.name == name)).scalar_one_or_none()
    if found is None:
        connection.execute(insert(facts).values(name=name, value=otherwise))
    return otherwise if found is None else str(found)
