"""A real server process, killed in the middle of jobs, and a disk that is really full."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest
from server.double_service import card, picture
from server.test_webhooks import answers, receiver
from standardwebhooks.webhooks import Webhook as Verifier

import smalti
from smalti.serving.messages import PictureOrder

TESTS = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(smalti.__file__).parent.parent)])}


@contextlib.asynccontextmanager
async def server_process(where, step_seconds):
    """A client of a server in a process of its own, and the process; it is killed at the end."""
    program = [sys.executable, str(TESTS / "server" / "job_server.py"), str(where), str(step_seconds)]
    process = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, env=ENVIRONMENT)
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def listen(client, id, after, heard):
    """Keep what a job's stream tells until it ends or breaks."""
    with contextlib.suppress(httpx.TransportError):
        async with client.stream("GET", f"/v1/jobs/{id}/events", headers={"last-event-id": str(after)}) as answer:
            event = {}
            async for line in answer.aiter_lines():
                if not line and event:
                    heard.append((int(event["id"]), event["event"], json.loads(event["data"])))
                    event = {}
                elif line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    event[name] = value


def test_a_killed_server_loses_no_job_and_delivers_nothing_twice(tmp_path):
    async def work():
        async with receiver(answers(200)) as there:
            body = {"class_label": 1, "n": 4, "num_inference_steps": 10, "webhook_url": there.url}
            bodies = [body | {"seed": 10 * i} for i in range(6)]
            heard: dict[str, list] = {}
            # Steps so long that four jobs of 0.1 s end, and none of the two of 10 s.
            bodies[4]["num_inference_steps"] = bodies[5]["num_inference_steps"] = 1000
            async with server_process(tmp_path / "jobs.db", 0.01) as (client, process):
                keys = [{"idempotency-key": f"k{i}"} for i in range(6)]
                made = [
                    (await client.post("/v1/jobs", json=b, headers=k)).json()["id"]
                    for b, k in zip(bodies, keys, strict=True)
                ]
                listening = [asyncio.create_task(listen(client, id, 0, heard.setdefault(id, []))) for id in made]
                async with asyncio.timeout(10):
                    while not any(kind == "picture" for one in heard.values() for _, kind, _ in one):
                        await asyncio.sleep(0.002)
                process.kill()
                await process.wait()
                await asyncio.gather(*listening)
            async with server_process(tmp_path / "jobs.db", 0.0) as (client, _):
                async with asyncio.timeout(20):
                    await asyncio.gather(
                        *(listen(client, id, heard[id][-1][0] if heard[id] else 0, heard[id]) for id in made)
                    )
                for id, asked, key in zip(made, bodies, keys, strict=True):
                    job = (await client.get(f"/v1/jobs/{id}")).json()
                    assert job["status"] == "succeeded"
                    numbers = [number for number, _, _ in heard[id]]
                    assert numbers == sorted(set(numbers))
                    assert sorted(d["index"] for _, kind, d in heard[id] if kind == "picture") == [0, 1, 2, 3]
                    assert [kind for _, kind, _ in heard[id]].count("succeeded") == 1
                    for image in job["images"]:
                        order = PictureOrder(seed=asked["seed"] + image["index"], class_label=1)
                        assert (await client.get(image["url"])).content == picture(order, card().version)
                    # The client that never had an answer asks again and finds its job.
                    again = await client.post("/v1/jobs", json=asked, headers=key)
                    assert (again.status_code, again.json()["id"]) == (202, id)
                assert len((await client.get("/v1/jobs", params={"limit": 100})).json()["data"]) == 6
                assert (await client.get(f"/v1/jobs/{made[5]}")).json()["attempts"] == 2
                secret = (await client.get("/v1/webhook_secret")).json()["secret"]
                async with asyncio.timeout(10):
                    while len({headers["webhook-id"] for _, headers, _ in there.requests}) < 6:
                        await asyncio.sleep(0.01)
            told = [Verifier(secret).verify(b, headers)["data"]["id"] for _, headers, b in there.requests]
            assert set(told) == set(made)

    asyncio.run(asyncio.wait_for(work(), 60))


ON_A_SMALL_DISK = """
    import asyncio, os, sys
    from pathlib import Path
    from server.double_service import DoubleService
    from server.doubles_jobs import ended, new_job, running_jobs, until
    from smalti.serving.store import StorageFull

    async def main(disk):
        service = DoubleService()
        async with running_jobs(disk / "jobs.db", service) as jobs:
            made, _ = await jobs.create(new_job(n=3, steps=30))
            with open(disk / "ballast", "wb", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(b"x" * 4096)
                except OSError:
                    pass
            try:
                while True:
                    await jobs.create(new_job(request={"x": "y" * 5000}))
            except StorageFull as error:
                print(error.code)
            job, events = await ended(jobs, made.id)
            print(job.status, [event.kind for event in events].count("picture"))
            accepted = {j.id for j in (await jobs.page("alice", limit=100))[0]}
            os.remove(disk / "ballast")
            await until(lambda: not jobs._live)
            print((await jobs.create(new_job()))[1])
            await until(lambda: not jobs._live)
        async with running_jobs(disk / "jobs.db", service) as jobs:
            page = (await jobs.page("alice", limit=100))[0]
            print({j.status for j in page}, accepted <= {j.id for j in page}, len(page) == len(accepted) + 1)

    asyncio.run(asyncio.wait_for(main(Path(sys.argv[1])), 30))
"""


def test_a_disk_that_is_really_full(tmp_path):
    """On a tmpfs of 2 MB, which is mounted in a namespace of the subprocess's own."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ON_A_SMALL_DISK))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("the kernel lets no user mount a tmpfs here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} {program} {disk}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "storage_full",
        "succeeded 3",
        "True",
        "{'succeeded'} True True",
    ], done.stderr
