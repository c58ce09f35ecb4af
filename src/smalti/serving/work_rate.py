"""How much work is done a second, measured over the last half minute."""

import time
from collections import deque
from collections.abc import Callable

_SECONDS = 30


class WorkRate:
    """Adds up work by the second in which it was done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: deque[tuple[int, float]] = deque()  # (second, work)

    def add(self, work: float) -> None:
        """So much was done now."""
        second = int(self._clock())
        if self._done and self._done[-1][0] == second:
            work += self._done.pop()[1]
        self._done.append((second, work))
        self._forget(second)

    def _forget(self, second: int) -> None:
        while self._done and self._done[0][0] <= second - _SECONDS:
            self._done.popleft()

    def a_second(self) -> float:
        """Work a second, of the seconds in which there was some; 0 where there was none lately."""
        self._forget(int(self._clock()))
        return sum(work for _, work in self._done) / max(1, len(self._done))
