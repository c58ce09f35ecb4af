"""The HTTP API: OpenAI's image endpoints over a PictureService, health, metrics and pictures behind URLs.

One process and one event loop; torch is not imported here. Jobs and the page come as routers and mounts of the
caller's.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, FastAPI, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from smalti import __version__
from smalti.serving.access import Gate, RateLimits, caller_of
from smalti.serving.answers import MEDIA_TYPES, Drawing, event_text, images_response, model_object
from smalti.serving.api_errors import ApiError, install_error_handlers, invalid, near_names
from smalti.serving.messages import Fault
from smalti.serving.openapi import (
    DRAWING_ANSWERS,
    FILE_ANSWERS,
    METRICS_ANSWERS,
    NOT_READY_ANSWERS,
    edit_body,
    install_openapi,
)
from smalti.serving.orders import Circumstances, find_card, orders_of
from smalti.serving.output_files import OutputFiles
from smalti.serving.request_frame import BodyLimit, RequestFrame
from smalti.serving.schemas import (
    Alive,
    EditRequest,
    GenerationRequest,
    ImagesResponse,
    ModelList,
    ModelObject,
    PictureRequest,
    Readiness,
)
from smalti.serving.server_metrics import MeasuredService, ServerMetrics
from smalti.serving.server_settings import ServerSettings
from smalti.serving.service import NotReady, PictureService, ShuttingDown
from smalti.serving.streams import EventStreamResponse, PictureStream, all_finished, cancel_all, while_connected

_log = logging.getLogger(__name__)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Deadline = Annotated[
    float | None,
    Header(
        alias="x-smalti-deadline", gt=0, le=86400, allow_inf_nan=False, description="Seconds after which to give up."
    ),
]
_LONGEST_FIELD = 64 * 2**10  # bytes of a form's field that is no file: longer than any prompt


def create_app(
    service: PictureService,
    settings: ServerSettings | None = None,
    *,
    metrics: ServerMetrics | None = None,
    routers: Sequence[APIRouter] = (),
    mounts: Mapping[str, ASGIApp] | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The server's application.

    metrics: of a caller that has wrapped the service in MeasuredService and shares it with other parts; None makes
    both here. routers, mounts: other parts of the server; behind the same keys, limits and error objects.
    """
    settings = settings or ServerSettings()
    if metrics is None:
        metrics = ServerMetrics()
        service = MeasuredService(service, metrics)
    metrics.watch(service)
    app = FastAPI(
        title="smalti",
        version=__version__,
        description="Draw pictures with diffusion transformers: OpenAI's images API and a solver's fields.",
        redoc_url=None,
        lifespan=lifespan,
    )
    files = OutputFiles(settings.file_seconds, settings.file_bytes)
    app.include_router(_pictures_router(service, settings, files))
    app.include_router(_models_router(service))
    app.include_router(_health_router(service, metrics))
    for router in routers:
        app.include_router(router)
    for path, mounted in (mounts or {}).items():
        app.mount(path, mounted)
    install_error_handlers(app)
    install_openapi(app, keys=bool(settings.keys))
    # The last that is added is the first to see a request.
    app.add_middleware(BodyLimit, with_files=settings.body_limit, without_files=settings.json_limit)
    limits = None if settings.rate_limit is None else RateLimits(settings.rate_limit)
    app.add_middleware(Gate, keys=settings.keys, limits=limits, hosts=settings.hosts, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-smalti-deadline", "idempotency-key"],
            expose_headers=["x-request-id", "x-should-retry", "retry-after"],
        )
    app.add_middleware(RequestFrame, observe=metrics.observe_request)
    if settings.traces:
        _trace(app)
    return app


def _trace(app: FastAPI) -> None:
    """A span a request, as part of the trace that its traceparent header names."""
    try:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    except ImportError:
        _log.warning("traces=True has no effect: install opentelemetry-instrumentation-fastapi")
        return
    FastAPIInstrumentor.instrument_app(app, excluded_urls="livez,readyz,metrics")


def _pictures_router(service: PictureService, settings: ServerSettings, files: OutputFiles) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["pictures"])

    async def drawn(request: Request, asked: PictureRequest, deadline: float | None) -> Response:
        card = find_card(service, asked.model)
        circumstances = Circumstances(
            caller_of(request),
            settings.deadline_seconds if deadline is None else deadline,
            _fault(request, settings.allow_faults),
        )
        orders = orders_of(asked, card, circumstances, settings.max_n)
        _log.debug("request_id=%s prompt=%r", circumstances.caller.request_id, asked.prompt)
        tickets = service.submit(asked.model or card.name, orders)
        drawing = Drawing(asked, orders, tickets)
        kind: Literal["edit", "generation"] = "edit" if isinstance(asked, EditRequest) else "generation"
        if asked.stream:
            return await _streamed(request, drawing, kind)
        return await _whole(request, drawing)

    async def _streamed(request: Request, drawing: Drawing, kind: Literal["generation", "edit"]) -> Response:
        stream = PictureStream(drawing.tickets)
        try:
            await while_connected(stream.open(), request.receive)
        except BaseException:
            await stream.close()
            raise
        text = event_text(drawing, kind)
        return EventStreamResponse(stream, text, settings.stream_ping_seconds, settings.stream_stall_seconds)

    async def _whole(request: Request, drawing: Drawing) -> Response:
        try:
            finished = await while_connected(all_finished(drawing.tickets), request.receive)
        finally:
            cancel_all(drawing.tickets)
        base = settings.public_url or str(request.base_url)
        media_type = MEDIA_TYPES[drawing.orders[0].output_format]

        def to_url(picture: bytes) -> str:
            try:
                return f"{base.rstrip('/')}/v1/files/{files.add(picture, media_type)}"
            except ValueError as error:
                raise invalid(f"response_format=url: {error}; ask for b64_json", "response_format") from None

        answer = images_response(drawing, finished, to_url)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @router.post("/images/generations", response_model=ImagesResponse, responses=DRAWING_ANSWERS)
    async def generate_pictures(request: Request, asked: GenerationRequest, deadline: Deadline = None) -> Response:
        """Draw pictures from a prompt or a class, as OpenAI's `images.generate`."""
        return await drawn(request, asked, deadline)

    @router.post(
        "/images/edits",
        response_model=ImagesResponse,
        responses=DRAWING_ANSWERS,
        openapi_extra={"requestBody": edit_body()},
    )
    async def edit_picture(request: Request, deadline: Deadline = None) -> Response:
        """Redraw a picture, or what a mask says of it, as OpenAI's `images.edit`."""
        return await drawn(request, await _read_edit(request), deadline)

    @router.get("/files/{file_id}", response_class=Response, responses=FILE_ANSWERS)
    async def read_file(file_id: Annotated[str, Path(max_length=200)]) -> Response:
        """A picture that was asked for as a URL, while it is kept."""
        file = files.get(file_id)
        if file is None:
            raise ApiError(404, "this file never was or is no longer kept", code="file_not_found", param="file_id")
        headers = {
            "cache-control": f"private, max-age={files.seconds_left(file)}, immutable",
            "x-content-type-options": "nosniff",
        }
        return Response(file.content, 200, headers, file.media_type)

    return router


def _fault(request: Request, allowed: bool) -> Fault | None:
    name = request.headers.get("x-smalti-fault")
    if name is None:
        return None
    if not allowed:
        raise invalid("x-smalti-fault is refused: the server was started without allow_faults", "x-smalti-fault")
    for fault in get_args(Fault):
        if name == fault:
            return fault  # type: ignore[no-any-return]
    raise invalid(f"x-smalti-fault: {near_names(name, get_args(Fault))}", "x-smalti-fault")


async def _read_edit(request: Request) -> EditRequest:
    """The form of an edit. OpenAI's client calls a file image, or image[] in a list of one."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise invalid("the body must be a form, sent with content-type: multipart/form-data", None, "invalid_body")
    values: dict[str, Any] = {}
    async with request.form(max_files=4, max_fields=60, max_part_size=_LONGEST_FIELD) as form:
        for sent_name, value in form.multi_items():
            name = sent_name.removesuffix("[]")
            if name in values:
                raise invalid(f"{name} is there twice: one is taken", name)
            is_file = isinstance(value, UploadFile)
            if is_file != (name in ("image", "mask")) and name in EditRequest.model_fields:
                raise invalid(f"{name} must be a {'field' if is_file else 'file'} of the form", name)
            values[name] = await value.read() if isinstance(value, UploadFile) else value
    try:
        return EditRequest.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _models_router(service: PictureService) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["models"])

    @router.get("/models")
    async def list_models() -> ModelList:
        """The served models, as OpenAI's `models.list`."""
        newest = {card.name: card for card in service.cards()}
        return ModelList(data=[model_object(card) for card in newest.values()])

    @router.get("/models/{model_id}")
    async def read_model(model_id: Annotated[str, Path(max_length=200)]) -> ModelObject:
        """One of them, by its name or name@version."""
        return model_object(find_card(service, model_id), model_id)

    return router


def _health_router(service: PictureService, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/livez")
    async def alive() -> Alive:
        """Whether the process answers."""
        return Alive()

    @router.get("/readyz", responses=NOT_READY_ANSWERS)
    async def ready() -> Readiness:
        """Whether requests are taken: some model has a worker that is ready, and the server does not drain."""
        state = service.state()
        if state.draining:
            raise ShuttingDown("the server is shutting down", 5.0)
        workers: dict[str, int] = {}
        for worker in state.workers:
            if worker.state == "ready":
                workers[worker.model] = workers.get(worker.model, 0) + 1
        if not workers:
            raise NotReady("no model has a ready worker", 2.0)
        return Readiness(ready_workers=workers)

    @router.get("/metrics", response_class=Response, responses=METRICS_ANSWERS)
    async def read_metrics() -> Response:
        """Prometheus's text format."""
        return Response(metrics.text(), media_type=metrics.content_type)

    return router
