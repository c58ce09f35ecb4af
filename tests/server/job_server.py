"""A server's parent process with jobs, to be killed: python job_server.py STORE STEP_SECONDS."""

import asyncio
import sys

import uvicorn
from server.double_service import DoubleService
from server.doubles_jobs import LOCAL, QUICK, running_jobs

from smalti.serving.app import create_app
from smalti.serving.job_routes import jobs_router
from smalti.serving.server_settings import ServerSettings


async def main(where: str, step_seconds: float) -> None:
    async with running_jobs(where, DoubleService(step_seconds=step_seconds), QUICK, LOCAL) as jobs:
        settings = ServerSettings()
        app = create_app(jobs.service, settings, routers=[jobs_router(jobs, settings)])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving


if __name__ == "__main__":
    assert "torch" not in sys.modules, "the parent must not import torch"
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
