"""A long run under load in which a worker is killed again and again: is anything lost, does anything grow?"""

import asyncio
import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.serving.rehearsal_server import RehearsalServer, rehearsal_server, resident_bytes

_SAMPLE_SECONDS = 1.0


@dataclass
class SoakAccount:
    """What a soak found. rate: requests a second that were offered. resident: (seconds, bytes) of the parent.

    shared_memory: names that were not in /dev/shm before. open_files: of the parent, at the start and at the end.
    """

    seconds: float
    rate: float
    asked: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    kills: int = 0
    resumed: int = 0
    resident: list[tuple[float, int]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)
    open_files: tuple[int, int] = (0, 0)

    @property
    def lost(self) -> int:
        """Requests without an answer, or with another than their picture."""
        return self.asked - self.refused - self.ends["ok"]

    @property
    def growth(self) -> float:
        """Mean memory of the last quarter over that of the second, minus 1."""
        quarters = [[size for at, size in self.resident if i <= 4 * at / self.seconds < i + 1] or [1] for i in range(4)]
        return statistics.mean(quarters[3]) / statistics.mean(quarters[1]) - 1

    @property
    def passed(self) -> bool:
        """Nothing lost, memory flat to 5 %, no shared memory left behind."""
        return self.lost == 0 and self.growth <= 0.05 and not self.shared_memory


async def measured_rate(server: RehearsalServer, seconds: float, steps: tuple[int, int]) -> float:
    """Requests a second that the server draws when it always has enough to do."""
    drawn = 0
    choice = random.Random(1)
    end = time.monotonic() + seconds

    async def client() -> None:
        nonlocal drawn
        while time.monotonic() < end:
            answer = await server.draw(_body(choice, steps))
            drawn += answer.code == "ok"

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(24)))
    return drawn / (time.monotonic() - begun)


def _body(choice: random.Random, steps: tuple[int, int]) -> dict[str, Any]:
    return {
        "prompt": "",
        "class_label": choice.randrange(10),
        "seed": choice.randrange(2**31),
        "num_inference_steps": choice.randint(*steps),
        "guidance_scale": choice.choice([1.0, 1.5, 3.0]),
    }


async def run_soak(
    run: Path,
    seconds: float,
    load: float = 0.8,
    kill_every: float = 20.0,
    workers: int = 2,
    steps: tuple[int, int] = (4, 50),
    told: Callable[[SoakAccount], None] = lambda account: None,
) -> SoakAccount:
    """Offer `load` of what the server can draw, by Poisson's law, and kill a worker every kill_every seconds.

    told hears every ten seconds. Linux alone.
    """
    before = set(_shared_memory())
    async with rehearsal_server(run, workers=workers) as server:
        await server.until_ready(workers)
        rate = load * await measured_rate(server, min(10.0, max(3.0, seconds / 20)), steps)
        account = SoakAccount(seconds, rate)
        files = _open_files(server.process.pid)
        begun = time.monotonic()
        watching = [
            asyncio.ensure_future(_kill(server, account, kill_every)),
            asyncio.ensure_future(_sample(server, account, begun)),
            asyncio.ensure_future(_report(account, told)),
        ]
        asking: set[asyncio.Task[None]] = set()
        choice = random.Random(0)
        while time.monotonic() - begun < seconds:
            await asyncio.sleep(choice.expovariate(rate))
            account.asked += 1
            task = asyncio.ensure_future(_ask(server, account, _body(choice, steps)))
            asking.add(task)
            task.add_done_callback(asking.discard)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*asking)
        account.resumed = int(await server.metric("smalti_pictures_resumed_total"))
        account.open_files = files, _open_files(server.process.pid)
    account.shared_memory = sorted(set(_shared_memory()) - before)
    return account


async def _ask(server: RehearsalServer, account: SoakAccount, body: dict[str, Any]) -> None:
    answer = await server.draw(body)
    if answer.status == 429:
        account.refused += 1
    else:
        account.ends[answer.code] += 1
        account.latencies.append(answer.seconds)


async def _kill(server: RehearsalServer, account: SoakAccount, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        pids = await server.until_ready(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(pids), signal.SIGKILL)
            account.kills += 1


async def _sample(server: RehearsalServer, account: SoakAccount, begun: float) -> None:
    while True:
        account.resident.append((time.monotonic() - begun, resident_bytes(server.process.pid)))
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _report(account: SoakAccount, told: Callable[[SoakAccount], None]) -> None:
    while True:
        await asyncio.sleep(10.0)
        told(account)


def _shared_memory() -> list[str]:
    folder = Path("/dev/shm")
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
