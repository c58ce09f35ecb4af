"""Real worker processes, really killed: every accepted picture ends once, with the bytes it would have had."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server.loop_thread import LoopThread
from server.ticket_ends import end_of, ends_of

from smalti.errors import UserError
from smalti.serving.messages import Admitted, Failed, Finished, PictureOrder, Preview
from smalti.serving.model_settings import ModelSettings
from smalti.serving.pool import PoolSettings
from smalti.serving.service import NotReady, QueueFull, ShuttingDown
from smalti.serving.supervisor import Supervisor, SupervisorSettings


def settings(**changes):
    pool = {"workers": 2, "hang_seconds": 3.0, "quarantine_after": 1} | changes.pop("pool", {})
    model = ModelSettings(name="", run="", allow_faults=True, checkpoint_every=2, max_rows=8)
    return SupervisorSettings(model, PoolSettings(**pool), **changes)


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def supervisor(loop, trained_run):
    service = Supervisor(settings())
    loop.run(service.add_version("digits", trained_run))
    yield service
    loop.run(service.drain())
    assert not any(state.pid for state in service.state().workers)


ORDERS = [PictureOrder(seed=i, class_label=i % 10, num_inference_steps=400, partial_images=1) for i in range(6)]


@pytest.fixture(scope="module")
def undisturbed(loop, supervisor):
    async def draw():
        return [end.image for end in await ends_of(supervisor.submit("digits", ORDERS))]

    return loop.run(draw())


async def ready_pids(supervisor, count):
    while True:
        pids = [state.pid for state in supervisor.state().workers if state.state == "ready"]
        if len(pids) == count:
            return pids
        await asyncio.sleep(0.05)


async def half_drawn(ticket):
    """Wait until a picture has shown what it looks like on the way."""
    async for event in ticket.events():
        if isinstance(event, Preview):
            return


def test_events_are_admitted_preview_finished(loop, supervisor):
    async def draw():
        (ticket,) = supervisor.submit("digits", ORDERS[:1])
        assert ticket.place == 0
        events = [event async for event in ticket.events()]
        assert ticket.place is None
        return events

    events = loop.run(draw())
    assert [type(event) for event in events] == [Admitted, Preview, Finished]


def test_a_killed_workers_pictures_go_on_from_their_checkpoints(loop, supervisor, undisturbed):
    async def draw():
        victims = await ready_pids(supervisor, 2)
        tickets = supervisor.submit("digits", ORDERS)
        await asyncio.gather(*(half_drawn(ticket) for ticket in tickets[:2]))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return await ends_of(tickets)

    ends = loop.run(draw())
    assert [end.image for end in ends] == undisturbed
    assert all(end.resumed_from >= 100 for end in ends)
    assert max(state.restarts for state in supervisor.state().workers) >= 1


def test_a_stopped_worker_is_killed_and_its_pictures_go_on(loop, supervisor, undisturbed):
    async def draw():
        victim, _ = await ready_pids(supervisor, 2)
        tickets = supervisor.submit("digits", ORDERS)
        await half_drawn(tickets[0])
        os.kill(victim, signal.SIGSTOP)
        return await ends_of(tickets)

    assert [end.image for end in loop.run(draw())] == undisturbed


def test_a_poison_request_is_quarantined_and_takes_nobody_along(loop, supervisor, undisturbed):
    async def draw():
        poison = PictureOrder(class_label=1, fault="abort", num_inference_steps=20)
        tickets = supervisor.submit("digits", [*ORDERS[:3], poison, *ORDERS[3:]])
        return await ends_of(tickets)

    ends = loop.run(draw())
    assert ends.pop(3).code == "quarantined"
    assert [end.image for end in ends] == undisturbed


def test_cancel_ends_a_picture_once(loop, supervisor):
    async def draw():
        first, second = supervisor.submit("digits", ORDERS[:2])
        first.cancel()
        first.cancel()
        return await end_of(first), await end_of(second)

    cancelled, finished = loop.run(draw())
    assert (cancelled.code, type(finished)) == ("cancelled", Finished)


def test_what_is_wrong_with_an_order_comes_back(loop, supervisor):
    async def draw():
        return await ends_of(supervisor.submit("digits", [PictureOrder(class_label=11)]))

    (end,) = loop.run(draw())
    assert isinstance(end, Failed)
    assert end.code == "invalid_request"


def test_models_are_found_by_name_and_key(loop, supervisor):
    (card,) = supervisor.cards()

    async def submit(model):
        return await ends_of(supervisor.submit(model, [PictureOrder(class_label=1, num_inference_steps=2)]))

    assert isinstance(loop.run(submit(card.key))[0], Finished)
    with pytest.raises(UserError, match="digits"):
        loop.run(submit("digist"))


def test_a_run_that_cannot_be_served_says_why_and_leaves_the_other(loop, supervisor, tmp_path, trained_run):
    with pytest.raises(UserError, match="there is no run"):
        loop.run(supervisor.add_version("other", tmp_path / "missing"))
    with pytest.raises(UserError, match="served already"):
        loop.run(supervisor.add_version("digits", trained_run))
    assert len(supervisor.cards()) == 1


def test_the_queue_is_bounded_in_cost(loop, trained_run):
    async def draw():
        service = Supervisor(settings(pool={"workers": 1}, cost_limit=2 * 49 * 400 * 3.5))
        try:
            await service.add_version("digits", trained_run)
            with pytest.raises(UserError, match="the whole queue"):
                service.submit("digits", ORDERS)
            tickets = service.submit("digits", ORDERS[:3])
            with pytest.raises(QueueFull) as full:
                service.submit("digits", ORDERS[:2])
            assert full.value.retry_after >= 1.0
            await ends_of(tickets)
            return await ends_of(service.submit("digits", ORDERS[:2]))
        finally:
            await service.drain()
            with pytest.raises(ShuttingDown):
                service.submit("digits", ORDERS[:1])

    assert all(isinstance(end, Finished) for end in loop.run(draw()))


def test_a_storm_of_restarts_ends_in_answers(loop, tmp_path, trained_run):
    """A worker that begins to die at its start leaves nobody waiting."""
    broken = tmp_path / "run"

    async def draw():
        import shutil

        shutil.copytree(trained_run, broken)
        service = Supervisor(settings(pool={"workers": 1, "give_up_after": 1, "first_backoff": 0.05}))
        try:
            await service.add_version("digits", broken)
            tickets = service.submit("digits", ORDERS[:2])
            shutil.rmtree(broken)
            os.kill((await ready_pids(service, 1))[0], signal.SIGKILL)
            ends = await ends_of(tickets)
            with pytest.raises(NotReady):
                service.submit("digits", ORDERS[:1])
            return ends
        finally:
            await service.drain()

    assert [end.code for end in loop.run(draw())] == ["worker_lost"] * 2


PARENT = """
import asyncio, sys
from pathlib import Path
from smalti.serving.model_settings import ModelSettings
from smalti.serving.supervisor import Supervisor, SupervisorSettings

async def main():
    service = Supervisor(SupervisorSettings(ModelSettings(name="", run="")))
    await service.add_version("digits", Path(sys.argv[1]))
    print(service.state().workers[0].pid, flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def test_workers_die_with_a_killed_parent(trained_run):
    with subprocess.Popen([sys.executable, "-c", PARENT, trained_run], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists() or sys.platform != "linux"
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())
