"""The HTTP face of jobs: the application of create_app with the jobs' router, over a double."""

import asyncio
import contextlib
import json

import httpx
import pytest
from server.double_service import DoubleService
from server.doubles_jobs import LOCAL, QUICK, running_jobs

from smalti.serving.access import ApiKey, digest
from smalti.serving.app import create_app
from smalti.serving.job_routes import jobs_router
from smalti.serving.server_settings import ServerSettings

ALICE, BOB = ({"authorization": f"Bearer {name}-{'x' * 20}"} for name in ("alice", "bob"))
KEYS = tuple(ApiKey(name, digest(f"{name}-{'x' * 20}")) for name in ("alice", "bob"))
BODY = {"class_label": 1, "n": 2, "seed": 5, "num_inference_steps": 3}


@contextlib.asynccontextmanager
async def a_client(where, service=None, **changes):
    """A client that speaks to the application as alice."""
    async with running_jobs(where, service, **changes) as jobs:
        settings = ServerSettings(keys=KEYS, stream_ping_seconds=0.05)
        app = create_app(jobs.service, settings, routers=[jobs_router(jobs, settings)])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ALICE) as client:
            yield client


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def events_of(answer):
    """(name, number, data) of each server-sent event."""
    told = []
    for block in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            told.append((lines["event"], int(lines["id"]), json.loads(lines["data"])))
    return told


async def finished(client, id):
    for _ in range(500):
        job = (await client.get(f"/v1/jobs/{id}")).json()
        if job["status"] not in ("queued", "running"):
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(job)


def test_a_job_from_post_to_picture(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db") as client:
            asked = BODY | {"metadata": {"order": "8"}, "partial_images": 1}
            answer = await client.post("/v1/jobs", json=asked)
            made = answer.json()
            assert answer.status_code == 202
            assert answer.headers["location"] == f"/v1/jobs/{made['id']}"
            assert (made["object"], made["status"], made["n"], made["request"]) == ("job", "queued", 2, asked)
            told = events_of(await client.get(f"/v1/jobs/{made['id']}/events"))
            assert [name for name, _, _ in told if name not in ("progress", "preview")] == [
                "queued",
                "running",
                "picture",
                "picture",
                "succeeded",
            ]
            assert all(data["type"] == name for name, _, data in told)
            preview = next(data for name, _, data in told if name == "preview")
            assert preview["b64_json"].startswith("iVBOR")
            behind = events_of(
                await client.get(f"/v1/jobs/{made['id']}/events", headers={"last-event-id": str(told[-2][1])})
            )
            assert behind == told[-1:]
            job = (await client.get(f"/v1/jobs/{made['id']}")).json()
            assert (job["status"], job["metadata"], job["webhook"]) == ("succeeded", {"order": "8"}, None)
            assert [image["seed"] for image in job["images"]] == [5, 6]
            file = await client.get(job["images"][1]["url"])
            assert (file.headers["content-type"], file.content[:4]) == ("image/png", b"\x89PNG")
            again = await client.delete(f"/v1/jobs/{made['id']}")
            assert (again.status_code, again.json()["status"]) == (200, "succeeded")

    run(work())


def test_an_idempotency_key_over_http(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db") as client:
            key = {"idempotency-key": "order-8"}
            answers = await asyncio.gather(*(client.post("/v1/jobs", json=BODY, headers=key) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {202}
            assert len({answer.json()["id"] for answer in answers}) == 1
            assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19
            other = await client.post("/v1/jobs", json=BODY | {"seed": 6}, headers=key)
            assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
            for bad in ("", "x" * 256, "a b"):
                refused = await client.post("/v1/jobs", json=BODY, headers={"idempotency-key": bad})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "idempotency-key")
            whose = await client.post("/v1/jobs", json=BODY | {"seed": 6}, headers=key | BOB)
            assert whose.status_code == 202

    run(work())


def test_others_see_nothing_of_a_job(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db") as client:
            made = (await client.post("/v1/jobs", json=BODY)).json()
            path = f"/v1/jobs/{made['id']}"
            answers = [
                await client.get(path, headers=BOB),
                await client.delete(path, headers=BOB),
                await client.get(f"{path}/events", headers=BOB),
                await client.get(f"{path}/images/0", headers=BOB),
                await client.get("/v1/jobs/job_of_nobody"),
                await client.get("/v1/jobs", params={"after": "job_of_nobody"}),
                await client.get(f"{path}/images/7"),
            ]
            assert [answer.status_code for answer in answers] == [404] * 7
            assert all(answer.json()["error"]["type"] == "invalid_request_error" for answer in answers)
            assert (await client.get("/v1/jobs", headers=BOB)).json()["data"] == []
            secrets = [(await client.get("/v1/webhook_secret", headers=who)).json()["secret"] for who in (ALICE, BOB)]
            assert secrets[0] != secrets[1]

    run(work())


def test_pages_of_jobs(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db") as client:
            made = [(await client.post("/v1/jobs", json=BODY)).json()["id"] for _ in range(5)]
            seen, after = [], {}
            while True:
                page = (await client.get("/v1/jobs", params={"limit": 2, "order": "asc", **after})).json()
                seen += [job["id"] for job in page["data"]]
                if not page["has_more"]:
                    break
                after = {"after": page["last_id"]}
            assert seen == made
            newest = (await client.get("/v1/jobs", params={"limit": 1})).json()
            assert (newest["first_id"], newest["has_more"]) == (made[-1], True)

    run(work())


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 10**6}, "n"),
        ({"class_label": 99}, "class_label"),
        ({"webhook_url": "http://example.com/"}, "webhook_url"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"webhok_url": "https://example.com/"}, "webhok_url"),
    ],
)
def test_what_is_refused(tmp_path, changes, param):
    async def work():
        async with a_client(tmp_path / "jobs.db") as client:
            answer = await client.post("/v1/jobs", json=BODY | changes)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert (await client.get("/v1/jobs")).json()["data"] == []

    run(work())


def test_no_room(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db", DoubleService(room=1)) as client:
            full = await client.post("/v1/jobs", json=BODY)
            assert (full.status_code, full.headers["retry-after"]) == (429, "2")

    run(work())


def test_a_listener_who_leaves_ends_nothing(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db", DoubleService(step_seconds=0.02)) as client:
            made = (await client.post("/v1/jobs", json=BODY | {"num_inference_steps": 10})).json()
            listening = asyncio.create_task(client.get(f"/v1/jobs/{made['id']}/events"))
            await asyncio.sleep(0.05)
            listening.cancel()
            assert (await finished(client, made["id"]))["status"] == "succeeded"

    run(work())


def test_what_the_document_says_of_jobs(tmp_path):
    async def work():
        async with a_client(tmp_path / "jobs.db", settings=QUICK, webhook_settings=LOCAL) as client:
            document = (await client.get("/openapi.json")).json()
            post = document["paths"]["/v1/jobs"]["post"]
            assert {"202", "400", "409", "429", "503"} <= set(post["responses"])
            assert "422" not in post["responses"]

    run(work())
