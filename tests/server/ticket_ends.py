"""How pictures end: the last event of a ticket, with what every ticket promises checked on the way."""

import asyncio

from smalti.serving.messages import Admitted, Preview
from smalti.serving.service import TERMINAL


async def end_of(ticket):
    events = [event async for event in ticket.events()]
    assert [isinstance(event, TERMINAL) for event in events] == [False] * (len(events) - 1) + [True]
    assert sum(isinstance(event, Admitted) for event in events) <= 1
    previews = [event.index for event in events if isinstance(event, Preview)]
    assert previews == sorted(set(previews))
    return events[-1]


async def ends_of(tickets):
    return await asyncio.gather(*map(end_of, tickets))
