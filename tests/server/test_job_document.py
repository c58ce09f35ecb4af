"""Schemathesis over the routes of jobs and of the administrator, on a live server.

SMALTI_API_CASES=2000 pytest tests/server/test_job_document.py asks that often.
"""

import contextlib
import os

import httpx
import hypothesis
import pytest
import schemathesis
from server.doubles_jobs import LOCAL, QUICK, VersionedDouble
from server.live_server import live_server
from server.test_api_document import asked, check

from smalti.serving.admin import admin_router
from smalti.serving.app import create_app
from smalti.serving.arms import Arms
from smalti.serving.job_routes import jobs_router
from smalti.serving.jobs import Jobs
from smalti.serving.server_settings import ServerSettings
from smalti.serving.store import open_store
from smalti.serving.webhooks import Webhooks

CASES = int(os.environ.get("SMALTI_API_CASES", "120"))
ROUTES = 12


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("document")
    (folder / "models" / ("b" * 12)).mkdir(parents=True)
    arms = Arms(VersionedDouble(step_seconds=0.0, load_seconds=0.0))
    store = open_store(folder / "jobs.db")
    webhooks = Webhooks(store, LOCAL)

    async def deliver(message):
        return "delivered", None

    webhooks._attempt = deliver
    jobs = Jobs(arms, store, webhooks, QUICK)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        await jobs.start()
        yield
        await jobs.close()
        await arms.close()
        await store.close()

    settings = ServerSettings(stream_ping_seconds=0.1)
    routers = [jobs_router(jobs, settings), admin_router(arms, lambda: None, folder / "models")]
    with live_server(create_app(arms, settings, routers=routers, lifespan=lifespan)) as url:
        api = schemathesis.openapi.from_url(f"{url}/openapi.json")
        # Of the right form, and naming a model, class or job that is not there.
        api.config.checks.positive_data_acceptance.expected_statuses = [*range(200, 300), 400, 404, 409]
        made = httpx.post(f"{url}/v1/jobs", json={"class_label": 1, "n": 2, "webhook_url": "https://a.example/"})
        yield api, made.json()["id"]


def test_jobs_and_administration(api):
    """Each route in turn: schemathesis' own way to wait for a fixture does not work with pytest 9."""
    api, job = api
    routes = api.include(path_regex="^/v1/(jobs|admin|webhook)").get_all_operations()
    operations = [route.ok() for route in routes]
    assert len(operations) == ROUTES
    for operation in operations:

        @asked(CASES // ROUTES)
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            if "job_id" in (case.path_parameters or {}) and len(case.path_parameters["job_id"]) % 2:
                case.path_parameters["job_id"] = job  # one that there is; else hardly anything is ever found
            check(case)

        ask()
