"""What serving on Ray is made of, without Ray: replicas in this process, lost by hand."""

import asyncio
from itertools import cycle

import msgspec
import pytest
from server.loop_thread import LoopThread
from server.ticket_ends import end_of, ends_of

from smalti.errors import UserError
from smalti.serving.messages import Admitted, Draw, PictureOrder
from smalti.serving.model_settings import ModelSettings
from smalti.serving.queue_bound import QueueBound, expected_cost
from smalti.serving.ray_app import RaySettings, engine_name
from smalti.serving.ray_engine import QUEUED_COST, EngineReplica
from smalti.serving.ray_messages import Beat, FromReplica
from smalti.serving.ray_service import RayPictureService, RayServiceSettings
from smalti.serving.service import NotReady, QueueFull

ORDERS = [PictureOrder(seed=i, class_label=i, num_inference_steps=120, partial_images=2) for i in range(4)]


class Handle:
    """Two replicas as a deployment's handle shows them: they take turns, and streams break when one is lost."""

    def __init__(self, replicas):
        self.replicas = list(replicas)
        self.turns = cycle(range(len(self.replicas)))
        self.streams = []
        self.sent = []  # (replica's place, Draw)

    def open_stream(self, task, version, cost):
        place = next(self.turns)
        self.sent.append((place, msgspec.msgpack.decode(task, type=Draw)))
        stream = Stream(self.replicas[place].draw(task, version, cost), place)
        self.streams.append(stream)
        return stream

    def lose(self, place):
        for stream in self.streams:
            if stream.place == place:
                stream.lost = True
                stream.cancel()


class Stream:
    """A replica's stream as Ray gives it: the replica runs ahead of who reads."""

    def __init__(self, parts, place):
        self.place, self.told, self.lost = place, [], False
        self.parts = asyncio.Queue()
        self.task = asyncio.get_running_loop().create_task(self.pump(parts))

    async def pump(self, parts):
        try:
            async for part in parts:
                self.told.append(msgspec.msgpack.decode(part, type=FromReplica))
                self.parts.put_nowait(part)
        finally:
            await parts.aclose()
            self.parts.put_nowait(None)

    def __aiter__(self):
        return self

    async def __anext__(self):
        part = await self.parts.get()
        if self.lost:
            raise ConnectionError("The actor died unexpectedly")
        if part is None:
            raise StopAsyncIteration
        return part

    def cancel(self):
        self.task.cancel()


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def replicas(loop, trained_run):
    settings = msgspec.json.encode(ModelSettings(name="digits", run=str(trained_run)))

    async def start():
        pair = [EngineReplica.__new__(EngineReplica) for _ in range(2)]
        for replica in pair:
            await replica.__init__(settings)
        return pair

    pair = loop.run(start())
    yield pair
    for replica in pair:
        replica.__del__()
        replica._thread.join(5)
        assert not replica._thread.is_alive()


@pytest.fixture
def handle(replicas):
    return Handle(replicas)


@pytest.fixture
def service(loop, replicas, handle):
    async def make():
        made = RayPictureService(RayServiceSettings(first_backoff=0.001))
        made.set_engines([(replicas[0]._card, handle.open_stream)])
        return made

    return loop.run(make())


@pytest.fixture(scope="module")
def undisturbed(loop, replicas):
    async def draw():
        service = RayPictureService()
        service.set_engines([(replicas[0]._card, Handle(replicas[:1]).open_stream)])
        return [end.image for end in await ends_of(service.submit("digits", ORDERS))]

    return loop.run(draw())


def test_pictures_do_not_depend_on_the_replica(loop, service, handle, undisturbed):
    async def draw():
        return await ends_of(service.submit("digits", ORDERS))

    assert [end.image for end in loop.run(draw())] == undisturbed
    assert {place for place, _ in handle.sent} == {0, 1}
    state = service.state()
    assert state.finished == 4
    assert state.cost_left == 0
    assert {worker.model for worker in state.workers} == {service.cards()[0].key}


def test_a_lost_replica_s_pictures_go_on_from_their_checkpoints(loop, service, handle, undisturbed):
    async def draw():
        tickets = service.submit("digits", ORDERS)
        # Until the first replica's pictures, the first and the third, have a checkpoint.
        while not all(service._pictures[ticket.number].resume for ticket in tickets[::2]):
            await asyncio.sleep(0.001)
        handle.lose(0)
        return await ends_of(tickets)

    ends = loop.run(draw())
    assert [end.image for end in ends] == undisturbed
    again = [task for _, task in handle.sent[4:]]
    assert again
    assert all(task.resume is not None for task in again)
    assert sorted(task.order.seed for task in again) == [0, 2]
    assert all(ends[task.order.seed].resumed_from > 0 for task in again)


def test_a_picture_under_which_replicas_keep_dying_is_given_up(loop, replicas):
    class Dead:
        def __aiter__(self):
            return self

        async def __anext__(self):
            raise ConnectionError("gone")

        def cancel(self):
            pass

    async def draw():
        service = RayPictureService(RayServiceSettings(most_losses=3, first_backoff=0.001))
        service.set_engines([(replicas[0]._card, lambda *_: Dead())])
        return await end_of(service.submit("digits", ORDERS[:1])[0])

    end = loop.run(draw())
    assert (end.code, "4 replicas" in end.message) == ("worker_lost", True)


def test_cancel_stops_the_engine_s_work(loop, service, replicas):
    async def draw():
        order = msgspec.structs.replace(ORDERS[0], num_inference_steps=1500)
        ticket = service.submit("digits", [order])[0]
        async for event in ticket.events():
            if isinstance(event, Admitted):
                break
        ticket.cancel()
        ticket.cancel()
        assert ticket.place is None
        for _ in range(500):
            if not any(replica._in_flight for replica in replicas):
                break
            await asyncio.sleep(0.01)
        return [replica._in_flight for replica in replicas]

    assert loop.run(draw()) == [{}, {}]


def test_refusals(loop, service, replicas):
    async def submit(orders, settings=None):
        other = service if settings is None else RayPictureService(settings)
        if settings is not None and settings.cost_limit > 1:
            other.set_engines(list(service._engines.values()))
        tickets = other.submit("digits", orders)
        return [await end_of(ticket) for ticket in tickets]

    with pytest.raises(NotReady):
        loop.run(submit(ORDERS, RayServiceSettings(cost_limit=1.0)))
    one = expected_cost(service.cards()[0], ORDERS[0])
    with pytest.raises(UserError, match="ask for fewer"):
        loop.run(submit(ORDERS, RayServiceSettings(cost_limit=2 * one)))
    end = loop.run(submit([msgspec.structs.replace(ORDERS[0], solver="nonsense")]))[0]
    assert (end.code, end.param) == ("invalid_request", "solver") or end.code == "invalid_request"
    late = loop.run(submit([msgspec.structs.replace(ORDERS[0], num_inference_steps=1500, deadline_seconds=0.05)]))[0]
    assert late.code == "deadline_exceeded"


def test_a_full_queue_says_when_to_come_back():
    bound = QueueBound(100.0)
    bound.check(90.0, [10.0])
    with pytest.raises(QueueFull) as full:
        bound.check(95.0, [10.0])
    assert full.value.retry_after == 1.0
    bound.rate.add(2.0)
    for wait in (2.5, 7.5, 12.5):  # 5 too much at 2 a second; who is refused later comes after those before
        with pytest.raises(QueueFull) as full:
            bound.check(95.0, [10.0])
        assert full.value.retry_after == pytest.approx(wait, rel=0.01)


def test_other_weights_are_not_drawn_with(loop, replicas):
    async def draw():
        task = msgspec.msgpack.encode(Draw(7, ORDERS[0], 0))
        return [msgspec.msgpack.decode(part, type=FromReplica) async for part in replicas[0].draw(task, "old", 1.0)]

    beat, failed = loop.run(draw())
    assert isinstance(beat, Beat)
    assert (failed.number, failed.code) == (7, "worker_lost")


def test_health_is_the_heartbeat_s(loop, replicas):
    replica = replicas[0]

    async def check():
        await replica.check_health()
        replica._in_flight[99] = None
        try:
            await replica.check_health()
            replica._heartbeat -= 11
            with pytest.raises(RuntimeError, match="no sign for 1"):
                await replica.check_health()
        finally:
            del replica._in_flight[99]
        await replica.check_health()  # without work it may be silent
        assert replica.record_autoscaling_stats() == {QUEUED_COST: 0.0}

    loop.run(check())


def test_a_run_that_cannot_be_served_says_why(loop, tmp_path):
    async def start():
        replica = EngineReplica.__new__(EngineReplica)
        await replica.__init__(msgspec.json.encode(ModelSettings(name="digits", run=str(tmp_path))))

    with pytest.raises(RuntimeError, match=r"digits: .*config"):
        loop.run(start())


def test_settings_are_checked():
    with pytest.raises(UserError, match="max_replicas=1"):
        RaySettings(replicas=2, max_replicas=1)
    with pytest.raises(UserError, match="replicas=0"):
        RaySettings(replicas=0)
    with pytest.raises(UserError, match="drain_seconds=0"):
        RaySettings(drain_seconds=0)
    names = {engine_name(ModelSettings(name="digits", run=run)) for run in ("/a", "/b")}
    assert len(names) == 2
