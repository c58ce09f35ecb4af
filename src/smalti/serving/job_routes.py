"""/v1/jobs: pictures that are drawn while nobody waits."""

import base64
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response

from smalti.serving.access import caller_of
from smalti.serving.api_errors import invalid
from smalti.serving.job_events import JobEvent
from smalti.serving.job_schemas import JobList, JobObject, JobRequest, WebhookSecret, is_idempotency_key
from smalti.serving.jobs import Jobs, NewJob
from smalti.serving.openapi import FILE_ANSWERS, Answers
from smalti.serving.orders import Circumstances, find_card, orders_of
from smalti.serving.schemas import ErrorBody
from smalti.serving.server_settings import ServerSettings
from smalti.serving.streams import EventStreamResponse

_Id = Annotated[str, Path(max_length=100, description="As POST /v1/jobs told it.")]
_CREATED: Answers = {
    202: {"description": "The job was accepted, or had been with the same idempotency key."},
    409: {"description": "The idempotency key belongs to a job of another body.", "model": ErrorBody},
}
_EVENT = {
    "type": "object",
    "description": "One event.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}, "id": {"type": "string"}},
    "required": ["event", "data", "id"],
}
_EVENTS: Answers = {
    200: {
        "description": "Server-sent events named queued, running, progress, preview, picture, then succeeded, failed "
        "or cancelled. The header Last-Event-ID goes on behind that event.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}


class JobStream:
    """A job's events as a source of server-sent ones. Nothing ends when a listener goes."""

    def __init__(self, events: AsyncGenerator[JobEvent, None]) -> None:
        self._events = events

    async def pictures(self) -> AsyncGenerator[tuple[int, JobEvent], None]:
        """The events with their numbers."""
        async for event in self._events:
            yield event.number, event

    async def close(self) -> None:
        """Stop listening."""
        await self._events.aclose()


def event_text(number: int, event: JobEvent) -> tuple[str, str, int]:
    """Name, data and number of an event."""
    data = {"type": event.kind, **event.data}
    if event.image is not None:
        data["b64_json"] = base64.b64encode(event.image).decode("ascii")
    return event.kind, json.dumps(data), number


def jobs_router(jobs: Jobs, settings: ServerSettings) -> APIRouter:
    """The routes of jobs, to be given to create_app. A job is seen by the tenant that made it, by nobody else."""
    router = APIRouter(prefix="/v1", tags=["jobs"])

    @router.post("/jobs", status_code=202, responses=_CREATED)
    async def create_job(
        request: Request,
        response: Response,
        asked: JobRequest,
        idempotency_key: Annotated[
            str | None,
            Header(description="1 .. 255 visible ASCII characters; the same key with the same body makes one job."),
        ] = None,
    ) -> JobObject:
        """Accept pictures to be drawn later. The job is durable when this answers, and goes on when the client goes."""
        if asked.stream:
            raise invalid("stream: a job has no stream; listen to GET /v1/jobs/{id}/events", "stream")
        if idempotency_key is not None and not is_idempotency_key(idempotency_key):
            raise invalid("Idempotency-Key must be 1 .. 255 visible ASCII characters", "idempotency-key")
        if asked.webhook_url is not None:
            jobs.webhooks.check_url(asked.webhook_url)
        caller = caller_of(request)
        card = find_card(jobs.service, asked.model)
        # A stream's request is the one whose orders have previews.
        with_previews = asked.model_copy(update={"stream": True})
        new = NewJob(
            tenant=caller.tenant,
            model=asked.model or card.name,
            orders=orders_of(with_previews, card, Circumstances(caller), settings.max_n),
            request=asked.model_dump(mode="json", exclude_unset=True),
            webhook_url=asked.webhook_url,
            metadata=asked.metadata or {},
            idempotency_key=idempotency_key,
        )
        job, is_new = await jobs.create(new)
        response.headers["location"] = f"/v1/jobs/{job.id}"
        if not is_new:
            response.headers["idempotent-replayed"] = "true"
        return await jobs.describe(job)

    @router.get("/jobs")
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100, description="The last job of the page before.")] = None,
        order: Annotated[Literal["asc", "desc"], Query(description="desc: the newest first.")] = "desc",
    ) -> JobList:
        """The caller's jobs."""
        page, more = await jobs.page(caller_of(request).tenant, limit, after, order == "desc")
        data = [await jobs.describe(job) for job in page]
        ids = [job.id for job in data]
        return JobList(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=more)

    @router.get("/jobs/{job_id}")
    async def read_job(request: Request, job_id: _Id) -> JobObject:
        """A job."""
        return await jobs.describe(await jobs.get(caller_of(request).tenant, job_id))

    @router.delete("/jobs/{job_id}")
    async def cancel_job(request: Request, job_id: _Id) -> JobObject:
        """End a job at the next step. One that has ended stays as it is, so that asking twice does no harm."""
        return await jobs.describe(await jobs.cancel(caller_of(request).tenant, job_id))

    @router.get("/jobs/{job_id}/events", response_class=Response, responses=_EVENTS)
    async def listen(
        request: Request,
        job_id: _Id,
        last_event_id: Annotated[
            str | None, Header(pattern=r"^[0-9]{0,18}$", description="The id of the last event that was received.")
        ] = None,
    ) -> Response:
        """What happens to a job, as server-sent events."""
        tenant = caller_of(request).tenant
        await jobs.get(tenant, job_id)
        stream = JobStream(jobs.events(tenant, job_id, int(last_event_id or 0)))
        return EventStreamResponse(stream, event_text, settings.stream_ping_seconds, settings.stream_stall_seconds)

    @router.get("/jobs/{job_id}/images/{index}", response_class=Response, responses=FILE_ANSWERS)
    async def read_image(request: Request, job_id: _Id, index: Annotated[int, Path(ge=0, le=1000)]) -> Response:
        """A picture of a job, as soon as it is done and until the job expires."""
        media_type, file = await jobs.image(caller_of(request).tenant, job_id, index)
        headers = {"cache-control": "private, max-age=3600, immutable", "x-content-type-options": "nosniff"}
        return Response(file, 200, headers, media_type)

    @router.get("/webhook_secret")
    async def read_webhook_secret(request: Request) -> WebhookSecret:
        """What the caller verifies webhooks with, as the libraries of Standard Webhooks take it."""
        return WebhookSecret(secret=jobs.webhooks.secret_of(caller_of(request).tenant))

    return router
