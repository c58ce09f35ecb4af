"""Run as a program: fill a cache, with real processes that are really killed. Imports once, then forks.

cache_rounds.py kills FOLDER COUNT   fill COUNT entries, SIGKILL at points and at times; a JSON line for each round
cache_rounds.py race FOLDER COUNT    two processes fill the same folder at the same time; a JSON line
cache_rounds.py orphans FOLDER COUNT kill a process whose workers encode (Linux); a JSON line
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

import smalti.data.cache
import smalti.data.durable
from smalti.data.cache import Cache
from smalti.data.filling import fill_cache

SHARD_ENTRIES = 5


def entry_of(number: int) -> dict[str, torch.Tensor]:
    """What the encoder makes of a number: its truth."""
    return {"moments": torch.arange(64, dtype=torch.float32).reshape(4, 4, 4) * number}


def keys_of(count: int) -> dict[str, int]:
    return {f"{number:064d}": number for number in range(count)}


def fill(folder: Path, count: int, log: Path, seconds: float) -> None:
    """Fill with an encoder that takes its time and writes a line to log for each number it encodes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def encode(numbers):
        for number in numbers:
            time.sleep(seconds)
            os.write(file, f"{number}\n".encode())
        return [entry_of(number) for number in numbers]

    size = SHARD_ENTRIES * entry_of(0)["moments"].nbytes
    fill_cache(folder, keys_of(count), lambda: encode, batch_size=1, shard_bytes=size)


def forked(work) -> int:
    """Start work in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kill_at(point: str, shards: int):
    """Make this process kill itself at a point of writing the shard after `shards` whole ones."""
    written = 0

    def dying(real, moment):
        def call(*arguments):
            nonlocal written
            if moment == "before" and written == shards:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if moment == "after" and written == shards:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    if point in ("before", "after"):  # before or after the file gets its name
        real = smalti.data.durable.publish
        call = dying(real, point)

        def publish(partial, target):
            nonlocal written
            call(partial, target)
            written += 1

        smalti.data.cache.publish = publish
    else:  # half of the file is written
        real_save = smalti.data.cache.save_file

        def save(tensors, path, metadata):
            nonlocal written
            real_save(tensors, path, metadata=metadata)
            if written == shards:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            written += 1

        smalti.data.cache.save_file = save


def lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def kills(folder: Path, count: int) -> None:
    """Rounds of killing; each says how many entries were encoded in it and how many of them the cache has."""
    generator, log = random.Random(0), folder / "log"
    plan = [("before", 2), ("half", 1), ("after", 3), *[("time", 0)] * 4]
    cache_folder = folder / "cache"
    for point, shards in plan:
        had, encoded = len(Cache(cache_folder)), lines(log)

        def work(point=point, shards=shards):
            if point != "time":
                kill_at(point, shards)
            fill(cache_folder, count, log, 0.001 if point == "time" else 0.0)

        pid = forked(work)
        if point == "time":
            time.sleep(generator.uniform(0.01, 0.05))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        cache = Cache(cache_folder)
        assert not cache.damaged_shards
        assert all(
            torch.equal(cache.read(k)["moments"], entry_of(n)["moments"])
            for k, n in keys_of(count).items()
            if k in cache
        )
        row = {"point": point, "killed": os.WIFSIGNALED(status), "had": had, "encoded": lines(log) - encoded}
        print(json.dumps(row | {"has": len(cache), "leftover": len(list(cache_folder.glob(".partial*")))}), flush=True)
    had, encoded = len(Cache(cache_folder)), lines(log)
    os.waitpid(forked(lambda: fill(cache_folder, count, log, 0.0)), 0)
    cache = Cache(cache_folder)
    whole = all(torch.equal(cache.read(k)["moments"], entry_of(n)["moments"]) for k, n in keys_of(count).items())
    row = {"point": "end", "had": had, "encoded": lines(log) - encoded, "whole": whole}
    print(json.dumps(row | {"leftover": len(list(cache_folder.glob(".partial*")))}))


def race(folder: Path, count: int) -> None:
    """Two processes at once; says how often anything was encoded, and whether all of it is right."""
    log = folder / "log"
    pids = [forked(lambda: fill(folder / "cache", count, log, 0.002)) for _ in range(2)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    cache = Cache(folder / "cache")
    whole = all(torch.equal(cache.read(k)["moments"], entry_of(n)["moments"]) for k, n in keys_of(count).items())
    print(json.dumps({"codes": codes, "encoded": lines(log), "whole": whole}))


def slow_encode(log: Path, numbers):
    """Encode by another process: leaves its id in log, and takes its time."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return [entry_of(number) for number in numbers]


def make_slow_encode(log: Path):
    return partial(slow_encode, log)


def orphans(folder: Path, count: int) -> None:
    """Kill a process whose workers encode; says how many workers there were and how many there are a little later."""
    log, make = folder / "log", partial(make_slow_encode, folder / "log")
    pid = forked(lambda: fill_cache(folder / "cache", keys_of(count), make, jobs=2, batch_size=1))
    while len(set(log.read_text().split()) if log.exists() else ()) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers = set(log.read_text().split())
    deadline = time.monotonic() + 20
    while (left := [w for w in workers if Path("/proc", w).exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    print(json.dumps({"workers": len(workers), "left": len(left)}))


if __name__ == "__main__":
    torch.set_num_threads(1)  # before any fork: no threads to lose
    {"kills": kills, "race": race, "orphans": orphans}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
