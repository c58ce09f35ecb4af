"""The administrator's routes, over arms and a double."""

import asyncio
import contextlib

import httpx
import pytest
from fastapi import HTTPException, Request
from server.double_service import card
from server.doubles_jobs import VersionedDouble

from smalti.serving.admin import admin_router, runs_in
from smalti.serving.app import create_app
from smalti.serving.arms import Arms
from smalti.serving.server_settings import ServerSettings

A, B = (card(version=letter * 12) for letter in "ab")


def guard(request: Request) -> None:
    if request.headers.get("x-admin") != "yes":
        raise HTTPException(403, "not an administrator")


@contextlib.asynccontextmanager
async def an_admin(tmp_path):
    folder = tmp_path / "models"
    for name in ("b" * 12, "c" * 12, "broken"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("no folder")
    (tmp_path / "outside").mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    arms = Arms(VersionedDouble(A))
    app = create_app(arms, ServerSettings(), routers=[admin_router(arms, guard, folder)])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers={"x-admin": "yes"}
    ) as client:
        yield client, arms
    await arms.close()


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def test_only_administrators(tmp_path):
    async def work():
        async with an_admin(tmp_path) as (client, _):
            for method, path in (("GET", "arms"), ("GET", "models"), ("POST", "models"), ("POST", "arms")):
                answer = await client.request(method, f"/v1/admin/{path}", headers={"x-admin": "no"})
                assert answer.status_code == 403
            assert (await client.delete(f"/v1/admin/models/{A.key}", headers={"x-admin": "no"})).status_code == 403

    run(work())


def test_a_swap_and_a_split(tmp_path):
    async def work():
        async with an_admin(tmp_path) as (client, arms):
            listed = (await client.get("/v1/admin/models")).json()
            assert listed == {"runs": ["b" * 12, "broken", "c" * 12], "served": [A.key]}
            swapped = await client.post("/v1/admin/models", json={"name": "digits", "run": "b" * 12})
            assert (swapped.status_code, swapped.json()["model"]) == (200, B.key)
            await arms.settled()
            added = await client.post("/v1/admin/models", json={"name": "digits", "run": "c" * 12, "mode": "add"})
            new = added.json()["model"]
            split = {"name": "digits", "weights": {B.key: 9, new: 1}}
            (state,) = (await client.post("/v1/admin/arms", json=split)).json()
            assert [(arm["card"], arm["weight"]) for arm in state["arms"]] == [(B.key, 9), (new, 1)]
            (state,) = (
                await client.post("/v1/admin/arms", json={"name": "digits", "weights": {B.key: 1}, "shadow": new})
            ).json()
            assert state["shadow"]["card"] == new
            gone = await client.delete(f"/v1/admin/models/{new}")
            assert (gone.status_code, gone.json()["served"]) == (200, [B.key])
            (state,) = (await client.get("/v1/admin/arms")).json()
            assert [event["kind"] for event in state["events"]] == ["swapped", "retired", "added", "set", "set"]

    run(work())


def test_a_new_name(tmp_path):
    async def work():
        async with an_admin(tmp_path) as (client, arms):
            added = await client.post("/v1/admin/models", json={"name": "letters", "run": "b" * 12})
            assert added.json()["model"] == "letters@" + "b" * 12
            assert [c.name for c in arms.cards()] == ["digits", "letters"]

    run(work())


@pytest.mark.parametrize("run_name", ["../outside", "/etc", "link", "file", "", ".", "..", "b" * 12 + "/", "nowhere"])
def test_a_request_names_no_path(tmp_path, run_name):
    async def work():
        async with an_admin(tmp_path) as (client, arms):
            answer = await client.post("/v1/admin/models", json={"name": "digits", "run": run_name})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "run")
            assert str(tmp_path) not in answer.text
            assert [c.key for c in arms.cards()] == [A.key]

    run(work())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("models", {"name": "digits", "run": "broken"}),
        ("models", {"name": "a/b", "run": "b" * 12}),
        ("arms", {"name": "digits", "weights": {"digits@nothing": 1}}),
        ("arms", {"name": "digits", "weights": {}}),
        ("arms", {"name": "digits", "weights": {A.key: 0}}),
        ("arms", {"name": "letters", "weights": {A.key: 1}}),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, path, body):
    async def work():
        async with an_admin(tmp_path) as (client, _):
            before = (await client.get("/v1/admin/arms")).json()
            answer = await client.post(f"/v1/admin/{path}", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]
            assert (await client.get("/v1/admin/arms")).json() == before

    run(work())


def test_links_that_stay_inside_are_runs(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    assert set(runs_in(tmp_path)) == {"run", "latest"}
