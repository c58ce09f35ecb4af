"""What the tests of jobs, webhooks and arms share."""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from server.double_service import DoubleService, card

from smalti.errors import UserError
from smalti.serving.jobs import Jobs, JobSettings, NewJob
from smalti.serving.messages import ModelCard, PictureOrder
from smalti.serving.service import PictureService
from smalti.serving.store import open_store
from smalti.serving.webhooks import Webhooks, WebhookSettings

QUICK = JobSettings(progress_seconds=0.02, sweep_seconds=3600.0, flush_seconds=0.05, close_seconds=1.0)
LOCAL = WebhookSettings(
    hosts=("127.0.0.1",), allow_private=True, timeout_seconds=0.5, base_seconds=0.05, longest_seconds=0.2
)


def new_job(tenant="alice", n=1, seed=0, steps=3, **changes) -> NewJob:
    """A job of n pictures."""
    order = dict(changes.pop("order", {}))
    orders = [
        PictureOrder(seed=seed + i, class_label=1, num_inference_steps=steps, tenant=tenant, index=i, **order)
        for i in range(n)
    ]
    request = {"n": n, "seed": seed, "num_inference_steps": steps}
    return NewJob(**(dict(tenant=tenant, model="digits", orders=orders, request=request) | changes))


@contextlib.asynccontextmanager
async def running_jobs(
    where: Path | str,
    service: PictureService | None = None,
    settings: JobSettings = QUICK,
    webhook_settings: WebhookSettings = LOCAL,
) -> AsyncIterator[Jobs]:
    """Jobs over a store, from a server's start to its orderly end."""
    store = open_store(where)
    jobs = Jobs(service or DoubleService(), store, Webhooks(store, webhook_settings), settings)
    try:
        await jobs.start()
        yield jobs
    finally:
        await jobs.close()
        await store.close()


async def ended(jobs: Jobs, id: str, tenant: str = "alice"):
    """The job when it has reached its terminal state, and its events."""
    events = [event async for event in jobs.events(tenant, id)]
    return await jobs.get(tenant, id), events


async def until(condition, seconds: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class VersionedDouble(DoubleService):
    """A double whose versions come and go: a run's folder name is its version, and "broken" cannot be loaded."""

    def __init__(self, *cards: ModelCard, load_seconds: float = 0.01, **rest) -> None:
        super().__init__(*cards, **rest)
        self.load_seconds = load_seconds
        self.loading = self.most_loading = 0
        self.retired: list[str] = []
        self.failing: dict[str, float] = {}  # share of a card's pictures that fail

    async def add_version(self, name: str, run: Path) -> ModelCard:
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        await asyncio.sleep(self.load_seconds)
        self.loading -= 1
        if run.name == "broken":
            raise UserError(f"run {run.name}: weights do not match their checksum")
        made = card(name, run.name)
        if made.key in [c.key for c in self._cards]:
            raise UserError(f"{made.key} is served already")
        self._cards.append(made)
        return made

    async def retire_version(self, key: str) -> None:
        self._cards = [c for c in self._cards if c.key != key]
        while any(ticket.card.key == key for ticket in self.live.values()):
            await asyncio.sleep(0.002)
        self.retired.append(key)

    def submit(self, model: str, orders: Sequence[PictureOrder]):
        orders = [self._faulty(model, order) for order in orders]
        return super().submit(model, orders)

    def _faulty(self, model: str, order: PictureOrder) -> PictureOrder:
        share = self.failing.get(model, 0.0)
        fails = zlib.crc32(f"{model} {order.seed}".encode()) / 2**32 < share
        return (
            order
            if not fails
            else PictureOrder(**{f: getattr(order, f) for f in order.__struct_fields__ if f != "fault"}, fault="error")
        )
