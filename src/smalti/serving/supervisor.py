"""The supervisor: holds all request truth, keeps the workers of each model version alive, and bounds the queue.

Workers are disposable processes; a picture that was accepted reaches exactly one end, whatever becomes of them.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import msgspec

from smalti.errors import UserError, unknown_name
from smalti.serving.messages import Failed, Finished, ModelCard, PictureOrder
from smalti.serving.model_settings import ModelSettings
from smalti.serving.pool import AcceptedPicture, Pool, PoolSettings
from smalti.serving.queue_bound import QueueBound, expected_cost
from smalti.serving.service import NotReady, ServiceState, ShuttingDown, Ticket
from smalti.serving.ticket import PictureTicket


@dataclass(frozen=True)
class SupervisorSettings:
    """cost_limit: rows x tokens x network calls that may be accepted and not done. drain_seconds: at shutdown.

    worker_module: what a worker process runs, as python -m.
    """

    model: ModelSettings
    pool: PoolSettings = field(default_factory=PoolSettings)
    cost_limit: float = 2e6
    drain_seconds: float = 30.0
    worker_module: str = "smalti.serving.worker"


class Supervisor:
    """Draws with worker processes; implements service.VersionedService. Lives on one event loop."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self.settings = settings
        self._pools: list[Pool] = []
        self._numbers = count(1)
        self._finished = 0  # pictures
        self._bound = QueueBound(settings.cost_limit)
        self._draining = False

    # --- models

    async def add_version(self, name: str, run: Path) -> ModelCard:
        """Load a run as name; returns when its first worker is warm. Raises UserError where it cannot be served."""
        model = msgspec.structs.replace(self.settings.model, name=name, run=str(run))
        pool = Pool(
            name,
            run,
            self.settings.worker_module,
            msgspec.json.encode(model),
            self.settings.pool,
            self._on_end,
            self._bound.rate,
        )
        pool.start()
        try:
            card = await pool.until_ready()
            if any(other.card is not None and other.card.key == card.key for other in self._pools):
                raise UserError(f"{card.key} is served already: {run} holds the same weights")
        except BaseException:
            await pool.stop()
            raise
        self._pools.append(pool)
        return card

    async def retire_version(self, key: str) -> None:
        """Take nothing new for a card's key; returns when what it had accepted has ended and its workers are gone."""
        pool = self._pool(key)
        pool.retired = True
        await pool.until_empty()
        await pool.stop()
        self._pools.remove(pool)

    def cards(self) -> Sequence[ModelCard]:
        """The versions that take requests, the newest of a name last."""
        return tuple(pool.card for pool in self._pools if pool.card is not None and not pool.retired)

    def _pool(self, model: str) -> Pool:
        taking = [pool for pool in self._pools if not pool.retired and pool.card is not None]
        for pool in reversed(taking):
            if pool.card is not None and model in (pool.card.name, pool.card.key):
                return pool
        raise unknown_name("model", model, {pool.name for pool in taking})

    # --- pictures

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        """Accept all orders or none. Raises UserError, QueueFull, NotReady or ShuttingDown."""
        if self._draining:
            raise ShuttingDown("the server is shutting down", self.settings.drain_seconds)
        pool = self._pool(model)
        card = pool.card
        assert card is not None
        if pool.given_up:
            raise NotReady(f"{card.key}: no worker stays alive", self.settings.pool.max_backoff)
        costs = [expected_cost(card, order) for order in orders]
        self._bound.check(self._cost_left(), costs)
        tickets: list[Ticket] = []
        for order, cost in zip(orders, costs, strict=True):
            number = next(self._numbers)
            ticket = PictureTicket(number, card, pool.cancel, pool.place_of)
            pool.accept(AcceptedPicture(number, order, ticket, cost, time.monotonic()))
            tickets.append(ticket)
        return tickets

    def _on_end(self, picture: AcceptedPicture, event: Finished | Failed) -> None:
        self._finished += isinstance(event, Finished)

    def _cost_left(self) -> float:
        return sum(pool.cost_left() for pool in self._pools)

    # --- life

    def refuse_new(self) -> None:
        """Take nothing new from now on."""
        self._draining = True

    async def drain(self) -> None:
        """Take nothing new, finish what is there for at most drain_seconds, and end the workers."""
        self.refuse_new()
        waits = asyncio.gather(*(pool.until_empty() for pool in self._pools))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waits, self.settings.drain_seconds)
        await asyncio.gather(*(pool.stop() for pool in self._pools))

    @property
    def ready(self) -> bool:
        """Whether some model has a worker that is up, and new requests are taken."""
        return not self._draining and any(pool.has_worker for pool in self._pools)

    def state(self) -> ServiceState:
        """The service now."""
        pools = self._pools
        workers = [state for pool in pools for state in pool.worker_states()]
        return ServiceState(
            tuple(replace(state, number=i) for i, state in enumerate(workers)),
            self._cost_left(),
            self.settings.cost_limit,
            self._bound.rate.a_second(),
            sum(pool.ticks for pool in pools),
            sum(pool.rows for pool in pools),
            sum(pool.padded_rows for pool in pools),
            self._draining,
            self._finished,
        )
