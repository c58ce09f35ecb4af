"""The job store's connection: SQLite beside the server, or PostgreSQL by URL, through SQLAlchemy's Core.

Writes go one after the other through a thread of their own and reads through two others, so that the event loop never
waits for a disk. One server at a time owns a store: what it finds unfinished at its start is its own to finish.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from smalti.errors import UserError
from smalti.serving.service import Unavailable
from smalti.serving.store_tables import SCHEMA_VERSION, facts, tables

Result = TypeVar("Result")
Operation = Callable[[Connection], Result]

_BUSY_SECONDS = 10.0
_OWNER_SECONDS = 5.0  # a killed server's lock is gone at once; a stopping one's soon
_OWNER_LOCK = 0x536D616C7469  # "Smalti"
_DISK_FULL_STATES = ("53100", "53000")  # PostgreSQL: disk_full, insufficient_resources


class StorageFull(Unavailable):
    """The disk of the job store has no room."""

    code = "storage_full"


class StorageDown(Unavailable):
    """The job store does not answer, or not as it should."""

    code = "storage_unavailable"


class Store:
    """An open job store. Made by open_store."""

    def __init__(self, engine: Engine, release: Callable[[], None]) -> None:
        self._engine, self._release = engine, release
        self._writer = ThreadPoolExecutor(1, "job-store-write")
        self._readers = ThreadPoolExecutor(2, "job-store-read")

    async def write(self, operation: Operation[Result]) -> Result:
        """Run an operation in a transaction of its own; it has been made durable when this returns.

        An operation that has begun goes on when the caller is cancelled. Raises StorageFull, StorageDown.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._transact, operation)

    async def read(self, operation: Operation[Result]) -> Result:
        """Run an operation that only reads. Raises StorageDown."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._look, operation)

    def _transact(self, operation: Operation[Result]) -> Result:
        try:
            with self._engine.begin() as connection:
                return operation(connection)
        except IntegrityError:
            raise
        except (DBAPIError, PoolTimeout) as error:
            raise _unavailable(error) from error

    def _look(self, operation: Operation[Result]) -> Result:
        try:
            with self._engine.connect().execution_options(smalti_reads=True) as connection:
                return operation(connection)
        except (DBAPIError, PoolTimeout) as error:
            raise _unavailable(error) from error

    async def close(self) -> None:
        """Wait for what is being written, then let go of the store."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        self._engine.dispose()
        self._release()


def open_store(where: str | Path) -> Store:
    """Open a store, made where there is none: a file's path, or a URL as postgresql://user@host/database.

    Raises UserError for a store that cannot be opened, that another server uses or that a newer smalti wrote.
    """
    url = _url(where)
    name = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        return _open(_sqlite_engine(url, name), name, _own_file(url, name))
    engine = create_engine(url, pool_size=4, max_overflow=0, pool_timeout=10, pool_pre_ping=True)
    return _open(engine, name, _own_database(engine, name))


def _open(engine: Engine, name: str, release: Callable[[], None]) -> Store:
    try:
        with engine.begin() as connection:
            _set_up(connection, name)
    except BaseException as error:
        engine.dispose()
        release()
        if isinstance(error, DatabaseError):
            raise UserError(f"job store {name} cannot be opened: {_reason(error)}") from error
        raise
    return Store(engine, release)


def _url(where: str | Path) -> URL:
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(where))
    try:
        url = make_url(where)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        url = None
    if url is None or url.get_backend_name() not in ("sqlite", "postgresql"):
        # The text may hold a password: it is not repeated.
        raise UserError("job store: the URL must be sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    if url.get_backend_name() == "sqlite" and not url.database:
        raise UserError("job store: sqlite:///FILE must name a file")
    return url


def _sqlite_engine(url: URL, name: str) -> Engine:
    # Prompts and pictures are their owner's: the file, and with it SQLite's two others, are not for other users.
    try:
        os.close(os.open(str(url.database), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(str(url.database), timeout=_BUSY_SECONDS)) as connection:
            # These stay with the file. Each connection that set them again would wait for the one that writes.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # swept pictures give their room back to the disk
            connection.execute("PRAGMA journal_mode = WAL")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"job store {name} cannot be opened: {error}") from None
    engine = create_engine(url, pool_size=4, max_overflow=0, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # begin is ours to send, below
        # FULL: an answer of 202 promises the job, also when the power fails right after it. NORMAL would lose the last
        # commits then; the price is one fsync a commit, 3.6 ms on the disk this was written on.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_size_limit = 16777216")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads = connection.get_execution_options().get("smalti_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _own_file(url: URL, name: str) -> Callable[[], None]:
    lock = FileLock(f"{url.database}.lock", mode=0o600, thread_local=False)  # close has a thread of its own
    try:
        lock.acquire(timeout=_OWNER_SECONDS)
    except Timeout:
        raise _owned(name) from None
    return lock.release


def _own_database(engine: Engine, name: str) -> Callable[[], None]:
    connection: Connection | None = None
    try:
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text(f"SET lock_timeout = '{int(_OWNER_SECONDS)}s'"))
        connection.execute(text(f"SELECT pg_advisory_lock({_OWNER_LOCK})"))
    except DBAPIError as error:
        if connection is not None:
            connection.close()
        engine.dispose()
        if getattr(error.orig, "sqlstate", None) == "55P03":  # lock_not_available
            raise _owned(name) from None
        raise UserError(f"job store {name} cannot be opened: {_reason(error)}") from error
    held = connection

    def release() -> None:
        with suppress(DBAPIError):
            held.invalidate()  # closes the session, and the lock with it
            held.close()

    return release


def _owned(name: str) -> UserError:
    return UserError(f"job store {name} is used by another server: stop that one, or give this one another store")


def _set_up(connection: Connection, name: str) -> None:
    if not inspect(connection).has_table(facts.name):
        tables.create_all(connection)
        connection.execute(insert(facts).values(name="schema", value=str(SCHEMA_VERSION)))
        return
    found = int(connection.execute(select(facts.c.value).where(facts.c.name == "schema")).scalar_one())
    if found > SCHEMA_VERSION:
        raise UserError(
            f"job store {name} has schema {found}, this smalti knows {SCHEMA_VERSION}: use the smalti that wrote it"
        )
    # A step from each older schema to the next goes here, when there is one.
    assert found == SCHEMA_VERSION, found


def _unavailable(error: DBAPIError | PoolTimeout) -> Unavailable:
    cause: Any = getattr(error, "orig", None)
    full = (
        getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL"
        or getattr(cause, "sqlstate", None) in _DISK_FULL_STATES
        # A write beyond a limit on the file's size: another errno than a full disk's, the same to us.
        or getattr(cause, "sqlite_errorname", "") == "SQLITE_IOERR_WRITE"
    )
    if full:
        return StorageFull("the disk of the job store is full", 30.0)
    return StorageDown(f"the job store does not answer ({type(cause or error).__name__})", 5.0)


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
