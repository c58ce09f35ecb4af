"""Arms: which version of a model draws a request. Weighted and sticky for A/B tests, swapped with no request lost.

A model's name stands for weighted arms, each a version as name@version; a request that names a version itself passes
by. An arm that fails more often than the control does is taken out by itself. A shadow version draws what the live one
drew, when there is room, and what differs is told.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from smalti.errors import UserError, unknown_name
from smalti.serving.messages import Failed, Finished, ModelCard, PictureEvent, PictureOrder
from smalti.serving.service import NotReady, QueueFull, ServiceState, Ticket, VersionedService
from smalti.serving.shadow import Shadow, ShadowState

_log = logging.getLogger(__name__)

# Whose fault these are: the caller's, or the server's that ends.
_NOT_THE_MODELS_FAULT = ("invalid_request", "cancelled", "shutting_down")
_KEPT_EVENTS = 200
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class ArmSettings:
    """window: outcomes of an arm that count. min_outcomes: below which nothing is concluded. max_excess: by how much an
    arm's share of failures may exceed the control's before it is rolled back. shadow_limit: pictures of a model that
    its shadow draws at once. shadow_room: share of the queue that must be free for the shadow to draw.
    """

    window: int = 200
    min_outcomes: int = 50
    max_excess: float = 0.1
    shadow_limit: int = 4
    shadow_room: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_outcomes <= self.window:
            raise UserError(f"min_outcomes={self.min_outcomes} must lie in 1 .. window={self.window}")
        if not 0 < self.max_excess < 1:
            raise UserError(f"max_excess={self.max_excess} must lie in (0, 1)")
        if self.shadow_limit < 1 or not 0 <= self.shadow_room <= 1:
            raise UserError("shadow_limit must be at least 1 and shadow_room lie in [0, 1]")


@dataclass(frozen=True)
class ArmState:
    """An arm: pictures it was given, and of its latest outcomes how many were failures of its own."""

    card: str
    weight: float
    accepted: int
    outcomes: int
    failures: int


@dataclass(frozen=True)
class ArmEvent:
    """Something that changed by itself or by an administrator's hand. time: Unix seconds."""

    time: float
    kind: str
    message: str


@dataclass(frozen=True)
class ArmSetState:
    """A public name. id: of the experiment, from which keys are spread anew. control: the card others are held to."""

    name: str
    id: str
    control: str
    arms: tuple[ArmState, ...]
    shadow: ShadowState | None
    retiring: tuple[str, ...]
    events: tuple[ArmEvent, ...]


@dataclass
class _Arm:
    card: str
    weight: float
    accepted: int = 0
    outcomes: deque[bool] = field(default_factory=deque)  # True: failed


@dataclass
class _ArmSet:
    name: str
    id: str
    arms: list[_Arm]  # the control first
    shadow: Shadow | None = None
    retiring: list[str] = field(default_factory=list)
    events: deque[ArmEvent] = field(default_factory=lambda: deque(maxlen=_KEPT_EVENTS))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    asked: int = 0  # requests of nobody's

    def next_point(self) -> float:
        """The next of a sequence that fills [0, 1) evenly from its beginning on."""
        self.asked += 1
        return self.asked * _GOLDEN % 1.0

    @property
    def control(self) -> _Arm:
        return self.arms[0]

    def arm(self, card: str) -> _Arm | None:
        return next((arm for arm in self.arms if arm.card == card), None)

    def note(self, kind: str, message: str) -> None:
        self.events.append(ArmEvent(time.time(), kind, message))
        _log.info("%s: %s: %s", self.name, kind, message)


def sticky_point(arm_set: str, key: str) -> float:
    """Where in [0, 1) a key lies for an experiment: the same for good, and evenly spread over keys."""
    found = hashlib.sha256(f"{arm_set}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(found[:6], "big") / 2**48


def experiment_id(name: str, cards: Iterable[str]) -> str:
    """Names an experiment by what it compares, so that a server which starts anew spreads keys as the last one did."""
    return hashlib.sha256("\0".join([name, *sorted(cards)]).encode()).hexdigest()[:12]


def choose_arm(weights: Sequence[float], point: float) -> int:
    """The arm in whose stretch of [0, 1) a point lies; stretches are as long as weights, the control's first.

    An arm of weight 0 has none: the points of the others move only as far as their bounds do.
    """
    total, bound = sum(weights), 0.0
    assert total > 0, weights
    for i, weight in enumerate(weights):
        bound += weight / total
        if point < bound:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)  # the sum of the stretches was rounded below 1


def is_worse(arm: Collection[bool], control: Collection[bool], max_excess: float) -> bool:
    """Whether an arm's share of failures exceeds the control's by more than max_excess and by more than chance.

    Outcomes are looked at after each picture, so chance has many tries: four deviations of the pooled share. Two equal
    arms that fail at 20 % are told apart wrongly in under 1 of 100 experiments of 1,000 pictures; by three, in 7.
    """
    excess = _share(arm) - _share(control)
    count = len(arm) + len(control)
    pooled = (sum(arm) + sum(control)) / count
    variance = pooled * (1 - pooled) * (1 / len(arm) + (1 / len(control) if control else 0.0))
    return excess > max_excess and excess > 4.0 * math.sqrt(variance)


def _share(outcomes: Collection[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else 0.0


class Arms:
    """A VersionedService on top of another, in which a model's name stands for arms. Lives on one event loop."""

    def __init__(self, service: VersionedService, settings: ArmSettings | None = None) -> None:
        self.service, self.settings = service, settings or ArmSettings()
        self._sets: dict[str, _ArmSet] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the service

    def cards(self) -> Sequence[ModelCard]:
        """The versions that take requests; of each name its control first."""
        cards = self.service.cards()
        by_key = {card.key: card for card in cards}
        found: dict[str, ModelCard] = {}
        for name in dict.fromkeys(card.name for card in cards):
            arm_set = self._set(name)
            if arm_set is not None and arm_set.control.card in by_key:
                control = by_key[arm_set.control.card]
                found.setdefault(control.key, control)
        return tuple((found | by_key).values())

    def state(self) -> ServiceState:
        """As the service's."""
        return self.service.state()

    def submit(self, model: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        """Accept all orders or none, all for one arm. model: a card's key, which decides for itself; or a name, whose
        arm the user decides, else the tenant. Requests of neither are spread in turn, as evenly as weights allow.
        """
        user = orders[0].user if orders else ""
        if user:
            orders = [msgspec.structs.replace(order, user="") for order in orders]  # not for workers and receipts
        arm_set = self._set(model)
        if arm_set is None:
            name = model.partition("@")[0]
            arm_set, card = self._sets.get(name), model
        else:
            key = user or (orders[0].tenant if orders else "")
            point = sticky_point(arm_set.id, key) if key else arm_set.next_point()
            card = arm_set.arms[choose_arm([arm.weight for arm in arm_set.arms], point)].card
        arm = None if arm_set is None else arm_set.arm(card)
        try:
            tickets = self._submit(card, orders)
        except NotReady:
            if arm_set is not None and arm is not None:
                self._count(arm_set, arm, failed=True)
            raise
        if arm_set is None or arm is None:
            return tickets
        arm.accepted += len(tickets)
        shadow = arm_set.shadow if arm_set.shadow is not None and arm_set.shadow.card != card else None
        return [
            _ArmTicket(ticket, self, arm_set, arm, order, shadow) for ticket, order in zip(tickets, orders, strict=True)
        ]

    def _submit(self, card: str, orders: Sequence[PictureOrder]) -> list[Ticket]:
        try:
            return list(self.service.submit(card, orders))
        except QueueFull:
            # Shadows give way: their place in the queue is taken only where nobody else wants it.
            if not any([arm_set.shadow.drop_all() for arm_set in self._sets.values() if arm_set.shadow is not None]):
                raise
        return list(self.service.submit(card, orders))

    def _set(self, name: str) -> _ArmSet | None:
        """A name's arms; those of a name that has none yet are its newest version alone."""
        if name not in self._sets:
            newest = [card for card in self.service.cards() if card.name == name]
            if not newest:
                return None
            card = newest[-1].key
            self._sets[name] = _ArmSet(name, experiment_id(name, [card]), [self._arm(card, 1.0)])
        return self._sets[name]

    def _arm(self, card: str, weight: float) -> _Arm:
        return _Arm(card, weight, outcomes=deque(maxlen=self.settings.window))

    # --- outcomes

    def _ended(self, arm_set: _ArmSet, arm: _Arm, event: Finished | Failed) -> None:
        """A picture of an arm has ended."""
        if isinstance(event, Finished) or event.code not in _NOT_THE_MODELS_FAULT:
            self._count(arm_set, arm, failed=isinstance(event, Failed))

    def _count(self, arm_set: _ArmSet, arm: _Arm, *, failed: bool) -> None:
        arm.outcomes.append(failed)
        control, enough = arm_set.control, self.settings.min_outcomes
        if arm is control or not arm.weight or arm not in arm_set.arms or len(arm.outcomes) < enough:
            return
        # A control that draws next to nothing says nothing either: what ails the whole server is no arm's fault.
        if control.weight and len(control.outcomes) < enough:
            return
        if is_worse(arm.outcomes, control.outcomes, self.settings.max_excess):
            arm.weight = 0.0
            if not any(other.weight for other in arm_set.arms):
                control.weight = 1.0
            arm_set.note(
                "rolled_back",
                f"{arm.card} failed {_share(arm.outcomes):.1%} of its last {len(arm.outcomes)} pictures, the control "
                f"{control.card} {_share(control.outcomes):.1%} of {len(control.outcomes)}: it gets no more requests",
            )

    # --- what an administrator asks

    def set_arms(self, name: str, weights: Mapping[str, float], shadow: str | None = None) -> None:
        """Give a name its arms, the control first, and a shadow. New arms begin a new experiment: keys are spread anew;
        other weights for the same arms move as few keys as they can. Raises UserError.
        """
        arm_set, served = self._known(name), [card.key for card in self.service.cards()]
        for card in [*weights, *([] if shadow is None else [shadow])]:
            if card not in served:
                raise unknown_name("version", card, served)
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()) > 0:
            raise UserError(f"weights={dict(weights)} must be numbers of at least 0, one of them above")
        if {arm.card for arm in arm_set.arms} != set(weights):
            arm_set.id = experiment_id(name, weights)
        arms = [replace(arm_set.arm(card) or self._arm(card, 0.0), weight=weight) for card, weight in weights.items()]
        arm_set.arms = arms
        if (None if arm_set.shadow is None else arm_set.shadow.card) != shadow:
            if arm_set.shadow is not None:
                arm_set.shadow.drop_all()
            arm_set.shadow = None if shadow is None else Shadow(self.service, shadow, self.settings)
        told = ", ".join(f"{arm.card} {arm.weight:g}" for arm in arms)
        arm_set.note("set", told + (f"; shadow {shadow}" if shadow else ""))

    async def add_version(self, name: str, run: Path) -> ModelCard:
        """Load a run beside what a name serves; it gets no requests before set_arms. Raises UserError."""
        self._set(name)  # what the name means now, so that the new one does not take its place
        card = await self.service.add_version(name, run)
        arm_set = self._set(name)
        assert arm_set is not None
        arm_set.note("added", card.key)
        return card

    async def swap(self, name: str, run: Path) -> ModelCard:
        """Load a run, give it the requests of a name's control, and let the old one finish what it has in hand.

        Returns when new requests go to the new one. Raises UserError where the run cannot be served: nothing changed.
        """
        arm_set = self._known(name)
        async with arm_set.lock:
            card = await self.service.add_version(name, run)
            old = arm_set.control.card
            if card.key != old:
                arm_set.arms[0] = self._arm(card.key, arm_set.control.weight)
                arm_set.note("swapped", f"{old} for {card.key}")
                arm_set.retiring.append(old)
                task = asyncio.create_task(self._retire(arm_set, old))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return card

    async def retire_version(self, key: str) -> None:
        """Unload a version that gets no requests. Raises UserError for one that does."""
        for arm_set in self._sets.values():
            if any(arm.card == key and (arm.weight or arm is arm_set.control) for arm in arm_set.arms):
                raise UserError(f"version {key!r} is an arm of {arm_set.name}: give its requests to another first")
        served = [card.key for card in self.service.cards()]
        if key not in served:
            raise unknown_name("version", key, served)
        for arm_set in self._sets.values():
            arm_set.arms = [arm for arm in arm_set.arms if arm.card != key]
            if arm_set.shadow is not None and arm_set.shadow.card == key:
                arm_set.shadow.drop_all()
                arm_set.shadow = None
        await self.service.retire_version(key)

    async def _retire(self, arm_set: _ArmSet, key: str) -> None:
        try:
            await self.service.retire_version(key)
            arm_set.note("retired", key)
        except Exception as error:
            _log.exception("retiring %s", key)
            arm_set.note("not_retired", f"{key}: {error}")
        finally:
            arm_set.retiring.remove(key)

    async def settled(self) -> None:
        """Wait until swapped versions are gone and shadows have drawn what they had taken."""
        shadows = [arm_set.shadow.settled() for arm_set in self._sets.values() if arm_set.shadow is not None]
        await asyncio.gather(*self._tasks, *shadows)

    async def close(self) -> None:
        """Drop shadows; stop waiting for versions that retire."""
        for arm_set in self._sets.values():
            if arm_set.shadow is not None:
                arm_set.shadow.drop_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _known(self, name: str) -> _ArmSet:
        arm_set = self._set(name)
        if arm_set is None:
            raise unknown_name("model", name, {card.name for card in self.service.cards()})
        return arm_set

    def arms_state(self) -> list[ArmSetState]:
        """Every name's arms now."""
        for card in self.service.cards():
            self._set(card.name)
        return [
            ArmSetState(
                arm_set.name,
                arm_set.id,
                arm_set.control.card,
                tuple(
                    ArmState(arm.card, arm.weight, arm.accepted, len(arm.outcomes), sum(arm.outcomes))
                    for arm in arm_set.arms
                ),
                None if arm_set.shadow is None else arm_set.shadow.state(),
                tuple(arm_set.retiring),
                tuple(arm_set.events),
            )
            for arm_set in self._sets.values()
        ]


class _ArmTicket:
    """A ticket whose end counts for its arm, and whose picture the shadow draws too."""

    def __init__(
        self, ticket: Ticket, arms: Arms, arm_set: _ArmSet, arm: _Arm, order: PictureOrder, shadow: Shadow | None
    ) -> None:
        self.number, self.card = ticket.number, ticket.card
        self._ticket, self._arms, self._arm_set, self._arm = ticket, arms, arm_set, arm
        self._order, self._shadow = order, shadow

    async def events(self) -> AsyncIterator[PictureEvent]:
        """As the ticket's."""
        async for event in self._ticket.events():
            if isinstance(event, Finished | Failed):
                self._arms._ended(self._arm_set, self._arm, event)
                if isinstance(event, Finished) and self._shadow is not None:
                    self._shadow.draw(self._order, event.image)
            yield event

    def cancel(self) -> None:
        """As the ticket's."""
        self._ticket.cancel()

    @property
    def place(self) -> int | None:
        """As the ticket's."""
        return self._ticket.place
