"""A real `smalti serve` process for chaos and soaks, and what its clients see of each picture they ask for."""

import asyncio
import base64
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_STARTS_WITHIN = 120.0


@dataclass
class Answer:
    """What became of one request. code: "ok", an error's code, or "no_answer" where the connection broke."""

    status: int
    code: str
    picture: bytes | None = None
    seconds: float = 0.0
    retry_after: float | None = None


@dataclass
class RehearsalServer:
    """A running server. folder: its own, with its store and log."""

    process: asyncio.subprocess.Process
    url: str
    folder: Path
    client: httpx.AsyncClient

    async def draw(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
        """Ask for one picture and wait for the answer."""
        begun = time.monotonic()
        try:
            response = await self.client.post("/v1/images/generations", json=body, headers=headers)
        except httpx.HTTPError:
            return Answer(0, "no_answer", seconds=time.monotonic() - begun)
        return _answer(response, time.monotonic() - begun)

    async def draw_all(self, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        """All of them at once."""
        return list(await asyncio.gather(*(self.draw(body) for body in bodies)))

    async def state(self) -> dict[str, Any]:
        """GET /v1/state."""
        response = await self.client.get("/v1/state")
        return dict(response.json())

    async def workers(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [w["pid"] for w in (await self.state())["workers"] if w["state"] == "ready"]

    async def until_ready(self, count: int = 1) -> list[int]:
        """Process ids, when so many workers are ready. Raises TimeoutError."""
        async with asyncio.timeout(_STARTS_WITHIN):
            while len(pids := await self.workers()) < count:
                await asyncio.sleep(0.1)
        return pids

    async def until_busy(self) -> None:
        """Wait until pictures are being drawn, some steps in. Raises TimeoutError."""
        begun = (await self.state())["ticks"]
        async with asyncio.timeout(_STARTS_WITHIN):
            while (await self.state())["ticks"] < begun + 12:
                await asyncio.sleep(0.02)

    async def until_holding(self, pictures: int) -> None:
        """Wait until so many pictures are in the workers. Raises TimeoutError."""
        async with asyncio.timeout(_STARTS_WITHIN):
            while sum(w["live"] + w["waiting"] for w in (await self.state())["workers"]) < pictures:
                await asyncio.sleep(0.01)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = (await self.client.get("/metrics")).text
        total = 0.0
        for line in text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    async def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


def _answer(response: httpx.Response, seconds: float) -> Answer:
    try:
        body = response.json()
    except ValueError:
        return Answer(response.status_code, "not_json", seconds=seconds)
    if response.status_code == 200:
        return Answer(200, "ok", base64.b64decode(body["data"][0]["b64_json"]), seconds)
    wait = response.headers.get("retry-after")
    code = str((body.get("error") or {}).get("code"))
    return Answer(response.status_code, code, None, seconds, None if wait is None else float(wait))


def without_receipt(png: bytes) -> bytes:
    """A PNG's bytes but for the receipt, which names the request."""
    place, kept = 8, [png[:8]]
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] != b"iTXt":
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_running(pid: int) -> bool:
    """Whether a process lives (and is no zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@contextlib.asynccontextmanager
async def rehearsal_server(
    run: Path, *arguments: str, workers: int = 2, folder: Path | None = None
) -> AsyncIterator[RehearsalServer]:
    """`smalti serve RUN` on a free port of loopback, as the model "picture", with faults allowed; ended at the end.

    Raises RuntimeError, with the server's words, where it does not start.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smalti-chaos-")))
        log = stack.enter_context(open(folder / "log", "ab"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "smalti", "serve", f"picture={run}", "--port", "0", "--faults", "--no-ui",
            "--workers", str(workers), "--store", str(folder / "jobs.sqlite"), "--hang-seconds", "3", *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
        assert process.stdout is not None
        url = None
        while url is None and (line := await process.stdout.readline()):
            found = re.match(r"serving on (http://[^/]+)/", line.decode())
            url = found[1] if found else None
        if url is None:
            await process.wait()
            raise RuntimeError("the server did not start: " + (folder / "log").read_text()[-2000:])
        reader = asyncio.ensure_future(_drained(process.stdout))  # or it would block when the pipe is full
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits, trust_env=False) as client:
            server = RehearsalServer(process, url, folder, client)
            try:
                yield server
            finally:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(60):
                        await server.stop()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                reader.cancel()


async def _drained(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass
