"""How much a replica of the API on Ray accepts: a bound on the cost of what is there, and waits where it is reached.

It hears of a picture's cost when that is finished; the supervisor, which hears of each tick, knows more.
"""

import time
from collections import deque
from collections.abc import Sequence

from smalti.errors import UserError
from smalti.serving.service import QueueFull

_RATE_WINDOW = 30.0  # seconds over which throughput is measured


class QueueBound:
    """Counts what is done and says what there is room for. limit: rows x tokens x calls accepted and not done."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.finished = 0  # pictures
        self._done: deque[tuple[float, float]] = deque()  # (when, cost) of what was finished lately

    def check(self, there: float, asked: Sequence[float]) -> None:
        """Raises QueueFull where the costs asked do not fit beside what is there, UserError where they never would."""
        room = self.limit - there
        if sum(asked) <= room:
            return
        if sum(asked) > self.limit:
            raise UserError(
                f"the request costs {sum(asked):.0f} (rows x tokens x calls), the whole queue holds "
                f"{self.limit:.0f}: ask for fewer pictures or steps"
            )
        rate = self.cost_per_second()
        # A guess where nothing was measured.
        raise QueueFull("the queue is full", max(1.0, (sum(asked) - room) / rate) if rate else 1.0)

    def add_finished(self, cost: float) -> None:
        """A picture was finished."""
        self._done.append((time.monotonic(), cost))
        self.finished += 1

    def cost_per_second(self) -> float:
        """What was finished a second, over the last half minute; 0 where nothing was."""
        now = time.monotonic()
        while self._done and now - self._done[0][0] > _RATE_WINDOW:
            self._done.popleft()
        if not self._done:
            return 0.0
        return sum(cost for _, cost in self._done) / max(1.0, now - self._done[0][0])
