"""How much a service accepts: a bound on the cost of what is there, and honest waits where it is reached."""

import math
import time
from collections.abc import Sequence

from smalti.errors import UserError
from smalti.serving.messages import ModelCard, PictureOrder
from smalti.serving.service import QueueFull
from smalti.serving.work_rate import WorkRate


def expected_cost(card: ModelCard, order: PictureOrder) -> float:
    """Rows x tokens x steps of an order, before a worker has counted its network calls."""
    scale = card.guidance_scale if order.guidance_scale is None else order.guidance_scale
    rows = 1 if scale == 1.0 or not math.isfinite(scale) else 2
    steps = card.num_inference_steps if order.num_inference_steps is None else order.num_inference_steps
    return float(rows * card.tokens * max(1, steps))


class QueueBound:
    """Counts what is done and says what there is room for. limit: rows x tokens x calls accepted and not done."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.rate = WorkRate()
        self._promised_until = 0.0  # the moment that the last one refused was told

    def check(self, there: float, asked: Sequence[float]) -> None:
        """Raises QueueFull where the costs asked do not fit beside what is there, UserError where they never would."""
        cost, room = sum(asked), self.limit - there
        if cost <= room:
            return
        if cost > self.limit:
            raise UserError(
                f"the request costs {cost:.0f} (rows x tokens x calls), the whole queue holds {self.limit:.0f}: "
                "ask for fewer pictures or steps"
            )
        raise QueueFull("the queue is full", self._seconds_until_room(cost, cost - room))

    def _seconds_until_room(self, cost: float, missing: float) -> float:
        """When a request of this cost, for which so much room is missing, should come again.

        Those that were told to come again have the first room: each is told a later moment than the one before.
        """
        rate, now = self.rate.a_second(), time.monotonic()
        if not rate:
            return 1.0  # nothing was measured
        self._promised_until = max(now + missing / rate, self._promised_until + cost / rate)
        # Not all come again, and none has to wait longer than a full queue takes.
        self._promised_until = min(self._promised_until, now + self.limit / rate)
        return max(1.0, self._promised_until - now)
