"""What HTTP, jobs and arms ask of whatever draws pictures: worker processes, Ray, or a test's double."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smalti.serving.messages import Failed, Finished, ModelCard, PictureEvent, PictureOrder

TERMINAL = (Finished, Failed)


class Unavailable(Exception):
    """The service cannot take the request now, and may later. retry_after: seconds, an honest estimate."""

    code = "unavailable"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    """The bounded queue has no room for so much work."""

    code = "queue_full"


class NotReady(Unavailable):
    """The model has no worker that is up: starting, or failing to start."""

    code = "not_ready"


class ShuttingDown(Unavailable):
    """The server drains and takes nothing new."""

    code = "shutting_down"


class Ticket(Protocol):
    """One accepted picture. It always reaches exactly one Finished or Failed."""

    number: int
    card: ModelCard  # the version that draws it, which stays the same whatever is swapped meanwhile

    def events(self) -> AsyncIterator[PictureEvent]:
        """What happens to it, in order, the terminal event last; previews that nobody fetched in time are left out.

        To be iterated once. It may begin late: what has happened is kept.
        """
        ...

    def cancel(self) -> None:
        """Drop it at the next step: its terminal event is then Failed("cancelled"), unless it had ended."""
        ...

    @property
    def place(self) -> int | None:
        """Pictures of the same model that are before it; 0 when it is being drawn, None when it has ended."""
        ...


@dataclass(frozen=True)
class WorkerState:
    """One worker as `smalti top`, /readyz and the metrics see it.

    state: "starting", "ready", "draining", "backing_off" or "failed". heartbeat_age: seconds since its last sign.
    mean_step_seconds: of its recent ticks. restarts: since the server started.
    """

    number: int
    model: str
    state: str
    pid: int | None
    restarts: int
    heartbeat_age: float
    mean_step_seconds: float
    live: int
    waiting: int
    rows: int


@dataclass(frozen=True)
class ServiceState:
    """The service at one moment. cost_left, cost_limit: rows x tokens x calls accepted and not done, and the bound.

    cost_per_second: as measured lately, 0 before anything was drawn. finished: pictures drawn since the server started.
    """

    workers: tuple[WorkerState, ...]
    cost_left: float
    cost_limit: float
    cost_per_second: float
    ticks: int
    rows: int
    padded_rows: int
    draining: bool
    finished: int = 0


class PictureService(Protocol):
    """Draws pictures with one or several models."""

    def cards(self) -> Sequence[ModelCard]:
        """The versions that take requests, the newest of a name last."""
        ...

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        """Accept all orders or none. model: a card's name or key.

        Raises UserError for an unknown model and orders that it cannot draw, Unavailable where there is no room.
        """
        ...

    def state(self) -> ServiceState:
        """The service now."""
        ...


class VersionedService(PictureService, Protocol):
    """A service whose models come and go while it serves."""

    async def add_version(self, name: str, run: Path) -> ModelCard:
        """Load a run's weights as name; returns when workers are warm. What served before goes on as it was.

        Raises UserError, with the reason, where the run cannot be served.
        """
        ...

    async def retire_version(self, key: str) -> None:
        """Take no new orders for a card's key; returns when what it had accepted has ended and its workers are gone."""
        ...
