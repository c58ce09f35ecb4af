"""Which pictures share the next forward: fair to tenants, quick for short requests, and nobody waits for ever.

A picture that is paused costs its latents and nothing else, so the choice is made anew at every step:

1. Aged pictures (no step for aged_seconds) and those that would miss their deadline go first, oldest first.
2. Express: while a picture of few network calls is there, a tick holds such pictures alone, so that it is as short as
   on an idle server. Ticks like that may run ahead of the others by express_seconds at most; then a full tick is due.
3. Otherwise tenants by virtual time (work received over weight, start-time fair queueing: Goyal et al. 1996), and
   within a tenant the oldest picture.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Candidate:
    """A picture that could take part in a tick; the engine keeps calls_left and last_step up to date.

    key: equal for pictures that can share a forward. rows: of a forward that it takes. step_cost: rows x tokens.
    weight: its tenant's share. calls: of its whole plan. arrived, last_step, deadline: moments on the engine's clock;
    last_step is arrived before the first.
    """

    number: int
    tenant: str
    key: object
    rows: int
    step_cost: float
    weight: float
    calls: int
    calls_left: int
    arrived: float
    last_step: float
    deadline: float | None = None


@dataclass(frozen=True)
class SchedulingSettings:
    """max_rows: of a forward. express_calls: plans of at most so many network calls are express."""

    max_rows: int = 32
    express_calls: int = 8
    express_seconds: float = 1.0
    aged_seconds: float = 10.0


@dataclass
class FairClock:
    """Virtual time: how much each tenant has received over its weight, and where the server as a whole stands."""

    now: float = 0.0
    tenants: dict[str, float] = field(default_factory=dict)

    def arrive(self, tenant: str) -> None:
        """A tenant that had nothing here begins where the server stands: having been away earns no credit."""
        self.tenants[tenant] = max(self.tenants.get(tenant, 0.0), self.now)

    def charge(self, tenant: str, cost: float, weight: float) -> None:
        """A tenant received `cost`."""
        self.tenants[tenant] += cost / weight

    def settle(self, present: Iterable[str]) -> None:
        """Move on to the least served of the tenants that are present, and forget those that are not and are behind."""
        present = set(present)
        if present:
            self.now = max(self.now, min(self.tenants[tenant] for tenant in present))
        self.tenants = {name: time for name, time in self.tenants.items() if name in present or time > self.now}


@dataclass(frozen=True)
class Choice:
    """The pictures of a tick, in order, and whether it is an express one."""

    numbers: tuple[int, ...]
    express: bool = False


def choose(
    candidates: Sequence[Candidate],
    clock: FairClock,
    settings: SchedulingSettings,
    now: float,
    step_seconds: float,
    express_lead: float,
) -> Choice:
    """The pictures of the next tick, all of one key and of at most max_rows rows together; the first always fits.

    step_seconds: mean time of a tick. express_lead: seconds that express ticks are ahead of full ones.
    """
    urgent = sorted(
        (c for c in candidates if _is_urgent(c, settings, now, step_seconds)), key=lambda c: (c.last_step, c.number)
    )
    short = [c for c in candidates if c.calls <= settings.express_calls]
    express = 0 < len(short) < len(candidates) and not urgent and express_lead < settings.express_seconds
    chosen: list[Candidate] = []
    rows = 0
    for c in itertools.chain(urgent, _in_fair_order(short if express else candidates, clock)):
        fits = not chosen or (c.key == chosen[0].key and rows + c.rows <= settings.max_rows)
        if fits and c not in chosen:
            chosen.append(c)
            rows += c.rows
        if rows >= settings.max_rows:
            break
    return Choice(tuple(c.number for c in chosen), express)


def _in_fair_order(candidates: Sequence[Candidate], clock: FairClock) -> Iterator[Candidate]:
    """Tenants by virtual time, each charged for what is given of it; a tenant's pictures by age."""
    received = dict(clock.tenants)
    queues: dict[str, deque[Candidate]] = {}
    for c in sorted(candidates, key=lambda c: (c.arrived, c.number)):
        queues.setdefault(c.tenant, deque()).append(c)
    while queues:
        tenant = min(queues, key=lambda name: (received[name], queues[name][0].arrived, name))
        c = queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]
        received[tenant] += c.step_cost / c.weight
        yield c


def _is_urgent(c: Candidate, settings: SchedulingSettings, now: float, step_seconds: float) -> bool:
    if now - c.last_step >= settings.aged_seconds:
        return True
    # Half as much again as it would take in every tick from here.
    return c.deadline is not None and c.deadline - now < 1.5 * c.calls_left * step_seconds
