"""The parent's end of one worker: starting the process, its socket and shared memory, its heartbeat, its death."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from smalti.serving.channel import framed, received
from smalti.serving.checkpoint_slots import CheckpointSlots, anonymous_memory
from smalti.serving.messages import FromWorker, Ready, Slots, Tick

_SMOOTHING = 0.1


@dataclass
class WorkerProcess:
    """A running worker. Made by `start`; `run` reads it until it is gone.

    slots: checkpoints of what it draws, once its model's card is known. heartbeat: when it last said something.
    """

    number: int
    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader
    memory: int
    slot_count: int
    slots: CheckpointSlots | None = None
    free_slots: list[int] = field(default_factory=list)
    heartbeat: float = field(default_factory=time.monotonic)
    mean_step_seconds: float = 0.0
    last_tick: Tick | None = None
    ready: bool = False

    def send(self, *messages: msgspec.Struct) -> None:
        """Queue messages for it. One that is dying loses them, and with them nothing: `run` ends soon after."""
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.write(framed(messages))

    def kill(self) -> None:
        """End the process at once."""
        # Not through asyncio's send_signal: subprocess polls there, and takes the exit status from asyncio's watcher.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

    async def run(self, tell: Callable[[msgspec.Struct], None]) -> int:
        """Pass on what it says, until it is gone; gives its exit status (negative: the signal that ended it)."""
        async for message in received(self.reader, FromWorker):
            self.heartbeat = time.monotonic()
            if isinstance(message, Ready):
                self.slots = self._grown_slots(message.card.trajectory_bytes)
                self.free_slots = list(range(self.slot_count))
                self.send(Slots(self.slot_count, message.card.trajectory_bytes))
                self.ready = True
            elif isinstance(message, Tick):
                self.last_tick = message
                if message.rows:
                    weight = _SMOOTHING if self.mean_step_seconds else 1.0
                    self.mean_step_seconds += weight * (message.seconds - self.mean_step_seconds)
            tell(message)
        self.ready = False
        self.kill()  # it may have closed its socket and live on
        status = await self.process.wait()
        self.writer.close()
        return status

    def _grown_slots(self, largest: int) -> CheckpointSlots:
        os.ftruncate(self.memory, CheckpointSlots.size_of(self.slot_count, largest))
        return CheckpointSlots(self.memory, self.slot_count, largest)

    def release(self) -> None:
        """Give its shared memory back. To be called when nobody reads its checkpoints any more."""
        if self.slots is not None:
            self.slots.close()
            self.slots = None
        else:
            os.close(self.memory)


async def start_worker(number: int, module: str, model_settings: bytes, slot_count: int) -> WorkerProcess:
    """Start `python -m MODULE JSON`, where the JSON is a worker.WorkerArguments. model_settings: as JSON.

    Raises OSError where the machine has no room for it.
    """
    ours, theirs = socket.socketpair()
    memory = anonymous_memory(1)
    try:
        body = {
            "parent": os.getpid(),
            "number": number,
            "connection": theirs.fileno(),
            "memory": memory,
            "model": msgspec.json.decode(model_settings),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            msgspec.json.encode(body).decode(),
            pass_fds=(theirs.fileno(), memory),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is the parent's alone
        )
    except BaseException:
        ours.close()
        os.close(memory)
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    return WorkerProcess(number, process, writer, reader, memory, slot_count)
