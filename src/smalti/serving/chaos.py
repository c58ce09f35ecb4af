"""What becomes of accepted requests when things go wrong: real servers, real kills, each scenario with its account.

A scenario passes when none of its accepted requests was lost (each got exactly one answer), none was answered twice,
and the ones that had nothing to do with the fault got the picture that an undisturbed server draws.
"""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smalti.serving.rehearsal_server import Answer, RehearsalServer, is_running, rehearsal_server, without_receipt


@dataclass
class Account:
    """What happened in a scenario. ends: outcome -> requests; checks: what was to hold, and whether it did."""

    scenario: str
    accepted: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Accepted requests that reached no end."""
        return self.accepted - sum(self.ends.values())

    @property
    def passed(self) -> bool:
        """Whether everything held and nothing was lost."""
        return self.lost == 0 and all(self.checks.values())

    def take(self, answers: Sequence[Answer]) -> None:
        """Count answers of requests; those that were refused were not accepted."""
        refused = ("shutting_down", "not_ready", "unavailable")
        accepted = [a for a in answers if a.status not in (400, 413, 429) and a.code not in refused]
        self.accepted += len(accepted)
        self.ends.update(a.code for a in accepted if a.code != "no_answer")


@dataclass
class Stage:
    """A server that several scenarios share, and the pictures that it draws undisturbed."""

    server: RehearsalServer
    bodies: list[dict[str, Any]]
    undisturbed: list[bytes]

    def right(self, answers: Sequence[Answer]) -> bool:
        """Whether these answers to `bodies`, in order, are the undisturbed pictures."""
        pictures = [None if a.picture is None else without_receipt(a.picture) for a in answers]
        return pictures == self.undisturbed


Scenario = Callable[[Stage], Awaitable[Account]]


def _body(seed: int, steps: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "", "class_label": seed % 10, "seed": seed, "num_inference_steps": steps, **more}


async def _disturbed(stage: Stage, name: str, disturb: Callable[[], Awaitable[None]]) -> tuple[Account, list[Answer]]:
    """All of the stage's requests, disturbed while they are drawn."""
    account = Account(name)
    await stage.server.until_ready(2)
    drawing = asyncio.ensure_future(stage.server.draw_all(stage.bodies))
    await stage.server.until_busy()
    await disturb()
    answers = await drawing
    account.take(answers)
    account.checks["each picture is the undisturbed one, to the byte"] = stage.right(answers)
    return account, answers


async def killed_worker(stage: Stage) -> Account:
    """kill -9 of a worker in the middle of its steps."""
    before = await stage.server.metric("smalti_pictures_resumed_total")

    async def kill() -> None:
        os.kill((await stage.server.workers())[0], signal.SIGKILL)

    account, _ = await _disturbed(stage, "killed worker", kill)
    resumed = await stage.server.metric("smalti_pictures_resumed_total") - before
    account.checks["pictures went on from their checkpoints"] = resumed > 0
    account.notes.append(f"{resumed:.0f} resumed")
    return account


async def hung_worker(stage: Stage) -> Account:
    """A worker that stops (SIGSTOP) and never ticks again."""

    async def stop() -> None:
        os.kill((await stage.server.workers())[0], signal.SIGSTOP)

    account, answers = await _disturbed(stage, "hung worker", stop)
    account.notes.append(f"slowest answer after {max(a.seconds for a in answers):.1f} s (limit 3 s, then a restart)")
    return account


async def restart_storm(stage: Stage) -> Account:
    """Workers that are killed again and again, five times each."""

    async def storm() -> None:
        for _ in range(5):
            for pid in await stage.server.until_ready(1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.3)

    account, _ = await _disturbed(stage, "restart storm", storm)
    return account


async def _with_fault(stage: Stage, name: str, fault: str, code: str) -> Account:
    """The stage's requests with one among them that misbehaves."""
    account = Account(name)
    await stage.server.until_ready(2)
    drawing = asyncio.ensure_future(stage.server.draw_all(stage.bodies))
    await asyncio.sleep(0.02)
    bad = await stage.server.draw(_body(999, 30), {"x-smalti-fault": fault})
    answers = await drawing
    account.take([*answers, bad])
    account.checks[f"the bad one ends with {code}"] = bad.code == code
    account.checks["each other picture is the undisturbed one, to the byte"] = stage.right(answers)
    account.notes.append(f"the bad one was answered after {bad.seconds:.1f} s")
    return account


async def poison_request(stage: Stage) -> Account:
    """A request whose forward kills the process."""
    return await _with_fault(stage, "poison request", "abort", "quarantined")


async def out_of_memory(stage: Stage) -> Account:
    """A request for which there is no memory."""
    return await _with_fault(stage, "out of memory", "out_of_memory", "out_of_memory")


async def nan_row(stage: Stage) -> Account:
    """A picture whose values become NaN."""
    return await _with_fault(stage, "NaN row", "nan", "not_finite")


async def failing_forward(stage: Stage) -> Account:
    """A request with which a forward raises."""
    return await _with_fault(stage, "failing forward", "error", "internal_error")


async def slow_client(stage: Stage) -> Account:
    """Clients that ask for streams and do not read them."""
    account = Account("slow client")
    connections = [await _raw(stage.server, _body(i, 60, stream=True, partial_images=3)) for i in range(8)]
    answers = await stage.server.draw_all(stage.bodies)
    account.take(answers)
    account.checks["the others got the undisturbed pictures"] = stage.right(answers)
    for connection in connections:
        connection.close()
    return account


async def disconnect(stage: Stage) -> Account:
    """Clients that close their connections while they wait."""
    account = Account("disconnect")
    before = await stage.server.metric("smalti_pictures_total", code="cancelled")
    connections = [await _raw(stage.server, _body(i, 1000)) for i in range(8)]
    await stage.server.until_busy()
    for connection in connections:
        connection.close()
    async with asyncio.timeout(20):
        while await stage.server.metric("smalti_pictures_total", code="cancelled") < before + 8:
            await asyncio.sleep(0.05)
    state = await stage.server.state()
    account.accepted = 8
    account.ends["cancelled"] = 8
    account.checks["nothing of them is left in the queue"] = state["cost_left"] == 0
    return account


async def _raw(server: RehearsalServer, body: dict[str, Any]) -> socket.socket:
    """A request sent over a connection of its own, from which nothing is read."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    await asyncio.to_thread(connection.sendall, head.encode() + content)
    return connection


async def full_queue(stage: Stage) -> Account:
    """More work than the bounded queue takes."""
    account = Account("full queue")
    answers = await stage.server.draw_all([_body(i, 400) for i in range(150)])
    account.take(answers)
    refused = [a for a in answers if a.status == 429]
    account.checks["some were refused with 429"] = 0 < len(refused) < len(answers)
    account.checks["each refusal says when to come back"] = all(a.retry_after is not None for a in refused)
    account.checks["each accepted one was drawn"] = account.ends == Counter(ok=len(answers) - len(refused))
    waits = sorted(a.retry_after or 0.0 for a in refused)
    longest = max(a.seconds for a in answers if a.status == 200)
    if waits:
        told = f"told to wait {waits[0]:.0f} .. {waits[-1]:.0f} s"
        account.notes.append(f"{len(refused)} refused, {told}; the queue was empty after {longest:.1f} s")
    return account


async def bad_requests(stage: Stage) -> Account:
    """Bad JSON, a million pictures, a body of 100 MB, a path for a model."""
    account = Account("bad requests")
    post = stage.server.client.post
    url, kind = "/v1/images/generations", {"content-type": "application/json"}

    async def body_of_100_mb() -> Any:
        for _ in range(100):
            yield b" " * 2**20

    statuses = {
        "bad JSON": (await post(url, content=b'{"prompt": ', headers=kind)).status_code == 400,
        "n = 10^6": (await post(url, json={"prompt": "1", "n": 10**6})).status_code == 400,
        "10^6 steps": (await post(url, json={"prompt": "1", "num_inference_steps": 10**6})).status_code == 400,
        "a path as the model": (await post(url, json={"prompt": "1", "model": "/etc/passwd"})).status_code == 404,
    }
    try:
        large = (await post(url, content=body_of_100_mb(), headers=kind)).status_code
    except Exception:  # the server may close before all of it was sent
        large = 413
    statuses["100 MB"] = large == 413
    account.checks = {f"{name} is refused": right for name, right in statuses.items()}
    answers = await stage.server.draw_all(stage.bodies)
    account.take(answers)
    account.checks["good ones after them are drawn as ever"] = stage.right(answers)
    return account


async def full_disk(stage: Stage) -> Account:
    """A disk on which jobs can no longer be kept."""
    account = Account("full disk")
    client, pid = stage.server.client, stage.server.process.pid
    if not hasattr(resource, "prlimit"):
        account.notes.append("needs Linux")
        return account
    job = (await client.post("/v1/jobs", json=_body(1, 400))).json()
    largest = max(path.stat().st_size for path in stage.server.folder.glob("jobs.sqlite*"))
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest // 2, before[1]))
    try:
        refused = [(await client.post("/v1/jobs", json=_body(i, 4))).status_code for i in range(3)]
        answers = await stage.server.draw_all(stage.bodies)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    account.take(answers)
    account.accepted += 1
    account.checks["new jobs are refused with 503 or 507"] = all(code in (503, 507) for code in refused)
    account.checks["pictures are drawn as ever"] = stage.right(answers)
    done = await _job_end(stage.server, job["id"])
    account.ends[done["status"]] += 1
    account.checks["the job from before ends well when there is room"] = done["status"] == "succeeded"
    return account


async def _job_end(server: RehearsalServer, job: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            found = (await server.client.get(f"/v1/jobs/{job}")).json()
            if found.get("status") in ("succeeded", "failed", "cancelled"):
                return dict(found)
            await asyncio.sleep(0.1)


async def corrupt_swap(stage: Stage) -> Account:
    """A swap to a run whose weights are damaged, under load."""

    async def swap() -> None:
        models = stage.server.folder / "models"
        broken = models / "broken"
        for path in broken.glob("checkpoints/*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-100])
        body = {"name": "picture", "run": "broken"}
        answer = await stage.server.client.post("/v1/admin/models", json=body)
        account.checks["the swap is refused with the reason"] = (
            answer.status_code == 400 and "damaged" in answer.json()["error"]["message"]
        )

    account = Account("corrupt weights at a swap")
    before = (await stage.server.state())["workers"][0]["model"]
    under_load, _ = await _disturbed(stage, account.scenario, swap)
    account.accepted, account.ends = under_load.accepted, under_load.ends
    account.checks |= under_load.checks
    account.checks["the old version serves on"] = (await stage.server.state())["workers"][0]["model"] == before
    return account


SHARED: dict[str, Scenario] = {
    "killed-worker": killed_worker,
    "hung-worker": hung_worker,
    "restart-storm": restart_storm,
    "poison-request": poison_request,
    "out-of-memory": out_of_memory,
    "nan-row": nan_row,
    "failing-forward": failing_forward,
    "slow-client": slow_client,
    "disconnect": disconnect,
    "full-queue": full_queue,
    "bad-requests": bad_requests,
    "full-disk": full_disk,
    "corrupt-swap": corrupt_swap,
}


async def sigterm_under_load(run: Path, steps: int) -> Account:
    """SIGTERM while pictures are drawn."""
    account = Account("SIGTERM under load")
    async with rehearsal_server(run, "--queue-cost", "1e9") as server:
        await server.until_ready(2)
        drawing = asyncio.ensure_future(server.draw_all([_body(i, min(1000, 3 * steps)) for i in range(16)]))
        await server.until_holding(16)
        status = await server.stop()
        answers = await drawing
    account.take(answers)
    account.checks["each accepted one was drawn"] = account.ends == Counter(ok=16)
    account.checks["the server exits with 0"] = status == 0
    account.notes.append(f"exit status {status}")
    return account


async def killed_parent(run: Path, steps: int) -> Account:
    """kill -9 of the parent while jobs are drawn, and a restart on the same store."""
    account = Account("killed parent")
    with tempfile.TemporaryDirectory(prefix="smalti-chaos-") as name:
        folder = Path(name)
        async with rehearsal_server(run, "--queue-cost", "1e9", folder=folder) as server:
            workers = await server.until_ready(2)
            jobs = [
                (await server.client.post("/v1/jobs", json=_body(i, min(1000, 3 * steps)))).json()["id"]
                for i in range(8)
            ]
            await server.until_busy()
            server.process.kill()
            await server.process.wait()
        account.accepted = len(jobs)
        async with asyncio.timeout(10):
            while any(is_running(pid) for pid in workers):
                await asyncio.sleep(0.05)
        account.checks["its workers exit with it"] = True
        async with rehearsal_server(run, "--queue-cost", "1e9", folder=folder) as server:
            ends = [await _job_end(server, job) for job in jobs]
            account.ends.update(end["status"] for end in ends)
            account.checks["each job is done once, after the restart"] = all(
                end["status"] == "succeeded" and len(end["images"]) == 1 for end in ends
            )
            alone = await server.draw(_body(3, min(1000, 3 * steps)))
            image = await server.client.get(f"/v1/jobs/{jobs[3]}/images/0")
            same = alone.picture is not None and without_receipt(image.content) == without_receipt(alone.picture)
            account.checks["a recovered picture is the undisturbed one, to the byte"] = same
    return account


OWN: dict[str, Callable[[Path, int], Awaitable[Account]]] = {
    "sigterm": sigterm_under_load,
    "killed-parent": killed_parent,
}


def scenario_names() -> list[str]:
    """Every scenario, in the order that they are run."""
    return [*SHARED, *OWN]


async def run_chaos(
    run: Path, names: Sequence[str], told: Callable[[Account], None], pictures: int = 16, steps: int = 60
) -> list[Account]:
    """Run scenarios on a run; told hears of each as it ends. Linux alone, where processes can be looked at."""
    assert sys.platform == "linux"
    accounts = []
    shared = [SHARED[name] for name in names if name in SHARED]
    with tempfile.TemporaryDirectory(prefix="smalti-chaos-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        shutil.copytree(run, models / "broken")
        arguments = ["--models", str(models), "--queue-cost", str(80 * 2 * 49 * 400)]
        if shared:
            async with rehearsal_server(run, *arguments, folder=Path(folder)) as server:
                bodies = [_body(i, steps, guidance_scale=1.5 if i % 2 else 1.0) for i in range(pictures)]
                first = await server.draw_all(bodies)
                assert all(a.picture for a in first), [a.code for a in first]
                undisturbed = [without_receipt(a.picture) for a in first if a.picture is not None]
                stage = Stage(server, bodies, undisturbed)
                for scenario in shared:
                    account = await scenario(stage)
                    told(account)
                    accounts.append(account)
    for name in names:
        if name in OWN:
            account = await OWN[name](run, steps)
            told(account)
            accounts.append(account)
    return accounts
