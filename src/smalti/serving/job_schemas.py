"""What requests and answers about jobs hold."""

import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smalti.serving.schemas import GenerationRequest
from smalti.serving.store_tables import Job, JobStatus, WebhookStatus

_MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class JobRequest(GenerationRequest):
    """A generation request whose pictures are drawn while nobody waits. stream must be left out: a job has events."""

    webhook_url: Annotated[
        str | None,
        Field(max_length=2000, description="Where to POST the signed message of the job's end (Standard Webhooks)."),
    ] = None
    metadata: Annotated[
        dict[_MetadataKey, _MetadataValue] | None,
        Field(max_length=16, description="Kept with the job and told with it."),
    ] = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"class_label": 3, "n": 10, "seed": 11, "num_inference_steps": 250},
                {"prompt": "7", "n": 4, "webhook_url": "https://example.com/done", "metadata": {"order": "8"}},
            ]
        }
    )


class JobErrorObject(BaseModel):
    """Why the job failed. index: of the first picture that could not be drawn; the others may be there."""

    code: str
    message: str
    param: str | None
    index: int | None


class JobImage(BaseModel):
    """A picture that is done. model: the version that drew it."""

    index: int
    url: str
    seed: int
    size: str
    model: str


class JobWebhook(BaseModel):
    """The message of the job's end: null until then, then pending, delivered, or dead after too many tries."""

    url: str
    status: WebhookStatus | None = None
    attempts: int = 0
    last_error: str | None = None


class JobObject(BaseModel):
    """A job. model: the version that it was accepted for. place: pictures before its first one in the queue."""

    id: str
    object: Literal["job"] = "job"
    created_at: int
    status: JobStatus
    model: str
    n: int
    attempts: int = Field(description="How often it was given to a model; more than 1 after the server has died.")
    place: int | None = None
    started_at: int | None
    ended_at: int | None
    expires_at: int | None = Field(description="When it and its pictures are deleted.")
    images: list[JobImage]
    error: JobErrorObject | None
    request: dict[str, Any] = Field(description="As it was sent.")
    metadata: dict[str, str]
    webhook: JobWebhook | None


class JobList(BaseModel):
    """A page of jobs. has_more: ask again with after=last_id."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookSecret(BaseModel):
    """What the caller's messages are signed with."""

    secret: str


def picture_url(job: str, index: int) -> str:
    """Where a job's picture is fetched, relative to the server."""
    return f"/v1/jobs/{job}/images/{index}"


def job_object(
    job: Job, place: int | None = None, webhook: tuple[WebhookStatus, int, str | None] | None = None
) -> JobObject:
    """A job as the API tells it. webhook: status, attempts and last error of its message."""
    told = None
    if job.webhook_url is not None:
        status, attempts, error = webhook or (None, 0, None)
        told = JobWebhook(url=job.webhook_url, status=status, attempts=attempts, last_error=error)
    images = [
        JobImage(
            index=picture.index,
            url=picture_url(job.id, picture.index),
            seed=picture.seed,
            size=f"{picture.width}x{picture.height}",
            model=picture.card,
        )
        for picture in sorted(job.pictures, key=lambda p: p.index)
    ]
    error_object = None
    if job.error is not None:
        e = job.error
        error_object = JobErrorObject(code=e.code, message=e.message, param=e.param, index=e.index)
    return JobObject(
        id=job.id,
        created_at=int(job.created),
        status=job.status,
        model=job.card,
        n=len(job.orders),
        attempts=job.attempts,
        place=place,
        started_at=_seconds(job.started),
        ended_at=_seconds(job.ended),
        expires_at=_seconds(job.expires),
        images=images,
        error=error_object,
        request=dict(job.request),
        metadata=dict(job.metadata or {}),
        webhook=told,
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def is_idempotency_key(key: str) -> bool:
    """Whether a key is 1 .. 255 visible ASCII characters."""
    return 0 < len(key) <= 255 and all(c in string.ascii_letters + string.digits + string.punctuation for c in key)
