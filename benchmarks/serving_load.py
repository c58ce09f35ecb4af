"""What asks the servers of serving.py, in a process of its own: HTTP/1.1 over asyncio's streams and nothing beside.

A Load as JSON comes in on stdin, what became of each request goes out on stdout. Neither torch nor smalti is imported:
what this process takes from the two cores, the servers lack, and its processor time is part of the answer.
"""

import asyncio
import json
import resource
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stream:
    """Requests of one kind. bodies: JSON texts, taken in turn and again from the first.

    arrivals: seconds at which they are sent (open loop), what comes when `outstanding` wait being turned away; None
    sends the next when one of `outstanding` has ended (closed loop). pauses: seconds before each, taken in turn.
    begin: seconds before the first. most: requests in all.
    """

    name: str
    bodies: list[str]
    outstanding: int
    arrivals: list[float] | None = None
    pauses: list[float] = field(default_factory=lambda: [0.0])
    begin: float = 0.0
    most: int | None = None


@dataclass(frozen=True)
class Load:
    """What is asked of a server. seconds: after which nothing new is sent. until: or when this stream has ended."""

    host: str
    port: int
    path: str
    seconds: float
    streams: list[Stream]
    until: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request: which of its stream, when it was due and answered (seconds), and the answer's status (0: not sent)."""

    stream: str
    number: int
    due: float
    ended: float
    status: int


class Client:
    """Connections that are kept open and used again."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._address = host, port
        self._head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def ask(self, body: str) -> tuple[int, bytes]:
        """Status and content of the answer. Raises OSError or EOFError where there is none."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(f"{self._head}content-length: {len(body)}\r\n\r\n{body}".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        content = await reader.readexactly(length)
        self._idle.append((reader, writer))
        return int(head.split(" ", 2)[1]), content


async def send(load: Load) -> list[Asked]:
    """All that the load asks, and what became of it."""
    client, began, asked = Client(load.host, load.port, load.path), time.perf_counter(), []
    over = asyncio.Event()

    def now() -> float:
        return time.perf_counter() - began

    async def ask(stream: Stream, number: int, due: float) -> None:
        try:
            status, _ = await client.ask(stream.bodies[number % len(stream.bodies)])
        except (OSError, EOFError):
            status = -1
        asked.append(Asked(stream.name, number, due, now(), status))

    def wanted(stream: Stream, number: int) -> bool:
        return now() < load.seconds and not over.is_set() and (stream.most is None or number < stream.most)

    async def closed(stream: Stream) -> None:
        sent = 0

        async def one_after_another() -> None:
            nonlocal sent
            await asyncio.sleep(stream.begin)
            while wanted(stream, sent):
                number, sent = sent, sent + 1
                await asyncio.sleep(stream.pauses[number % len(stream.pauses)])
                await ask(stream, number, now())

        await asyncio.gather(*(one_after_another() for _ in range(stream.outstanding)))

    async def opened(stream: Stream) -> None:
        waiting: set[asyncio.Task[None]] = set()
        for number, due in enumerate(stream.arrivals or ()):
            await asyncio.sleep(due - now())
            if not wanted(stream, number):
                break
            if len(waiting) >= stream.outstanding:
                asked.append(Asked(stream.name, number, due, due, 0))
                continue
            task = asyncio.create_task(ask(stream, number, due))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)

    async def run(stream: Stream) -> None:
        await (closed(stream) if stream.arrivals is None else opened(stream))
        if stream.name == load.until:
            over.set()

    await asyncio.gather(*map(run, load.streams))
    return asked


def main() -> None:
    """Send the load on stdin."""
    described: dict[str, Any] = json.load(sys.stdin)
    load = Load(**{**described, "streams": [Stream(**stream) for stream in described["streams"]]})
    asked = asyncio.run(send(load))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    json.dump({"asked": [asdict(one) for one in asked], "cpu_seconds": usage.ru_utime + usage.ru_stime}, sys.stdout)


if __name__ == "__main__":
    main()
