"""Jobs through whatever may happen to them, in any order: none lost, nothing delivered twice, one terminal state."""

import asyncio
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from server.double_service import DoubleTicket, card, picture
from server.doubles_jobs import new_job
from sqlalchemy import text

from smalti.serving.job_events import JobEvent
from smalti.serving.jobs import Jobs, JobSettings
from smalti.serving.messages import Admitted, Failed, Finished, PictureOrder
from smalti.serving.service import ServiceState
from smalti.serving.store import open_store
from smalti.serving.webhooks import Webhooks

CARD = card()
SETTINGS = JobSettings(max_attempts=1000, progress_seconds=0.005, flush_seconds=0.01, close_seconds=0.02)


class HandMovedService:
    """Pictures end when the test says so."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[DoubleTicket, PictureOrder]] = {}
        self.numbers = count(1)

    def cards(self):
        return (CARD,)

    def state(self) -> ServiceState:
        raise NotImplementedError

    def submit(self, model, orders):
        assert model in (CARD.name, CARD.key)
        tickets = []
        for order in orders:
            ticket = DoubleTicket(next(self.numbers), CARD)
            ticket.add(Admitted(ticket.number, 1.0, 1))
            self.pending[ticket.number] = (ticket, order)
            tickets.append(ticket)
        return tickets

    def end(self, which: int, failed: bool) -> None:
        ticket, order = self.pending.pop(sorted(self.pending)[which % len(self.pending)])
        if failed:
            ticket.add(Failed(ticket.number, "not_finite", "NaN"))
        else:
            ticket.add(Finished(ticket.number, picture(order, CARD.version), 28, 28, 1, 1.0, 0, 0.0, 0.0))


async def together(tasks) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


class JobLives(RuleBasedStateMachine):
    """A client for each job listens, and comes back behind the last event it had when the server is gone."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.made: dict[str, int] = {}  # pictures of each job that was accepted
        self.keys: dict[str, str] = {}
        self.heard: dict[str, list[JobEvent]] = {}
        self.ends: dict[str, str] = {}  # terminal states that somebody has seen
        self.sent: list[str] = []
        self.start()

    def run(self, work):
        return self.loop.run_until_complete(asyncio.wait_for(work, 10))

    def start(self) -> None:
        self.service = HandMovedService()
        self.store = open_store(self.folder / "jobs.db")
        webhooks = Webhooks(self.store)
        webhooks._attempt = self.deliver
        self.jobs = Jobs(self.service, self.store, webhooks, SETTINGS)
        self.run(self.jobs.start())
        self.listeners = [self.loop.create_task(self.listen(id)) for id in self.made]

    async def deliver(self, message):
        self.sent.append(message.id)
        return "delivered", None

    async def listen(self, id: str) -> None:
        heard = self.heard.setdefault(id, [])
        with suppress(asyncio.CancelledError):
            async for event in self.jobs.events("alice", id, heard[-1].number if heard else 0):
                heard.append(event)

    @rule(n=st.integers(1, 3), key=st.sampled_from([None, "a", "b"]))
    def create(self, n, key) -> None:
        # The same key always comes with the same body.
        n = n if key is None else len(key)
        job, new = self.run(self.jobs.create(new_job(n=n, idempotency_key=key, webhook_url="https://a.example/")))
        assert new == (job.id not in self.made)
        if key is not None:
            assert self.keys.setdefault(key, job.id) == job.id
        if new:
            self.made[job.id] = n
            self.listeners.append(self.loop.create_task(self.listen(job.id)))

    @precondition(lambda self: self.service.pending)
    @rule(which=st.integers(0, 100), failed=st.booleans(), turns=st.integers(0, 30))
    def end_a_picture(self, which, failed, turns) -> None:
        self.service.end(which, failed and which % 3 == 0)
        self.turn(turns)

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 100), at_once=st.integers(1, 2))
    def cancel(self, which, at_once) -> None:
        id = sorted(self.made)[which % len(self.made)]

        async def cancel_some():
            return await asyncio.gather(*(self.jobs.cancel("alice", id) for _ in range(at_once)))

        for job in self.run(cancel_some()):
            assert job.finished

    @rule(turns=st.integers(1, 40))
    def turn(self, turns) -> None:
        """Let a little time pass: the disk answers in one thread, the loop in another."""

        async def wait():
            for _ in range(turns):
                await asyncio.sleep(0.0005)

        self.run(wait())

    @rule()
    def kill_and_start_anew(self) -> None:
        """All that was in memory is gone; what the disk was doing is done or not. SIGKILL has a test of its own."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.run(together(tasks))
        self.store._close()
        self.start()

    @rule()
    def stop_and_start_anew(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.run(self.jobs.close())
        self.run(together(self.listeners))
        self.run(self.store.close())

    @invariant()
    def nothing_is_lost_or_twice(self) -> None:
        if not hasattr(self, "jobs"):
            return
        for id, n in self.made.items():
            job = self.run(self.jobs.get("alice", id))  # never lost
            assert sorted({p.index for p in job.pictures}) == sorted(p.index for p in job.pictures)
            assert len(job.pictures) == n or job.status != "succeeded"
            if job.finished:
                assert self.ends.setdefault(id, job.status) == job.status  # the end is the end
            heard = self.heard.get(id, [])
            numbers = [event.number for event in heard]
            assert numbers == sorted(set(numbers))
            told = [event.data["index"] for event in heard if event.kind == "picture"]
            assert len(told) == len(set(told))
            ends = [event.kind for event in heard if event.kind in ("succeeded", "failed", "cancelled")]
            assert ends in ([], [job.status])
            assert not ends or heard[-1].kind == ends[0]

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return

        async def all_ended():
            while True:
                while self.service.pending:
                    self.service.end(0, failed=False)
                states = [(await self.jobs.get("alice", id)).finished for id in self.made]
                if all(states) and not self.jobs._live:
                    return
                await asyncio.sleep(0.002)

        async def all_sent():
            while len(set(self.sent)) < len(self.made):
                await asyncio.sleep(0.002)

        self.run(all_ended())
        self.run(all_sent())
        self.run(together(self.listeners))
        self.nothing_is_lost_or_twice()
        for id, n in self.made.items():
            kinds = [event.kind for event in self.heard[id]]
            assert kinds[-1] == self.ends[id]
            if kinds[-1] == "succeeded":
                assert kinds.count("picture") == n
            for i in range(n) if kinds[-1] == "succeeded" else ():
                expected = picture(PictureOrder(seed=i, class_label=1), CARD.version)
                assert self.run(self.jobs.image("alice", id, i)) == ("image/png", expected)
        rows = self.run(self.store.read(lambda c: c.execute(text("SELECT count(*) FROM jobs")).scalar_one()))
        assert rows == len(self.made)  # nothing was kept of what nobody was promised
        self.stop()
        self.loop.close()
        shutil.rmtree(self.folder)


TestJobLives = JobLives.TestCase
TestJobLives.settings = settings(
    max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
