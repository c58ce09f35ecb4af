"""The commands `smalti serve` and `smalti replay`."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smalti.cli_serve_arguments import Replay, Serve
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.serving.model_settings import ModelSettings
    from smalti.serving.server import ServedRun
    from smalti.serving.server_settings import ServerSettings

_ANY = "0.0.0.0"


def serve_command(command: Serve) -> int:
    """Serve until told to end."""
    try:
        from smalti.serving.server import ServeSettings, serve, served_runs
    except ImportError as error:
        raise UserError(
            f"serving needs packages that are not here ({error.name}): pip install 'smalti[serve]'"
        ) from None
    from smalti.serving.access import read_keys
    from smalti.serving.model_settings import ModelSettings
    from smalti.serving.pool import PoolSettings
    from smalti.serving.server_settings import ServerSettings
    from smalti.serving.supervisor import SupervisorSettings
    from smalti.serving.webhooks import WebhookSettings

    for name in ("workers", "threads", "max_rows"):
        if getattr(command, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(command, name)} must be at least 1")
    if not command.runs:
        raise UserError("give at least one run: smalti serve runs/mnist")
    logging.basicConfig(level=command.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    http = ServerSettings(
        host=command.host,
        port=command.port,
        keys=read_keys(command.keys, os.environ),
        allow_open=command.open,
        rate_limit=command.rate_limit,
        cors_origins=command.cors,
        allow_faults=command.faults,
        traces=command.traces,
        deadline_seconds=command.deadline,
    )
    model = ModelSettings(
        name="",
        run="",
        devices=command.devices,
        threads=command.threads,
        compile=command.compile,
        max_rows=command.max_rows,
        allow_faults=command.faults,
    )
    pool = PoolSettings(command.workers, balancing=command.balancing, hang_seconds=command.hang_seconds)
    settings = ServeSettings(
        SupervisorSettings(model, pool, command.queue_cost, command.drain_seconds),
        http,
        store=command.store,
        webhooks=WebhookSettings(hosts=command.webhook_hosts, allow_private=command.webhook_private),
        models=command.models,
        ui=command.ui,
    )
    runs = served_runs(command.runs)
    for one in runs:
        if not one.run.exists():
            raise UserError(f"there is no run at {one.run}: train one with `smalti train mnist --out {one.run}`")

    if command.ray:
        return _serve_on_ray(command, runs, http, model)

    async def run() -> None:
        started = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(serve(settings, runs, started))
        await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            port, cards = started.result()
            where = f"http://{'127.0.0.1' if command.host == _ANY else command.host}:{port}"
            for card in cards:
                print(f"model {card.key}: {card.architecture}, {card.parameters:,} parameters", flush=True)
            print(f"serving on {where}/v1/images/generations", flush=True)
            print(f"page: {where}/ui   watch: smalti top {where}   API: {where}/docs", flush=True)
        await serving

    print("loading ...", flush=True)
    asyncio.run(run())
    print("ended: everything that was accepted is done")
    return 0


def _serve_on_ray(command: Serve, runs: "Sequence[ServedRun]", http: "ServerSettings", model: "ModelSettings") -> int:
    """Deploy on the cluster that $RAY_ADDRESS names and return, or serve on this machine until told to end."""
    from smalti.serving.ray_app import RaySettings, deploy_on_ray

    gpus = 1.0 if any(device.startswith("cuda") for device in command.devices) else 0.0
    settings = RaySettings(replicas=command.workers, gpus=gpus, cpus=float(command.threads))
    deploy_on_ray(runs, settings, http, model)
    print(f"serving on Ray at http://{http.host}:{http.port}/v1/images/generations", flush=True)
    if os.environ.get("RAY_ADDRESS"):
        print("it goes on there: `serve status` shows it, `serve shutdown` ends it")
        return 0
    from ray import serve

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    return 0


def replay_command(command: Replay) -> int:
    """Draw a served picture again and compare."""
    from smalti.serving.loading import load_engine
    from smalti.serving.messages import Draw, Failed, Finished, PictureEvent
    from smalti.serving.model_settings import ModelSettings
    from smalti.serving.receipts import compare, order_again, read_receipt

    receipt = read_receipt(command.picture)
    files = [None if path is None else _content(path) for path in (command.source, command.mask)]
    order = order_again(receipt, *files)
    told: list[PictureEvent] = []
    settings = ModelSettings(name=receipt.model, run=str(command.run), threads=command.threads)
    engine = load_engine(settings, told.append)
    if engine.card.version != receipt.version:
        raise UserError(
            f"--run {command.run} has the weights {engine.card.version}, the receipt names {receipt.version}: "
            "give the run that drew it"
        )
    engine.draw(Draw(0, order, 0))
    while not engine.idle:
        engine.tick()
    end = told[-1]
    if isinstance(end, Failed):
        raise UserError(f"{command.picture}: {end.message}")
    assert isinstance(end, Finished)
    if command.out is not None:
        command.out.write_bytes(end.image)
    agreement = compare(command.picture.read_bytes(), end.image)
    print(f"{command.picture}: request {order.request_id or 'without an id'}, seed {order.seed}, {receipt.model}")
    print(f"drawn again with smalti {receipt.smalti} and torch {receipt.torch} then: {agreement}")
    return 1 if agreement == "different" else 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
