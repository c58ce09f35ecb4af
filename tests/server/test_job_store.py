"""The job store, the same tests over SQLite and PostgreSQL."""

import asyncio
import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.postgres_server import as_other_user, find_binaries, make_database, postgres
from sqlalchemy import create_engine, text

from smalti.errors import UserError
from smalti.serving.messages import PictureOrder
from smalti.serving.store import StorageDown, StorageFull, open_store
from smalti.serving.store_tables import (
    Job,
    JobError,
    JobPicture,
    Webhook,
    begin_attempt,
    end_job,
    fact,
    find_job,
    find_job_of_key,
    insert_job,
    keep_picture,
    list_jobs,
    next_due,
    next_webhook,
    note_delivery,
    picture_file,
    start_job,
    sweep,
    unfinished_jobs,
    webhook_of_job,
)

ODD = "quotes ' \" \\ null \0 snow \u2603 face \U0001f600"


def job(id="job_1", tenant="alice", created=100.0, **changes) -> Job:
    orders = (PictureOrder(seed=2**63 - 1, prompt=ODD, source=b"\x00\xff", image_size=(8, 8)), PictureOrder(seed=2))
    made = Job(id, tenant, created, "digits", "digits@0", {"prompt": ODD}, orders, "hash", metadata={"a": ODD})
    return replace(made, **changes)


def picture(index=0, event=1_000_003) -> JobPicture:
    return JobPicture(index, event, 2**63 - 1, 28, 28, "digits@0", "image/png")


def end(status="succeeded", now=200.0, **changes):
    known = dict(id="job_1", status=status, error=None, last_event=9, now=now, expires=now + 50, message=None)
    return partial(end_job, **(known | changes))


@pytest.fixture(scope="module")
def databases():
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no postgres and initdb on this machine")
    if as_other_user() is None:
        pytest.skip("postgres does not run as root, and there is no setpriv")
    numbers = count()
    with postgres(binaries) as url:
        yield lambda: make_database(url, f"jobs{next(numbers)}")


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "jobs.db")
    return request.getfixturevalue("databases")()


@pytest.fixture
def stored(where):
    """Run operations on a store, each in a transaction of its own, and give their results."""
    store = open_store(where)
    yield lambda operation: asyncio.run(store.write(operation))
    asyncio.run(store.close())


def test_a_job_comes_back_as_it_was(stored):
    stored(partial(insert_job, job=job(idempotency_key="k", webhook_url="https://a.example/")))
    found = stored(partial(find_job, tenant="alice", id="job_1", now=0.0))
    assert found == job(idempotency_key="k", webhook_url="https://a.example/")
    assert stored(partial(find_job, tenant="bob", id="job_1", now=0.0)) is None
    assert stored(unfinished_jobs) == [found]


def test_a_job_ends_once(stored):
    stored(partial(insert_job, job=job()))
    stored(partial(start_job, id="job_1", now=150.0))
    assert stored(end("cancelled"))
    assert not stored(end("succeeded", now=300.0))
    stored(partial(start_job, id="job_1", now=160.0))
    stored(partial(begin_attempt, id="job_1", attempts=7))
    assert not stored(partial(keep_picture, id="job_1", picture=picture(), file=b"late"))
    found = stored(partial(find_job, tenant="alice", id="job_1", now=0.0))
    assert (found.status, found.started, found.ended, found.attempts, found.pictures) == ("cancelled", 150, 200, 1, ())
    assert stored(unfinished_jobs) == []


def test_a_failure_is_told(stored):
    stored(partial(insert_job, job=job()))
    error = JobError("not_finite", ODD, None, 1)
    assert stored(end("failed", error=error))
    assert stored(partial(find_job, tenant="alice", id="job_1", now=0.0)).error == error


def test_a_picture_is_kept_once(stored):
    stored(partial(insert_job, job=job()))
    assert stored(partial(keep_picture, id="job_1", picture=picture(), file=b"\x00first"))
    assert not stored(partial(keep_picture, id="job_1", picture=picture(event=1_000_009), file=b"second"))
    assert stored(partial(keep_picture, id="job_1", picture=picture(1, 1_000_004), file=b"other"))
    of = partial(picture_file, id="job_1", index=0, now=0.0)
    assert stored(partial(of, tenant="alice")) == ("image/png", b"\x00first")
    assert stored(partial(of, tenant="bob")) is None
    assert stored(unfinished_jobs)[0].pictures == (picture(), picture(1, 1_000_004))


def test_a_key_is_its_tenants_and_expires_with_the_job(stored):
    stored(partial(insert_job, job=job(idempotency_key="k")))
    stored(partial(insert_job, job=job("job_2", "bob", idempotency_key="k")))
    of = partial(find_job_of_key, key="k", now=210.0)
    assert stored(partial(of, tenant="alice")).id == "job_1"
    assert stored(partial(of, tenant="bob")).id == "job_2"
    assert stored(end())
    assert stored(partial(of, tenant="alice")).id == "job_1"
    assert stored(partial(of, tenant="alice", now=251.0)) is None
    # Not swept yet, and no longer in the way.
    stored(partial(insert_job, job=job("job_3", created=251.0, idempotency_key="k")))
    assert stored(partial(of, tenant="alice", now=252.0)).id == "job_3"


def test_what_has_expired_is_gone_before_the_sweep_and_after(stored):
    for i in range(1, 4):
        stored(partial(insert_job, job=job(f"job_{i}")))
        stored(partial(keep_picture, id=f"job_{i}", picture=picture(), file=b"x"))
    message = Webhook("msg_1", "job_1", "alice", "https://a.example/", "a.example", "{}", 200.0)
    assert stored(end(message=message))
    assert stored(end(id="job_2"))
    assert stored(partial(find_job, tenant="alice", id="job_1", now=251.0)) is None
    assert stored(partial(picture_file, tenant="alice", id="job_1", index=0, now=251.0)) is None
    assert stored(partial(sweep, now=249.0, limit=10)) == 0
    assert stored(partial(sweep, now=251.0, limit=1)) == 1
    assert stored(partial(sweep, now=251.0, limit=10)) == 1
    assert stored(partial(next_webhook, now=1e9, not_these=[], not_hosts=[])) is None
    assert [j.id for j in stored(unfinished_jobs)] == ["job_3"]
    assert stored(lambda c: c.execute(text("SELECT count(*) FROM pictures")).scalar_one()) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 5), st.booleans())
def test_pages_tell_each_job_once_in_order(tmp_path_factory, times, limit, newest_first):
    store = open_store(tmp_path_factory.mktemp("pages") / "jobs.db")
    try:
        for i, time in enumerate(times):
            asyncio.run(store.write(partial(insert_job, job=job(f"job_{i:02}", created=float(time)))))
        asyncio.run(store.write(partial(insert_job, job=job("job_99", "bob", created=2.0))))
        told, after = [], None
        while True:
            look = partial(list_jobs, tenant="alice", now=0.0, limit=limit, after=after, newest_first=newest_first)
            page = asyncio.run(store.read(look))
            told += [(j.created, j.id) for j in page]
            if len(page) < limit:
                break
            after = page[-1]
    finally:
        asyncio.run(store.close())
    assert told == sorted(((float(t), f"job_{i:02}") for i, t in enumerate(times)), reverse=newest_first)


def test_the_outbox_holds_a_message_until_it_is_delivered(stored):
    stored(partial(insert_job, job=job()))
    message = Webhook("msg_1", "job_1", "alice", "https://a.example/x", "a.example", ODD.replace("\0", ""), 200.0)
    assert stored(end(message=message))
    nothing = dict(not_these=[], not_hosts=[])
    assert stored(partial(next_due, **nothing)) == 200.0
    assert stored(partial(next_webhook, now=199.0, **nothing)) is None
    assert stored(partial(next_webhook, now=200.0, **nothing)) == message
    assert stored(partial(next_webhook, now=200.0, not_these=["msg_1"], not_hosts=[])) is None
    assert stored(partial(next_webhook, now=200.0, not_these=[], not_hosts=["a.example"])) is None
    stored(partial(note_delivery, id="msg_1", status="pending", due=300.0, error="answered 500"))
    assert stored(partial(next_webhook, now=299.0, **nothing)) is None
    assert stored(partial(next_webhook, now=300.0, **nothing)).attempts == 1
    stored(partial(note_delivery, id="msg_1", status="delivered", due=300.0, error=None))
    assert stored(partial(next_webhook, now=1e9, **nothing)) is None
    assert stored(partial(webhook_of_job, id="job_1")) == ("delivered", 2, None)


def test_a_fact_stays(stored):
    assert stored(partial(fact, name="webhook_secret", otherwise="a")) == "a"
    assert stored(partial(fact, name="webhook_secret", otherwise="b")) == "a"


def test_a_write_that_fails_leaves_nothing(stored):
    def half(connection):
        insert_job(connection, job())
        raise RuntimeError("between two statements")

    with pytest.raises(RuntimeError):
        stored(half)
    assert stored(unfinished_jobs) == []


def test_a_store_has_one_owner(where, monkeypatch):
    monkeypatch.setattr("smalti.serving.store._OWNER_SECONDS", 1.0)
    store = open_store(where)
    with pytest.raises(UserError, match="used by another server"):
        open_store(where)
    asyncio.run(store.close())
    asyncio.run(open_store(where).close())


def test_a_newer_schema_is_refused_by_name(where):
    asyncio.run(open_store(where).close())
    engine = create_engine(
        where.replace("postgresql", "postgresql+psycopg") if where.startswith("p") else f"sqlite:///{where}"
    )
    with engine.begin() as connection:
        connection.execute(text("UPDATE smalti_facts SET value = '9' WHERE name = 'schema'"))
    engine.dispose()
    with pytest.raises(UserError, match=r"has schema 9, this smalti knows 1"):
        open_store(where)


def test_urls_that_are_no_store_are_refused(tmp_path):
    for url in ("mysql://u:secret@h/d", "postgresql+nothing://h/d", "sqlite://", "://"):
        with pytest.raises(UserError, match="must") as refused:
            open_store(url)
        assert "secret" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(tmp_path / "no" / "folder" / "jobs.db")
    (tmp_path / "text.db").write_text("not a database, and long enough to be read as one" * 20)
    with pytest.raises(UserError, match="not a database"):
        open_store(tmp_path / "text.db")
    # No server there.
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(f"postgresql://u:secret@/d?host={tmp_path}")


def test_the_files_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        store = open_store(tmp_path / "jobs.db")
        asyncio.run(store.write(partial(insert_job, job=job())))
        assert {p.name for p in tmp_path.iterdir()} >= {"jobs.db", "jobs.db-wal", "jobs.db.lock"}
        assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
        asyncio.run(store.close())
    finally:
        os.umask(before)


def test_a_commit_is_on_the_disk(tmp_path):
    store = open_store(tmp_path / "jobs.db")
    asked = {}

    def look(connection):
        for name in ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum"):
            asked[name] = connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    asyncio.run(store.read(look))
    asyncio.run(store.close())
    assert asked == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "auto_vacuum": 2}


def test_the_loop_goes_on_while_the_disk_is_waited_for(tmp_path):
    async def turns_of_the_loop():
        import time

        store = open_store(tmp_path / "jobs.db")
        slow = asyncio.create_task(store.write(lambda c: time.sleep(0.3)))
        turns = 0
        while not slow.done():
            await asyncio.sleep(0.01)
            turns += 1
        # A reader does not wait for the writer either.
        slow = asyncio.create_task(store.write(lambda c: time.sleep(0.3)))
        await asyncio.sleep(0.05)
        await store.read(unfinished_jobs)
        assert not slow.done()
        await store.close()
        return turns

    assert asyncio.run(turns_of_the_loop()) > 10


LIMITED = """
    import asyncio, resource, sys
    from functools import partial
    from server.test_job_store import job, picture, end
    from smalti.serving.store import open_store, StorageFull
    from smalti.serving.store_tables import *
    store = open_store(sys.argv[1])
    write = lambda operation: asyncio.run(store.write(operation))
    write(partial(insert_job, job=job()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    try:
        for i in range(2, 100):
            write(partial(insert_job, job=job(f"job_{i}", request={"prompt": "x" * 50_000})))
        print("no limit")
    except StorageFull as error:
        print("full", error.code, error.retry_after > 0)
    print(len(write(unfinished_jobs)) == i - 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(write(end()), write(partial(keep_picture, id="job_2", picture=picture(), file=b"x" * 100_000)))
"""


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    program = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "jobs.db")]
    done = subprocess.run(program, capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.stdout.split("\n") == ["full storage_full True", "True", "True True", ""], done.stderr


def _environment():
    from pathlib import Path

    import smalti

    paths = [str(Path(__file__).parent.parent), str(Path(smalti.__file__).parent.parent)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_a_database_that_is_gone_is_told_as_such(databases):
    url = databases()
    store = open_store(url)
    asyncio.run(store.write(partial(insert_job, job=job())))

    def leave(connection):
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(StorageDown):
        asyncio.run(store.write(leave))
    # The next one has a connection of its own again.
    assert len(asyncio.run(store.write(unfinished_jobs))) == 1
    assert not issubclass(StorageDown, StorageFull)
    asyncio.run(store.close())
