"""Filling a cache (cache.py): encode what is missing, in several processes if asked, and write it shard by shard."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save

from smalti.data.cache import PARTIAL, Cache, CacheDamage, Entry, MissingEntry, storable, write_shard
from smalti.errors import UserError

Item = TypeVar("Item")
Encode = Callable[[Sequence[Item]], Sequence[Entry]]  # the entry of each item


@dataclass(frozen=True)
class FillReport:
    """What a filling did: entries encoded now, entries that were there, and a line for each damage that was mended."""

    encoded: int
    reused: int
    damages: tuple[str, ...]


def fill_cache(
    folder: Path,
    wanted: Mapping[str, Item],
    make_encode: Callable[[], Encode[Item]],
    *,
    jobs: int = 1,
    batch_size: int = 16,
    shard_bytes: int = 64 * 2**20,
    shard_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    waiting: Callable[[], None] | None = None,
) -> FillReport:
    """Encode what is wanted and is not there or is damaged. Every entry that is there is read and checked.

    wanted: key -> what encode is given for it. make_encode: called once in each process that encodes, and not at all
    where nothing is missing; with jobs > 1 it must pickle. A shard is written when it holds shard_bytes or is
    shard_seconds old, which bounds what a kill can lose. progress(done, total) counts entries that are right;
    waiting() is called when another process is filling the folder, whose end is then awaited. Raises UserError for
    values that are not finite and for a folder that cannot be written, OSError for a full disk.
    """
    if jobs < 1 or batch_size < 1:
        raise UserError(f"jobs={jobs}, batch_size={batch_size}: both must be at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise UserError(f"cannot write to the cache {folder}: {error.strerror}") from None
    report = progress or (lambda done, total: None)
    with _filling(folder, waiting):
        cache = Cache(folder)
        damages = [_set_aside(shard) for shard in cache.damaged_shards]
        (folder / PARTIAL).unlink(missing_ok=True)  # of a process that was killed
        missing: list[str] = []
        reused = 0
        for key in wanted:
            try:
                cache.read(key)
            except MissingEntry:
                missing.append(key)
            except CacheDamage as error:
                missing.append(key)
                damages.append(str(error))
            else:
                reused += 1
                report(reused, len(wanted))
        pending = _PendingShard(folder, shard_bytes, shard_seconds)
        try:
            with closing(_encoded(missing, wanted, make_encode, jobs, batch_size)) as entries:
                for done, (key, entry) in enumerate(entries, reused + 1):
                    _check_finite(entry, wanted[key])
                    pending.add(key, entry)
                    report(done, len(wanted))
        finally:
            pending.write()  # also after Ctrl-C
    return FillReport(len(missing), reused, tuple(damages))


@contextmanager
def _filling(folder: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when its holder dies; waiting() is called if another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _set_aside(shard: Path) -> str:
    """Rename a shard that cannot be read, so that it is reported once; nothing reads it any more."""
    target = shard.with_suffix(".damaged")
    shard.rename(target)
    return f"{shard} cannot be read: set aside as {target.name}, which may be deleted"


def _check_finite(entry: Entry, item: object) -> None:
    for name, tensor in entry.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"the encoder gave {name} that are not finite for {item!r}: its weights may be damaged, or of a "
                "precision that is too low"
            )


@dataclass
class _PendingShard:
    """Entries that are encoded and not yet on the disk."""

    folder: Path
    max_bytes: int
    max_seconds: float
    entries: dict[str, Entry] = field(default_factory=dict)
    num_bytes: int = 0
    since: float = 0.0

    def add(self, key: str, entry: Entry) -> None:
        """Take an entry; write the shard if it is due."""
        if not self.entries:
            self.since = time.monotonic()
        self.entries[key] = entry
        self.num_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self.num_bytes >= self.max_bytes or time.monotonic() - self.since >= self.max_seconds:
            self.write()

    def write(self) -> None:
        """Write what is there as a shard, if anything is."""
        entries, self.entries, self.num_bytes = self.entries, {}, 0
        if entries:
            write_shard(self.folder, entries)


def _encoded(
    keys: Sequence[str],
    wanted: Mapping[str, Item],
    make_encode: Callable[[], Encode[Item]],
    jobs: int,
    batch_size: int,
) -> Generator[tuple[str, Entry]]:
    """(key, entry) of each key, in order."""
    if not keys:
        return
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    items = ([wanted[key] for key in batch] for batch in batches)
    if jobs == 1:
        encode = make_encode()
        for batch, given in zip(batches, items, strict=True):
            yield from zip(batch, encode(given), strict=True)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        min(jobs, len(batches)), multiprocessing.get_context("spawn"), _start_worker, (make_encode, threads)
    )
    try:
        for batch, packed in zip(batches, pool.map(_encode_in_worker, items), strict=True):
            yield from zip(batch, map(load, packed), strict=True)
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that encodes has died, perhaps for want of memory: what was encoded before is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: list[Any] = []  # in a worker process: make_encode, and its result once it was called


def _start_worker(make_encode: Callable[[], Encode[Any]], threads: int) -> None:
    """Set up a process that encodes: Ctrl-C is its parent's to handle, and it does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.append(make_encode)


def _encode_in_worker(items: Sequence[Any]) -> list[bytes]:
    """Entries as safetensors bytes: PyTorch's own way between processes spends a file descriptor a tensor."""
    if len(_worker) == 1:
        _worker.append(_worker[0]())
    return [save(storable(entry)) for entry in _worker[1](items)]
