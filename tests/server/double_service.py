"""A PictureService without networks: it draws a small PNG from the order's seed, in asyncio tasks."""

import asyncio
import io
import zlib
from collections.abc import AsyncIterator, Sequence
from itertools import count

from PIL import Image

from smalti.errors import UserError, unknown_name
from smalti.serving.messages import Admitted, Failed, Finished, ModelCard, PictureEvent, PictureOrder, Preview
from smalti.serving.service import TERMINAL, QueueFull, ServiceState, ShuttingDown, WorkerState


def card(name: str = "digits", version: str = "0123456789ab", **changes) -> ModelCard:
    """The card of a small class-conditional model."""
    facts = dict(
        created=1_700_000_000,
        architecture="dit",
        image_size=(28, 28),
        channels=1,
        num_classes=10,
        reads_prompts=False,
        takes_pictures=True,
        takes_sizes=False,
        solvers=("ddim", "dpmpp_2m"),
        solver="dpmpp_2m",
        num_inference_steps=20,
        guidance_scale=1.5,
        tokens=49,
        trajectory_bytes=4 * 28 * 28 * 4,
        parameters=3_000_000,
    )
    return ModelCard(name=name, version=version, **(facts | changes))


def picture(order: PictureOrder, version: str, noise: int = 0) -> bytes:
    """A PNG that depends on what is drawn, and on nothing else."""
    grey = zlib.crc32(f"{order.seed} {order.class_label} {order.prompt} {version}".encode()) % 256
    file = io.BytesIO()
    Image.new("L", (28, 28), (grey + noise) % 256).save(file, order.output_format)
    return file.getvalue()


class DoubleTicket:
    """One picture of the double."""

    def __init__(self, number: int, card: ModelCard) -> None:
        self.number, self.card = number, card
        self.happened: list[PictureEvent] = []
        self.news = asyncio.Event()
        self.cancelled = False

    def add(self, event: PictureEvent) -> None:
        if not self.ended:
            self.happened.append(event)
            self.news.set()

    @property
    def ended(self) -> bool:
        return bool(self.happened) and isinstance(self.happened[-1], TERMINAL)

    async def events(self) -> AsyncIterator[PictureEvent]:
        told = 0
        while True:
            while told < len(self.happened):
                event = self.happened[told]
                told += 1
                yield event
                if isinstance(event, TERMINAL):
                    return
            self.news.clear()
            await self.news.wait()

    def cancel(self) -> None:
        self.cancelled = True
        self.add(Failed(self.number, "cancelled", "cancelled"))

    @property
    def place(self) -> int | None:
        return None if self.ended else 0


class DoubleService:
    """Draws with `step_seconds` a network call, at most `room` pictures at once."""

    def __init__(self, *cards: ModelCard, step_seconds: float = 0.001, room: int = 64) -> None:
        self._cards = list(cards) or [card()]
        self.step_seconds, self.room = step_seconds, room
        self.live: dict[int, DoubleTicket] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.orders: list[tuple[str, PictureOrder]] = []  # all that were accepted, with the card's key
        self.draining = False
        self.numbers = count(1)

    def cards(self) -> Sequence[ModelCard]:
        return tuple(self._cards)

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[DoubleTicket]:
        if self.draining:
            raise ShuttingDown("the server is shutting down", 5.0)
        found = next((c for c in self._cards if model in (c.name, c.key)), None)
        if found is None:
            raise unknown_name("model", model, [c.name for c in self._cards])
        for order in orders:
            if order.class_label is not None and not 0 <= order.class_label < found.num_classes:
                raise UserError(f"class_label={order.class_label} must lie in 0 .. {found.num_classes - 1}")
        if len(self.live) + len(orders) > self.room:
            raise QueueFull("the queue is full", 1.5)
        tickets = []
        for order in orders:
            ticket = DoubleTicket(next(self.numbers), found)
            self.live[ticket.number] = ticket
            self.orders.append((found.key, order))
            task = asyncio.get_running_loop().create_task(self._draw(ticket, order))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            tickets.append(ticket)
        return tickets

    async def _draw(self, ticket: DoubleTicket, order: PictureOrder) -> None:
        try:
            steps = order.num_inference_steps or ticket.card.num_inference_steps
            if order.solver not in (None, *ticket.card.solvers):
                ticket.add(Failed(ticket.number, "invalid_request", f"unknown solver {order.solver!r}", "solver"))
                return
            ticket.add(Admitted(ticket.number, 49.0 * steps, steps))
            shown = [round((i + 1) * steps / (order.partial_images + 1)) for i in range(order.partial_images)]
            for step in range(steps):
                if step in shown:
                    image = picture(order, ticket.card.version, noise=steps - step)
                    ticket.add(Preview(ticket.number, shown.index(step), step, steps, image))
                await asyncio.sleep(self.step_seconds)
                if ticket.cancelled:
                    return
            if order.fault is not None:
                code = {"nan": "not_finite", "out_of_memory": "out_of_memory"}.get(order.fault, "internal_error")
                ticket.add(Failed(ticket.number, code, f"fault {order.fault}"))
                return
            image = picture(order, ticket.card.version)
            ticket.add(Finished(ticket.number, image, 28, 28, steps, 49.0 * steps, 0, 0.0, steps * self.step_seconds))
        finally:
            self.live.pop(ticket.number, None)

    def state(self) -> ServiceState:
        worker = WorkerState(0, self._cards[0].key, "ready", 1, 0, 0.1, self.step_seconds, len(self.live), 0, 4)
        return ServiceState((worker,), 49.0 * len(self.live), 49.0 * self.room, 1000.0, 10, 20, 24, self.draining)
