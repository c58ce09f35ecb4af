"""A shadow version draws what a live one has drawn, from the same seed, and what differs is counted.

It begins after the live picture is done, as a tenant of its own with a small weight, and only where the queue has room
to spare: the live one never waits for it, and never fails with it.
"""

import asyncio
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from PIL import Image, ImageChops

from smalti.serving.messages import Finished, PictureOrder
from smalti.serving.service import PictureService, Ticket

_log = logging.getLogger(__name__)

TENANT = "shadow"
WEIGHT = 0.05


class ShadowLimits(Protocol):
    """How much a shadow may draw; ArmSettings has them."""

    @property
    def shadow_limit(self) -> int:
        """Pictures at once."""
        ...

    @property
    def shadow_room(self) -> float:
        """Share of the queue that must be free."""
        ...


@dataclass(frozen=True)
class ShadowState:
    """compared: pictures drawn by both. mean_difference: of their pixels' values, in 0 .. 255. equal_share: of the
    values that were equal. identical: pictures equal in all. skipped: for want of room. failed: of the shadow's own.
    """

    card: str
    compared: int
    mean_difference: float
    equal_share: float
    identical: int
    skipped: int
    failed: int


@dataclass(frozen=True)
class Difference:
    """Between two pictures of one size. mean: absolute, of the pixels' values in 0 .. 255. equal: share of the values
    that are equal.
    """

    mean: float
    equal: float


def compare_pictures(one: bytes, other: bytes) -> Difference | None:
    """How two picture files differ; None where their sizes do. Their receipts and compression do not count."""
    a, b = (Image.open(io.BytesIO(file)) for file in (one, other))
    if a.size != b.size:
        return None
    mode = a.mode if a.mode == b.mode and a.mode in ("L", "RGB", "RGBA") else "RGB"
    counts = ImageChops.difference(a.convert(mode), b.convert(mode)).histogram()
    values = sum(counts)
    total = sum(count * (i % 256) for i, count in enumerate(counts))
    return Difference(total / values, sum(counts[::256]) / values)


class Shadow:
    """One shadow version."""

    def __init__(self, service: PictureService, card: str, limits: ShadowLimits) -> None:
        self.service, self.card, self.limits = service, card, limits
        self._drawing: dict[asyncio.Task[None], Ticket] = {}
        self._compared = self._identical = self._skipped = self._failed = 0
        self._difference = self._equal = 0.0  # sums over what was compared

    def draw(self, order: PictureOrder, live: bytes) -> None:
        """Draw what a live version has drawn, where there is room. Never raises, never waits."""
        try:
            state = self.service.state()
            if len(self._drawing) >= self.limits.shadow_limit or state.cost_left > state.cost_limit * (
                1 - self.limits.shadow_room
            ):
                self._skipped += 1
                return
            shadow = msgspec.structs.replace(
                order, tenant=TENANT, weight=WEIGHT, partial_images=0, deadline_seconds=None, fault=None
            )
            (ticket,) = self.service.submit(self.card, [shadow])
        except Exception as error:
            _log.debug("shadow %s: %s", self.card, error)
            self._skipped += 1
            return
        task = asyncio.create_task(self._follow(ticket, live))
        self._drawing[task] = ticket
        task.add_done_callback(self._drawing.pop)

    async def _follow(self, ticket: Ticket, live: bytes) -> None:
        try:
            last = None
            async for event in ticket.events():
                last = event
            if isinstance(last, Finished):
                self._add(await asyncio.to_thread(compare_pictures, live, last.image))
            elif getattr(last, "code", "") in ("cancelled", "shutting_down"):
                self._skipped += 1
            else:
                self._failed += 1
        except Exception:
            _log.exception("shadow %s", self.card)
            self._failed += 1

    def _add(self, difference: Difference | None) -> None:
        if difference is None:
            self._failed += 1
            return
        self._compared += 1
        self._difference += difference.mean
        self._equal += difference.equal
        self._identical += difference.equal == 1.0

    def drop_all(self) -> Sequence[Ticket]:
        """Cancel what is being drawn; what that was."""
        tickets = list(self._drawing.values())
        for ticket in tickets:
            ticket.cancel()
        return tickets

    async def settled(self) -> None:
        """Wait for what is being drawn."""
        await asyncio.gather(*self._drawing)

    def state(self) -> ShadowState:
        """What it has found so far."""
        n = max(self._compared, 1)
        return ShadowState(
            self.card,
            self._compared,
            self._difference / n,
            self._equal / n,
            self._identical,
            self._skipped,
            self._failed,
        )
