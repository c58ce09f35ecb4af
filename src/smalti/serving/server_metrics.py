"""What Prometheus reads at /metrics: the engine's state when asked, and what became of requests and pictures."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from smalti.serving.messages import Failed, Finished, ModelCard, PictureEvent, PictureOrder, Preview
from smalti.serving.service import PictureService, ServiceState, Ticket

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class ServerMetrics:
    """The counters of one server, in a registry of their own. An arm is a model's version, as name@version."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "smalti_http_requests", "HTTP requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "smalti_http_request_seconds",
            "HTTP request to end of answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pictures = Counter(
            "smalti_pictures", "Pictures that ended, by outcome", ["arm", "code"], registry=self.registry
        )
        self.first_preview = Histogram(
            "smalti_first_preview_seconds",
            "Accepted to first preview",
            ["arm"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.end_to_end = Histogram(
            "smalti_picture_seconds", "Accepted to finished", ["arm"], buckets=_SECONDS, registry=self.registry
        )
        self.resumed = Counter(
            "smalti_pictures_resumed",
            "Finished from a checkpoint of a worker that was lost",
            ["arm"],
            registry=self.registry,
        )
        self.queued = Histogram(
            "smalti_queued_seconds", "Admitted to first forward", ["arm"], buckets=_SECONDS, registry=self.registry
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request."""
        # A client may invent methods; the series must stay few.
        known = method if method in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS") else "other"
        self.requests.labels(known, route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def watch(self, service: PictureService) -> None:
        """Tell a service's state at each reading."""
        self.registry.register(_ServiceState(service))

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self.registry)


class MeasuredService:
    """A PictureService that counts what becomes of its pictures."""

    def __init__(self, service: PictureService, metrics: ServerMetrics) -> None:
        self.service, self.metrics = service, metrics

    def cards(self) -> Sequence[ModelCard]:
        """As the service's."""
        return self.service.cards()

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        """As the service's."""
        return [MeasuredTicket(ticket, self.metrics) for ticket in self.service.submit(model, orders)]

    def state(self) -> ServiceState:
        """As the service's."""
        return self.service.state()


class MeasuredTicket:
    """A ticket whose events are counted as they are fetched; one that is cancelled before its end counts as that."""

    def __init__(self, ticket: Ticket, metrics: ServerMetrics) -> None:
        self.ticket, self.metrics = ticket, metrics
        self.number, self.card = ticket.number, ticket.card
        self._accepted = time.perf_counter()
        self._counted = False

    async def events(self) -> AsyncIterator[PictureEvent]:
        """As the ticket's."""
        arm, previewed = self.card.key, False
        async for event in self.ticket.events():
            if isinstance(event, Preview) and not previewed:
                previewed = True
                self.metrics.first_preview.labels(arm).observe(time.perf_counter() - self._accepted)
            elif isinstance(event, Finished):
                self.metrics.end_to_end.labels(arm).observe(time.perf_counter() - self._accepted)
                self.metrics.queued.labels(arm).observe(event.queued_seconds)
                if event.resumed_from:
                    self.metrics.resumed.labels(arm).inc()
                self._count("ok")
            elif isinstance(event, Failed):
                self._count(event.code)
            yield event

    def cancel(self) -> None:
        """As the ticket's."""
        if self.place is not None:
            self._count("cancelled")
        self.ticket.cancel()

    @property
    def place(self) -> int | None:
        """As the ticket's."""
        return self.ticket.place

    def _count(self, code: str) -> None:
        if not self._counted:
            self._counted = True
            self.metrics.pictures.labels(self.card.key, code).inc()


class _ServiceState(Collector):
    """ServiceState as metrics."""

    def __init__(self, service: PictureService) -> None:
        self.service = service

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known when they are read, and the service may not be up yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Queue, ticks and rows, then the workers."""
        state = self.service.state()
        gauges = {
            "smalti_queue_cost": ("Rows x tokens x calls accepted and not done", state.cost_left),
            "smalti_queue_cost_limit": ("The most that is accepted", state.cost_limit),
            "smalti_cost_per_second": ("As measured lately", state.cost_per_second),
            "smalti_draining": ("1 while nothing new is taken", float(state.draining)),
            "smalti_rows_per_tick": (
                "Rows that shared a forward, mean since the start",
                state.rows / max(state.ticks, 1),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counters = {
            "smalti_ticks": ("Forwards", state.ticks),
            "smalti_rows": ("Rows that were asked for", state.rows),
            "smalti_padded_rows": ("Rows computed, with padding", state.padded_rows),
        }
        for name, (text, count) in counters.items():
            yield CounterMetricFamily(name, text, count)
        labels = ["worker", "arm"]
        up = GaugeMetricFamily("smalti_worker_ready", "1 where the worker is ready", labels=labels)
        restarts = CounterMetricFamily("smalti_worker_restarts", "Since the server started", labels=labels)
        heartbeat = GaugeMetricFamily("smalti_worker_heartbeat_age_seconds", "Since its last sign", labels=labels)
        step = GaugeMetricFamily("smalti_step_seconds", "Mean of recent ticks", labels=labels)
        live = GaugeMetricFamily("smalti_pictures_live", "Being drawn", labels=labels)
        waiting = GaugeMetricFamily("smalti_pictures_waiting", "Not yet begun", labels=labels)
        for worker in state.workers:
            of = [str(worker.number), worker.model]
            up.add_metric(of, float(worker.state == "ready"))
            restarts.add_metric(of, worker.restarts)
            heartbeat.add_metric(of, worker.heartbeat_age)
            step.add_metric(of, worker.mean_step_seconds)
            live.add_metric(of, worker.live)
            waiting.add_metric(of, worker.waiting)
        yield from (up, restarts, heartbeat, step, live, waiting)
