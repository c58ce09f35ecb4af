"""A PostgreSQL server of the tests' own, on a unix socket in a temporary folder."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def find_binaries() -> Path | None:
    """The folder of postgres and initdb, or None."""
    places = [Path(found).parent for name in ("initdb",) if (found := shutil.which(name))]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in places if (p / "postgres").exists() and (p / "initdb").exists()), None)


def as_other_user() -> list[str] | None:
    """What to put before a command so that root does not run it, which PostgreSQL refuses; None where impossible."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        return None
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@contextlib.contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """The URL of a running server without a database of its own: add /NAME, or use /postgres."""
    user = as_other_user()
    assert user is not None
    # Not below pytest's folder, which is for its owner only; and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="smalti-pg-", dir="/tmp"))
    try:
        if user:
            os.chown(folder, 65534, 65534)
        data = folder / "data"
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
        subprocess.run(
            [*user, binaries / "initdb", "-D", data, "-U", "smalti", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            env=environment,
            cwd=folder,
        )
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [*user, binaries / "postgres", "-D", data, *options],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
            )
        try:
            _wait(folder, server)
            yield f"postgresql://smalti@/{{database}}?host={folder}"
        finally:
            server.terminate()  # which waits for clients: a store that left a connection behind shows here
            server.wait(20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, server: subprocess.Popen) -> None:
    import time

    import psycopg

    for _ in range(200):
        try:
            psycopg.connect(host=str(folder), user="smalti", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())


def make_database(url: str, name: str) -> str:
    """The URL of a new, empty database."""
    import psycopg

    with psycopg.connect(url.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return url.format(database=name)
