"""The whole server in one process: supervisor, arms, jobs, HTTP, page. Its workers are processes of their own."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from smalti.errors import UserError
from smalti.serving.access import caller_of
from smalti.serving.admin import admin_router
from smalti.serving.api_errors import ApiError
from smalti.serving.app import create_app
from smalti.serving.arms import Arms, ArmSettings
from smalti.serving.job_routes import jobs_router
from smalti.serving.jobs import Jobs, JobSettings
from smalti.serving.messages import ModelCard
from smalti.serving.server_metrics import MeasuredService, ServerMetrics
from smalti.serving.server_settings import ServerSettings
from smalti.serving.state_router import state_router
from smalti.serving.store import open_store
from smalti.serving.supervisor import Supervisor, SupervisorSettings
from smalti.serving.webhooks import Webhooks, WebhookSettings

_log = logging.getLogger("smalti.serving")

ADMIN_TENANT = "admin"


@dataclass(frozen=True)
class ServedRun:
    """A run and the name that requests call it by. weight: of its arm, where several runs have one name."""

    name: str
    run: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ServeSettings:
    """All that a server is told. store: of its jobs, a file's path or a database's URL. models: the folder from which
    an administrator may load more runs. ui: whether to mount the page at /ui. max_pictures: of one draw there.
    """

    supervisor: SupervisorSettings
    http: ServerSettings = field(default_factory=ServerSettings)
    store: str | Path = "smalti-jobs.sqlite"
    jobs: JobSettings = field(default_factory=JobSettings)
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    arms: ArmSettings = field(default_factory=ArmSettings)
    models: Path | None = None
    ui: bool = True
    max_pictures: int = 8


def served_runs(runs: Sequence[str]) -> list[ServedRun]:
    """RUN, NAME=RUN or NAME=RUN:WEIGHT, each as a served run; the name is the folder's where none is given.

    Raises UserError for a weight that is no number above 0.
    """
    found = []
    for text in runs:
        name, _, rest = text.rpartition("=") if "=" in text else ("", "", text)
        path, colon, weight = rest.rpartition(":")
        if not colon or not _is_number(weight):
            path, weight = rest, "1"
        if not float(weight) > 0:
            raise UserError(f"{text}: the weight must be above 0")
        found.append(ServedRun(name or Path(path).resolve().name, Path(path), float(weight)))
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


async def _load(arms: Arms, runs: Sequence[ServedRun]) -> list[ModelCard]:
    """Load all runs at once; those of one name become its arms. Raises UserError for the first that cannot be."""
    tasks = [asyncio.ensure_future(arms.service.add_version(one.name, one.run)) for one in runs]
    try:
        cards = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    for name in {one.name for one in runs}:
        weights = {card.key: one.weight for one, card in zip(runs, cards, strict=True) if one.name == name}
        if len(weights) > 1:
            arms.set_arms(name, weights)
    return list(cards)


def _admin_guard(settings: ServerSettings) -> Any:
    """A dependency that lets the tenant "admin" through, and on a server without keys anybody on this machine."""

    async def guard(request: Request) -> None:
        if settings.keys and caller_of(request).tenant != ADMIN_TENANT:
            raise ApiError(403, f"this needs the key of the tenant {ADMIN_TENANT!r}", code="admin_only")

    return guard


def assemble(settings: ServeSettings, supervisor: Supervisor, arms: Arms) -> FastAPI:
    """The application around a supervisor; its lifespan starts the jobs and drains the workers."""
    metrics = ServerMetrics()
    service = MeasuredService(arms, metrics)
    store = open_store(settings.store)
    jobs = Jobs(service, store, Webhooks(store, settings.webhooks), settings.jobs)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        try:
            yield
        finally:
            # First the workers, so that jobs hear of what they have just drawn; what was not goes to the next server.
            await supervisor.drain()
            await jobs.close()
            await arms.close()
            await store.close()

    routers = [jobs_router(jobs, settings.http), state_router(service)]
    routers.append(admin_router(arms, _admin_guard(settings.http), settings.models))
    app = create_app(service, settings.http, metrics=metrics, routers=routers, lifespan=lifespan)
    if settings.ui:
        from smalti.serving.ui import mount_page

        mount_page(app, service, max_pictures=settings.max_pictures)
    return app


async def serve(
    settings: ServeSettings,
    runs: Sequence[ServedRun],
    started: "asyncio.Future[tuple[int, list[ModelCard]]] | None" = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted and end.

    started: gets the port and the models' cards when requests are taken. Raises UserError where a run cannot be served
    or the address is taken.
    """
    listener = _listener(settings.http)
    supervisor = Supervisor(settings.supervisor)
    arms = Arms(supervisor, settings.arms)
    try:
        cards = await _load(arms, runs)
        app = assemble(settings, supervisor, arms)
    except BaseException:
        listener.close()
        await supervisor.drain()
        raise
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # RequestFrame writes one
        timeout_graceful_shutdown=int(settings.supervisor.drain_seconds) + 5,
        server_header=False,
    )
    server = _DrainingServer(config, supervisor)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if started is not None and not started.done() and server.started:
            started.set_result((listener.getsockname()[1], cards))
        await serving
    finally:
        listener.close()


def _listener(http: ServerSettings) -> socket.socket:
    """A bound socket, taken before the models are loaded: an address in use is told at once. Raises UserError."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((http.host, http.port))
    except OSError as error:
        listener.close()
        raise UserError(f"port={http.port} on {http.host}: {error.strerror}; give another with --port") from None
    return listener


class _DrainingServer(uvicorn.Server):
    """uvicorn, which on a signal also has the supervisor refuse what is new."""

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor) -> None:
        super().__init__(config)
        self._supervisor = supervisor

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends at once. The process then exits with 0, where uvicorn would raise it."""
        self._supervisor.refuse_new()
        self.force_exit = self.should_exit
        self.should_exit = True
