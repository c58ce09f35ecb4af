"""`smalti serve` on Ray Serve: the same application and the same engine, on as many machines as a cluster has.

One application "smalti" holds the API (deployment "api"); each model version is an application of its own (deployment
"engine"), so that a version comes and goes without the others noticing. Versions are handed to the API as its
user_config, which Ray Serve changes without a restart. Ray is imported inside the functions.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from smalti.errors import UserError, unknown_name
from smalti.serving.access import read_keys
from smalti.serving.arms import Arms
from smalti.serving.messages import ModelCard
from smalti.serving.model_settings import ModelSettings
from smalti.serving.ray_engine import MOST_PICTURES, EngineReplica
from smalti.serving.ray_messages import Beat
from smalti.serving.ray_service import OpenStream, RayPictureService, RayServiceSettings
from smalti.serving.server_metrics import MeasuredService, ServerMetrics
from smalti.serving.server_settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from smalti.serving.server import ServedRun

Settings = TypeVar("Settings")

API = "smalti"  # the API's application
_ENGINE = "smalti-engine-"  # what the names of engines' applications begin with
_BEAT_SECONDS = 5.0
_WAITS = 300  # seconds for an application that is still to come
_log = logging.getLogger("smalti.serving")


@dataclass(frozen=True)
class RaySettings:
    """How much of the cluster an engine takes. Raises UserError.

    replicas: of each model, or with max_replicas the fewest. max_replicas: scale up to so many by queued cost;
    target_cost: rows x tokens x calls that a replica should have queued. cpus, gpus: of a replica. api_replicas: of the
    API, each with its own bounded queue. hang_seconds: with work and without a sign for the larger of this and 20
    steps, Ray ends a replica; it looks every health_seconds. drain_seconds: for pictures in flight when a replica is
    stopped. proxies: where Ray listens for HTTP; a connection ends with the machine whose proxy it goes through.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_cost: float = 200_000.0
    cpus: float = 1.0
    gpus: float = 0.0
    api_replicas: int = 1
    hang_seconds: float = 10.0
    drain_seconds: float = 120.0
    health_seconds: float = 5.0
    proxies: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    service: RayServiceSettings = field(default_factory=RayServiceSettings)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.api_replicas < 1:
            raise UserError(f"replicas={self.replicas} and api_replicas={self.api_replicas} must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UserError(f"max_replicas={self.max_replicas} must be at least replicas={self.replicas}")
        for name in ("target_cost", "hang_seconds", "drain_seconds", "health_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")


class Api:
    """The API's replica: the FastAPI application over arms over a RayPictureService."""

    def __init__(self, server: bytes, service: bytes) -> None:
        """server: ServerSettings, service: RayServiceSettings, as MessagePack."""
        self.server = msgspec.msgpack.decode(server, type=ServerSettings)
        self.service = RayPictureService(msgspec.msgpack.decode(service, type=RayServiceSettings))
        self.arms = Arms(self.service)
        self._handles: dict[str, tuple[ModelCard, Any]] = {}  # by application
        self._beats: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Called by Ray Serve, after the constructor."""
        from smalti.serving.app import create_app
        from smalti.serving.state_router import state_router

        metrics = ServerMetrics()
        service = MeasuredService(self.arms, metrics)
        return create_app(service, self.server, metrics=metrics, routers=[state_router(service)])

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve the engines of these applications: {"engines": {application: weight}}, of each model its control first.

        Weights are of a model's arms. Waits for applications that are not there yet; Ray starts them in any order.
        """
        engines: dict[str, float] = config.get("engines", {})
        handles = {}
        for application in engines:
            if application not in self._handles:
                handle = await _handle_of(application)
                card = msgspec.msgpack.decode(await handle.card.remote(), type=ModelCard)
                self._handles[application] = card, handle
            handles[application] = self._handles[application]
        self._handles = handles
        self.service.set_engines([(card, _opener(handle)) for card, handle in handles.values()])
        for name in {card.name for card, _ in handles.values()}:
            weights = {card.key: engines[app] for app, (card, _) in handles.items() if card.name == name}
            self.arms.set_arms(name, weights)
        await self._ask_once()
        if self._beats is None:
            self._beats = asyncio.create_task(self._ask_for_beats())

    async def _ask_for_beats(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            await self._ask_once()

    async def _ask_once(self) -> None:
        for card, handle in list(self._handles.values()):
            try:
                beat = msgspec.msgpack.decode(await asyncio.wait_for(handle.beat.remote(), _BEAT_SECONDS), type=Beat)
                self.service.hear_of_replica(card, beat)
            except Exception as error:  # it is lost or starts: the next one tells
                _log.info("%s: no beat: %s", card.key, error)


async def _handle_of(application: str) -> Any:
    """The handle of an application's engines. Raises what Ray raises where it is not there after some minutes."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    for _ in range(_WAITS):
        try:
            return serve.get_app_handle(application)
        except RayServeException:
            await asyncio.sleep(1.0)
    return serve.get_app_handle(application)


def _opener(handle: Any) -> OpenStream:
    drawing = handle.options(stream=True).draw

    def open_stream(task: bytes, version: str, cost: float) -> Any:
        return drawing.remote(task, version, cost=cost)

    return open_stream


def engine_application(model: ModelSettings, settings: RaySettings | None = None) -> "Application":
    """A model's engines, to be run under engine_name(model) without a route. Ray starts, checks and scales them."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    settings = settings or RaySettings()
    if settings.gpus:  # of which Ray shows a replica its own
        model = msgspec.structs.replace(model, devices=("cuda:0",))
    if settings.max_replicas is None:
        number: dict[str, Any] = {"num_replicas": settings.replicas}
    else:
        policy = AutoscalingPolicy(
            policy_function="smalti.serving.ray_routing:QueuedCostPolicy",
            policy_kwargs={"target_cost": settings.target_cost},
        )
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas, max_replicas=settings.max_replicas, upscale_delay_s=10.0, policy=policy
            )
        }
    deployment = serve.deployment(
        EngineReplica,
        name="engine",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=MOST_PICTURES,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=settings.health_seconds,
        health_check_timeout_s=30.0,
        request_router_config=RequestRouterConfig(
            request_router_class="smalti.serving.ray_routing:LeastQueuedCost", request_routing_stats_period_s=1.0
        ),
        **number,
    )
    return deployment.bind(msgspec.json.encode(model), settings.hang_seconds)


def api_application(
    engines: Mapping[str, float], server: ServerSettings | None = None, settings: RaySettings | None = None
) -> "Application":
    """The API, to be run as "smalti" at /. engines: applications and the weights of their arms, the control first."""
    from ray import serve

    settings = settings or RaySettings()
    deployment = serve.deployment(
        serve.ingress()(Api),
        name="api",
        num_replicas=settings.api_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        user_config={"engines": dict(engines)},
    )
    encode = msgspec.msgpack.encode
    return deployment.bind(encode(server or ServerSettings()), encode(settings.service))


def build_engine(args: dict[str, Any]) -> "Application":
    """engine_application for a Serve config file: {"model": fields of ModelSettings, "ray": fields of RaySettings}."""
    model = _settings(args.get("model", {}), ModelSettings, "model")
    return engine_application(model, _settings(args.get("ray", {}), RaySettings, "ray"))


def build_api(args: dict[str, Any]) -> "Application":
    """api_application for a Serve config file: {"engines": {application: weight}, "server": fields of ServerSettings,
    "ray": fields of RaySettings}. API keys come from $SMALTI_API_KEYS, where this runs.
    """
    server = _settings(args.get("server", {}), ServerSettings, "server")
    server = replace(server, keys=read_keys(None, os.environ))
    return api_application(args.get("engines", {}), server, _settings(args.get("ray", {}), RaySettings, "ray"))


def _settings(given: dict[str, Any], kind: type[Settings], where: str) -> Settings:
    """Raises UserError naming a field that is unknown or has a value of another type."""
    known = msgspec.inspect.type_info(kind)
    assert isinstance(known, msgspec.inspect.StructType | msgspec.inspect.DataclassType)
    names = [field.name for field in known.fields]
    for name in given:
        if name not in names:
            raise unknown_name(f"field of {where}", name, names)
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}") from None


def engine_name(model: ModelSettings) -> str:
    """The application of a model's engines. Another run of the same name is another application."""
    return f"{_ENGINE}{model.name}-{hashlib.sha256(model.run.encode()).hexdigest()[:8]}"


def deploy_on_ray(
    runs: Sequence["ServedRun"],
    settings: RaySettings | None = None,
    server: ServerSettings | None = None,
    model: ModelSettings | None = None,
) -> None:
    """Serve runs on the Ray cluster that is there, or else on this machine alone; returns when they are up.

    Called again with other runs, it starts the new ones, points the API to them and then stops those that are not
    named any more, each after its pictures. Runs of one name are its arms. model: how each is run, but for name and
    run. A cluster's machines must find the runs at the same paths. Raises UserError where a run cannot be served, and
    where Ray is not installed.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError("serving on Ray needs Ray Serve: pip install 'smalti[ray]'") from None
    settings, server = settings or RaySettings(), server or ServerSettings()
    template = model or ModelSettings(name="", run="")
    engines: dict[str, float] = {}
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    serve.start(proxy_location=settings.proxies, http_options={"host": server.host, "port": server.port})
    for one in runs:
        own = msgspec.structs.replace(template, name=one.name, run=str(one.run.absolute()))
        application = engine_name(own)
        engines[application] = one.weight
        try:
            serve.run(engine_application(own, settings), name=application, route_prefix=None)
        except RuntimeError as error:
            status = serve.status().applications.get(application)
            reason = str(error) if status is None else status.message or str(error)
            serve.delete(application)
            raise UserError(f"{own.name}: run={own.run} cannot be served on Ray: {_last_line(reason)}") from None
    serve.run(api_application(engines, server, settings), name=API, route_prefix="/")
    for application in serve.status().applications:
        if application.startswith(_ENGINE) and application not in engines:
            serve.delete(application)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
