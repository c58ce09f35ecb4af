"""Watching the other ranks, so that a run never hangs: it ends with a line that names who is gone or stuck, and where.

Each rank publishes a sign of life once a second through a store that all ranks reach, and reads the others'. Who keeps
the rest waiting follows from the process group's sequence number: how many collectives a rank has entered.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

LONG = 20  # times hang_seconds: compiling, downloading, waiting for a disk; and computing without a sign of progress
_COMPUTING = 0.05  # CPU seconds a second above which a rank that says nothing is computing
_SAVING_SECONDS = 20.0  # for a checkpoint under way when the run ends with an error
_LEAVING_SECONDS = 5.0  # in which a rank may find out by itself why another one left
_READING_SECONDS = 1.5  # in which the others read the verdict, in a store that may be a part of this process


class RankLost(RuntimeError):
    """Another rank is gone or stuck; the message names it and what waits for it. told: whether it was already said."""

    told = False


class Progress:
    """What this rank's main thread is doing, and since when it has not moved on."""

    def __init__(self) -> None:
        self.activity, self.long = "starting", False
        self.tick()

    def doing(self, activity: str, long: bool = False) -> None:
        """An activity begins; a long one may be quiet for longer."""
        self.activity, self.long = activity, long
        self.tick()

    def tick(self) -> None:
        """The activity goes on."""
        self.since, self.cpu_then = time.monotonic(), time.process_time()


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life.

    place: of processes that see each other's ids. beat: grows with every sign. entered: collectives so far. still: the
    seconds since it last moved on, computed: CPU seconds of them. left: how its part ended, None while it runs.
    """

    pid: int
    host: str
    place: str
    beat: int
    entered: int
    activity: str
    long: bool
    still: float
    computed: float
    left: str | None = None


@dataclass(frozen=True)
class Seen:
    """What another rank is known by: its last sign, seconds since that came (silent), and whether its process lives."""

    rank: int
    sign: Sign
    silent: float
    alive: bool = True

    @property
    def name(self) -> str:
        """For a message."""
        return f"rank {self.rank} (process {self.sign.pid} on {self.sign.host})"


@dataclass(frozen=True)
class Verdict:
    """That the run cannot go on: because of which rank, in one line."""

    rank: int
    text: str


def judge(everyone: Sequence[Seen], hang_seconds: float, broken: bool = False) -> Verdict | None:
    """Whether a rank is gone, silent or stuck while others wait for it; None where the run can go on.

    broken: a collective has failed already, so that a rank that left or is silent for seconds is why.
    """
    furthest = max(seen.sign.entered for seen in everyone)
    for seen in everyone:
        sign, name, others = seen.sign, seen.name, _waiting(everyone, seen)
        if sign.left is not None:
            if broken or (sign.entered < furthest and seen.silent > _LEAVING_SECONDS):
                return Verdict(seen.rank, f"{name} ended: {sign.left}{others}")
        elif not seen.alive:
            text = f'{name} is gone (killed, or out of memory), last seen in "{sign.activity}"{others}'
            return Verdict(seen.rank, text)
        elif seen.silent > (_LEAVING_SECONDS if broken else hang_seconds):
            silent = f"has given no sign of life for {seen.silent:.0f} s (stopped, or its machine is lost)"
            return Verdict(seen.rank, f'{name} {silent}, last seen in "{sign.activity}"{others}')
        elif sign.entered < furthest and _stuck(sign, hang_seconds):
            return Verdict(seen.rank, f'{name} hangs: for {sign.still:.0f} s it has been in "{sign.activity}"{others}')
    if all(_stuck(replace(seen.sign, long=True), hang_seconds) for seen in everyone):
        quiet = max(everyone, key=lambda seen: seen.sign.still)
        text = f'no rank moves on: {quiet.name} has been in "{quiet.sign.activity}" for {quiet.sign.still:.0f} s'
        return Verdict(quiet.rank, text)
    return None


def _stuck(sign: Sign, hang_seconds: float) -> bool:
    if sign.left is not None:
        return False
    computing = sign.computed > _COMPUTING * sign.still
    return sign.still > hang_seconds * (LONG if sign.long or computing else 1)


def _waiting(everyone: Sequence[Seen], culprit: Seen) -> str:
    waiting = [s for s in everyone if s.rank != culprit.rank and s.alive and s.sign.entered >= culprit.sign.entered]
    if not waiting:
        return ""
    furthest = max(waiting, key=lambda seen: seen.sign.entered)
    listed = ", ".join(str(seen.rank) for seen in waiting[:8]) + (" ..." if len(waiting) > 8 else "")
    return f'; rank {listed} waited for it in "{furthest.sign.activity}"'


def process_place() -> str:
    """The same text in two processes that see each other by process id."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_lives(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return not os.path.isdir("/proc/self")


class Watch:
    """Threads that publish this rank's sign and judge the others'.

    store: a connection of its own to a torch.distributed store, under a prefix of its own. entered(): how many
    collectives this rank has entered. A verdict that the main thread does not act on within seconds, since a collective
    holds it, ends the process with exit code 1.
    """

    def __init__(
        self, store: Any, rank: int, size: int, progress: Progress, hang_seconds: float, entered: Callable[[], int]
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._progress, self._hang_seconds, self._entered = progress, hang_seconds, entered
        self._host, self._place = socket.gethostname(), process_place()
        self._signs: dict[int, tuple[Sign, float]] = {}  # of each rank, and when it came
        self._verdict: Verdict | None = None
        self._tells = False  # whether this rank is the one of its machine that tells it
        self._beat = self._last_entered = self._rounds_without_store = 0
        self._store_in_use = threading.Lock()
        self._main_acts, self._left = threading.Event(), threading.Event()
        self._period = min(1.0, hang_seconds / 5)

    def start(self) -> None:
        """Begin; entered() must be ready."""
        with suppress(RuntimeError):  # a rank that is lost already is judged as one
            self._publish()
            # A rank is named by its sign, so a run must not get far without everyone's.
            keys = [f"sign/{rank}" for rank in range(self._size)]
            self._store.wait(keys, timedelta(seconds=self._hang_seconds))
        self._look()
        # Two, since the store is on another machine: what waits for it may wait for minutes.
        for act, name in ((self._keep_looking, "watch"), (self._act, "watch of the watch")):
            threading.Thread(target=act, name=name, daemon=True).start()

    def leave(self, how: str) -> None:
        """This rank's part is over; tells the others how it ended."""
        self._left.set()
        if self._store_in_use.acquire(timeout=_LEAVING_SECONDS):
            with suppress(RuntimeError):
                self._publish(left=how)
            self._store_in_use.release()

    def explain(self, error: Exception) -> RankLost:
        """What is to be raised in the place of a collective's error; waits until it is known who is gone."""
        self._main_acts.set()
        deadline = time.monotonic() + self._hang_seconds + _LEAVING_SECONDS
        while (verdict := self._verdict or self._look(broken=True)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if verdict is None:
            first_line = str(error).splitlines()[0]
            text = f'the connection between the ranks broke in "{self._progress.activity}": {first_line}'
            verdict = self._settle(Verdict(self._rank, text))
        lost = RankLost(verdict.text)
        lost.told = not self._tells
        return lost

    def _keep_looking(self) -> None:
        while self._verdict is None and not self._left.wait(self._period):
            self._look()

    def _act(self) -> None:
        while self._verdict is None and not self._left.wait(self._period):
            self._rounds_without_store += 1  # rounds, not seconds: this process may have been stopped for a while
            if self._rounds_without_store * self._period > self._hang_seconds:
                self._settle(self._without_store())
        verdict = self._verdict
        if verdict is None or self._left.is_set():
            return
        if verdict.rank != self._rank and self._main_acts.wait(_LEAVING_SECONDS):
            return
        if self._tells:
            sys.stderr.write(f"smalti: {verdict.text}\n")
        end_process(1)

    def _look(self, broken: bool = False) -> Verdict | None:
        """Publish, read, judge."""
        with self._store_in_use:
            if self._left.is_set():  # this rank's last sign stays the last
                return self._verdict
            # Before reading: a process that ended in order has said so by then.
            ended = {r for r, (s, _) in self._signs.items() if s.place == self._place and not process_lives(s.pid)}
            try:
                self._publish()
                self._read()
                self._rounds_without_store = 0
            except RuntimeError:  # the store is lost; _act() gives it time
                if not ended or not (broken or self._rounds_without_store * self._period > _LEAVING_SECONDS):
                    return self._verdict
            if self._verdict is None:
                verdict = judge(self._seen(ended), self._hang_seconds, broken)
                if verdict is not None:
                    self._settle(verdict)
            return self._verdict

    def _publish(self, left: str | None = None) -> None:
        progress, self._beat = self._progress, self._beat + 1
        entered = self._entered()
        if entered != self._last_entered:
            self._last_entered = entered
            progress.tick()
        still, computed = time.monotonic() - progress.since, time.process_time() - progress.cpu_then
        sign = Sign(
            os.getpid(), self._host, self._place, self._beat, entered, progress.activity, progress.long, still,
            computed, left,
        )  # fmt: skip
        self._signs[self._rank] = sign, time.monotonic()  # known though the store may be lost
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))

    def _read(self) -> None:
        ranks = [rank for rank in range(self._size) if rank in self._signs or self._store.check([f"sign/{rank}"])]
        texts, now = self._store.multi_get([f"sign/{rank}" for rank in ranks]), time.monotonic()
        for rank, text in zip(ranks, texts, strict=True):
            sign = Sign(**json.loads(text))
            if rank not in self._signs or self._signs[rank][0].beat != sign.beat:
                self._signs[rank] = sign, now
        if self._store.check(["verdict"]):
            self._settle(Verdict(**json.loads(self._store.get("verdict"))))

    def _seen(self, ended: Set[int] = frozenset()) -> list[Seen]:
        now = time.monotonic()
        return [Seen(rank, sign, now - came, rank not in ended) for rank, (sign, came) in sorted(self._signs.items())]

    def _settle(self, verdict: Verdict) -> Verdict:
        """The first verdict of any rank, which all act on; one rank of each machine tells it."""
        try:
            agreed = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            verdict = Verdict(**json.loads(agreed))
            self._tells = self._store.add(f"told/{self._place}", 1) == 1
        except RuntimeError:  # the store went with the launcher or with rank 0
            others = [rank for rank, (sign, _) in self._signs.items() if sign.place == self._place and rank]
            self._tells = self._rank == min(others, default=self._rank)
        for seen in self._seen():
            mute = seen.sign.left is None and seen.silent > _LEAVING_SECONDS / 2
            if seen.rank == verdict.rank != self._rank and mute and seen.sign.place == self._place:
                # A stopped process takes no SIGTERM, and whoever started it would wait for it.
                with suppress(OSError):
                    os.kill(seen.sign.pid, signal.SIGKILL)
        self._verdict = verdict
        return verdict

    def _without_store(self) -> Verdict:
        """The store is lost: with the launcher that kept it, or with rank 0."""
        first = next((seen for seen in self._seen() if seen.rank == 0), None)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or self._rank == 0:
            return Verdict(0, "the launcher that started the ranks is gone, or the first machine")
        if first is None:
            return Verdict(0, "rank 0 is gone: it gave no sign of life after the ranks had joined")
        return Verdict(0, f'{first.name} is gone, last seen in "{first.sign.activity}"{_waiting(self._seen(), first)}')


def end_process(code: int) -> None:
    """End without what a normal exit waits for; a checkpoint that is being written gets some seconds."""
    deadline = time.monotonic() + _SAVING_SECONDS
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(max(0.0, deadline - time.monotonic()))
    time.sleep(_READING_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
