"""Jobs over an honest double: nothing lost, nothing twice, one end; also when the server dies or the disk is full."""

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs
from server.double_service import DoubleService, card, picture
from server.doubles_jobs import QUICK, ended, new_job, running_jobs, until

from smalti.errors import UserError
from smalti.serving.jobs import IdempotencyConflict, JobNotFound
from smalti.serving.messages import Failed, PictureOrder
from smalti.serving.service import NotReady, QueueFull, ShuttingDown
from smalti.serving.store import StorageFull


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def kinds(events):
    return [event.kind for event in events]


def test_a_job_is_drawn_and_told(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            made, new = await jobs.create(new_job(n=2, seed=5, order={"partial_images": 1}))
            assert new
            assert (made.status, made.card) == ("queued", "digits@0123456789ab")
            job, events = await ended(jobs, made.id)
            told = [kind for kind in kinds(events) if kind not in ("progress", "preview")]
            assert told == ["queued", "running", "picture", "picture", "succeeded"]
            numbers = [event.number for event in events]
            assert numbers == sorted(set(numbers))
            assert (job.status, job.attempts, [p.seed for p in job.pictures]) == ("succeeded", 1, [5, 6])
            for i in range(2):
                expected = picture(PictureOrder(seed=5 + i, class_label=1), "0123456789ab")
                assert await jobs.image("alice", job.id, i) == ("image/png", expected)
            # Those who come late hear what lasts, with the same numbers.
            late = [event async for event in jobs.events("alice", job.id)]
            assert [(e.kind, e.number, e.data) for e in late if e.kind in ("picture", "succeeded")] == [
                (e.kind, e.number, e.data) for e in events if e.kind in ("picture", "succeeded")
            ]
            behind = [event async for event in jobs.events("alice", job.id, late[-2].number)]
            assert kinds(behind) == ["succeeded"]

    run(work())


def test_a_picture_that_fails_fails_the_job_and_not_the_others(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            asked = new_job(n=3)
            orders = [o if o.index != 1 else PictureOrder(seed=1, class_label=1, fault="nan") for o in asked.orders]
            job, events = await ended(jobs, (await jobs.create(replace(asked, orders=orders)))[0].id)
            assert (job.status, job.error.code, job.error.index) == ("failed", "not_finite", 1)
            assert sorted(p.index for p in job.pictures) == [0, 2]
            assert kinds(events)[-1] == "failed"
            with pytest.raises(JobNotFound):
                await jobs.image("alice", job.id, 1)

    run(work())


def test_a_cancelled_job_ends_once_and_frees_the_model(tmp_path, caplog):
    async def work():
        service = DoubleService(step_seconds=0.02)
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            made, _ = await jobs.create(new_job(n=2, steps=100))
            listening = asyncio.create_task(ended(jobs, made.id))
            await until(lambda: service.live)
            states = await asyncio.gather(*(jobs.cancel("alice", made.id) for _ in range(5)))
            assert {job.status for job in states} == {"cancelled"}
            assert (await jobs.cancel("alice", made.id)).status == "cancelled"
            _, events = await listening
            assert kinds(events).count("cancelled") == 1
            await until(lambda: not service.live)
            assert [event.kind async for event in jobs.events("alice", made.id)][-1] == "cancelled"

    run(work())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_finished_job_is_not_cancelled(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            job, _ = await ended(jobs, (await jobs.create(new_job()))[0].id)
            assert (await jobs.cancel("alice", job.id)) == job

    run(work())


def test_a_job_is_its_tenants(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            made, _ = await jobs.create(new_job())
            for ask in (jobs.get, jobs.cancel, lambda t, i: jobs.image(t, i, 0), lambda t, i: anext(jobs.events(t, i))):
                with pytest.raises(JobNotFound):
                    await ask("bob", made.id)
            assert (await jobs.page("bob"))[0] == []
            job, _ = await ended(jobs, made.id)
            assert job.status == "succeeded"
            with pytest.raises(JobNotFound):
                await jobs.get("bob", made.id)

    run(work())


def test_twenty_posts_with_one_key_make_one_job(tmp_path):
    async def work():
        service = DoubleService()
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            asked = new_job(n=2, idempotency_key="k")
            made = await asyncio.gather(*(jobs.create(asked) for _ in range(20)))
            assert len({job.id for job, _ in made}) == 1
            assert sum(new for _, new in made) == 1
            await ended(jobs, made[0][0].id)
            again, new = await jobs.create(asked)
            assert (again.id, again.status, new) == (made[0][0].id, "succeeded", False)
            assert len(service.orders) == 2
            # Of another tenant the same key is another key.
            other, new = await jobs.create(new_job("bob", n=2, idempotency_key="k"))
            assert new
            assert other.id != again.id
            with pytest.raises(IdempotencyConflict):
                await jobs.create(new_job(n=2, seed=9, idempotency_key="k"))

    run(work())


def test_another_body_conflicts_also_while_the_first_is_being_accepted(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            bodies = [new_job(seed=i % 2, idempotency_key="k") for i in range(10)]
            made = await asyncio.gather(*(jobs.create(body) for body in bodies), return_exceptions=True)
            assert [isinstance(result, IdempotencyConflict) for result in made] == [False, True] * 5

    run(work())


def test_a_key_outlives_the_server_and_not_the_job(tmp_path):
    async def work():
        asked = new_job(idempotency_key="k")
        brief = replace(QUICK, keep_seconds=0.3, sweep_seconds=0.05)
        async with running_jobs(tmp_path / "jobs.db", settings=brief) as jobs:
            first, _ = await jobs.create(asked)
            await ended(jobs, first.id)
        async with running_jobs(tmp_path / "jobs.db", settings=brief) as jobs:
            assert (await jobs.create(asked))[0].id == first.id
            await asyncio.sleep(0.4)
            with pytest.raises(JobNotFound):
                await jobs.get("alice", first.id)
            again, new = await jobs.create(asked)
            assert new
            assert again.id != first.id

    run(work())


def test_a_refused_job_was_never_there(tmp_path):
    async def work():
        service = DoubleService(room=1)
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            with pytest.raises(QueueFull):
                await jobs.create(new_job(n=2, idempotency_key="k"))
            with pytest.raises(UserError, match="unknown model"):
                await jobs.create(new_job(model="letters", idempotency_key="k"))
            assert (await jobs.page("alice"))[0] == []
            assert (await jobs.create(new_job(n=1, idempotency_key="k")))[1]

    run(work())


def test_a_caller_who_goes_away_leaves_a_whole_job(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            asking = asyncio.create_task(jobs.create(new_job(idempotency_key="k")))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            job, new = await jobs.create(new_job(idempotency_key="k"))
            assert not new
            assert (await ended(jobs, job.id))[0].status == "succeeded"

    run(work())


def test_a_stopped_server_leaves_its_jobs_to_the_next(tmp_path):
    async def work():
        slow = DoubleService(step_seconds=0.05)
        async with running_jobs(tmp_path / "jobs.db", slow, replace(QUICK, close_seconds=0.05)) as jobs:
            made, _ = await jobs.create(new_job(n=3, seed=7, steps=50, order={"partial_images": 1}))
            listening = asyncio.create_task(ended(jobs, made.id))
            await asyncio.sleep(0.05)
        _, events = await listening
        assert kinds(events)[:2] == ["queued", "running"]
        with pytest.raises(ShuttingDown):
            await jobs.create(new_job())
        # The next server's service is not up at once, and takes one picture at a time.
        service = DoubleService()
        refusals = iter([NotReady("starting", 0.05), QueueFull("full", 0.05)])
        submit = service.submit

        def submit_later(model, orders):
            refusal = next(refusals, None)
            if refusal is not None:
                raise refusal
            return submit(model, orders)

        service.submit = submit_later
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            last = events[-1].number
            rest = [event async for event in jobs.events("alice", made.id, last)]
            assert all(event.number > last for event in rest)
            assert [kind for kind in kinds(rest) if kind not in ("progress", "preview")] == [
                "queued",
                "running",
                "picture",
                "picture",
                "picture",
                "succeeded",
            ]
            job = await jobs.get("alice", made.id)
            assert (job.attempts, [p.seed for p in sorted(job.pictures, key=lambda p: p.index)]) == (2, [7, 8, 9])
            expected = picture(PictureOrder(seed=8, class_label=1), "0123456789ab")
            assert (await jobs.image("alice", made.id, 1))[1] == expected

    run(work())


def test_a_draining_service_does_not_end_jobs(tmp_path):
    """The supervisor fails with shutting_down what it could not finish: that is no end of a job."""

    async def work():
        service = DoubleService(step_seconds=1.0)
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            made, _ = await jobs.create(new_job())
            for ticket in service.live.values():
                ticket.add(Failed(ticket.number, "shutting_down", "the server was shut down"))
            await asyncio.sleep(0.05)
            assert not (await jobs.get("alice", made.id)).finished
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            assert (await ended(jobs, made.id))[0].status == "succeeded"

    run(work())


def test_a_job_over_which_servers_die_is_given_up(tmp_path):
    async def work():
        settings = replace(QUICK, max_attempts=2, close_seconds=0.01)
        slow = dict(step_seconds=1.0)
        async with running_jobs(tmp_path / "jobs.db", DoubleService(**slow), settings) as jobs:
            made, _ = await jobs.create(new_job())
        async with running_jobs(tmp_path / "jobs.db", DoubleService(**slow), settings) as jobs:
            await until(lambda: jobs.service.live)
        service = DoubleService()
        async with running_jobs(tmp_path / "jobs.db", service, settings) as jobs:
            job, _ = await ended(jobs, made.id)
            assert (job.status, job.error.code, job.attempts) == ("failed", "attempts_exhausted", 2)
            assert not service.orders

    run(work())


def test_a_resumed_job_keeps_its_version_while_it_is_served(tmp_path):
    async def work():
        old, new = card(version="0" * 12), card(version="1" * 12)
        settings = replace(QUICK, close_seconds=0.01)
        async with running_jobs(tmp_path / "jobs.db", DoubleService(old, step_seconds=1.0), settings) as jobs:
            first, _ = await jobs.create(new_job())
            pinned, _ = await jobs.create(new_job(model=old.key))
        both = DoubleService(new, old)
        async with running_jobs(tmp_path / "jobs.db", both, replace(settings, close_seconds=1.0)) as jobs:
            assert [p.card for p in (await ended(jobs, first.id))[0].pictures] == [old.key]
            assert (await ended(jobs, pinned.id))[0].status == "succeeded"
        async with running_jobs(tmp_path / "jobs2.db", DoubleService(old, step_seconds=1.0), settings) as jobs:
            first, _ = await jobs.create(new_job())
            pinned, _ = await jobs.create(new_job(model=old.key))
        async with running_jobs(tmp_path / "jobs2.db", DoubleService(new)) as jobs:
            assert [p.card for p in (await ended(jobs, first.id))[0].pictures] == [new.key]
            job, _ = await ended(jobs, pinned.id)
            assert (job.status, job.error.code) == ("failed", "invalid_request")
            assert old.key in job.error.message

    run(work())


class FullStore:
    """Makes a store's writes fail from now on, as a full disk's do."""

    def __init__(self, store) -> None:
        self.store, self.real, self.full = store, store.write, True
        store.write = self.write

    async def write(self, operation):
        if self.full:
            raise StorageFull("the disk of the job store is full", 30.0)
        return await self.real(operation)


def test_a_full_disk_accepts_nothing(tmp_path):
    async def work():
        service = DoubleService(step_seconds=0.01)
        async with running_jobs(tmp_path / "jobs.db", service) as jobs:
            disk = FullStore(jobs.store)
            with pytest.raises(StorageFull) as refused:
                await jobs.create(new_job(n=2, steps=10_000, idempotency_key="k"))
            assert refused.value.code == "storage_full"
            await until(lambda: not service.live)  # nothing is drawn for nobody
            assert (await jobs.page("alice"))[0] == []
            disk.full = False
            assert (await jobs.create(new_job(idempotency_key="k")))[1]

    run(work())


def test_a_disk_that_fills_up_later_loses_nothing(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            asked = new_job(n=2, seed=5)
            slow = structs.replace(asked.orders[0], num_inference_steps=40)  # so that the second picture comes first
            made, _ = await jobs.create(replace(asked, orders=[slow, asked.orders[1]]))
            disk = FullStore(jobs.store)
            job, events = await ended(jobs, made.id)
            assert (job.status, kinds(events)[-1]) == ("succeeded", "succeeded")
            assert [event.data["index"] for event in events if event.kind == "picture"] == [1, 0]
            assert [one.index for one in job.pictures] == [0, 1]
            expected = ("image/png", picture(PictureOrder(seed=6, class_label=1), "0123456789ab"))
            assert await jobs.image("alice", made.id, 1) == expected
            await asyncio.sleep(0.1)
            assert (await jobs.get("alice", made.id)).status == "succeeded"
            stored = await jobs.store.read(lambda c: c.exec_driver_sql("SELECT status FROM jobs").scalar_one())
            assert stored in ("queued", "running")
            disk.full = False
            await until(lambda: made.id not in jobs._live)
            assert await jobs.get("alice", made.id) == job
            assert await jobs.image("alice", made.id, 1) == expected
        async with running_jobs(tmp_path / "jobs.db") as jobs:
            assert await jobs.get("alice", made.id) == job

    run(work())


def test_what_waits_for_room_is_written_in_order(tmp_path):
    """A job's end must not overtake its pictures: the store takes none of a job that has ended."""

    async def work():
        async with running_jobs(tmp_path / "jobs.db", settings=replace(QUICK, flush_seconds=3600.0)) as jobs:
            orders = [PictureOrder(seed=i, class_label=1, num_inference_steps=1 + 200 * i) for i in range(3)]
            made, _ = await jobs.create(replace(new_job(n=3), orders=orders))
            disk = FullStore(jobs.store)
            await until(lambda: jobs._live[made.id].job.pictures)
            disk.full = False  # after the first, long before the second
            await ended(jobs, made.id)
            await jobs._flush()
            assert not jobs._live
            assert len((await jobs.get("alice", made.id)).pictures) == 3
            assert {(await jobs.image("alice", made.id, i))[0] for i in range(3)} == {"image/png"}

    run(work())


def test_expired_jobs_give_their_room_back(tmp_path):
    async def work():
        brief = replace(QUICK, keep_seconds=0.2)
        async with running_jobs(tmp_path / "jobs.db", settings=brief) as jobs:
            made, _ = await jobs.create(new_job())
            await ended(jobs, made.id)
            blob = b"x" * 2_000_000
            await jobs.store.write(lambda c: c.exec_driver_sql("UPDATE pictures SET file = ?", (blob,)))
            pages = await jobs.store.read(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())
            await asyncio.sleep(0.25)
            await jobs._sweep()
            left = await jobs.store.read(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())
            assert left < pages / 10
            with pytest.raises(JobNotFound):
                await jobs.get("alice", made.id)

    run(work())


def test_a_slow_listener_gets_the_latest_preview_and_holds_up_nobody(tmp_path):
    async def work():
        async with running_jobs(tmp_path / "jobs.db", DoubleService(step_seconds=0.005)) as jobs:
            made, _ = await jobs.create(new_job(steps=20, order={"partial_images": 3}))
            events = jobs.events("alice", made.id)
            assert (await anext(events)).kind == "queued"
            other = await ended(jobs, made.id)
            assert 1 <= kinds(other[1]).count("preview") <= 3  # on a busy machine one may give way to the next
            rest = [kind for kind in kinds([event async for event in events]) if kind != "progress"]
            # The previews were of a picture that is done.
            assert rest == ["running", "picture", "succeeded"]

    run(work())


def test_who_heard_a_dead_server_hears_the_end_from_the_next(tmp_path):
    """Found by the state machine: a job ended before its next attempt began was told by a number of the last one."""

    async def work():
        settings = replace(QUICK, close_seconds=0.01)
        async with running_jobs(tmp_path / "jobs.db", DoubleService(step_seconds=1.0), settings) as jobs:
            made, _ = await jobs.create(new_job())
            events = jobs.events("alice", made.id)
            assert [(await anext(events)).kind for _ in range(2)] == ["queued", "running"]
            last = (await anext(events)).number
        async with running_jobs(tmp_path / "jobs.db", DoubleService(room=0), settings) as jobs:
            await jobs.cancel("alice", made.id)
            assert [e.kind async for e in jobs.events("alice", made.id, last)][-1] == "cancelled"

    run(work())
