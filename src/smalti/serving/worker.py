"""A worker process: an engine, a socket to the parent, and nothing worth saving. Run by the supervisor.

It dies with its parent (PR_SET_PDEATHSIG, and the end of the socket). It tells of each tick, which is its heartbeat.
"""

import signal
import socket
import sys
from contextlib import suppress

import msgspec

from smalti.child_process import die_with_parent
from smalti.errors import UserError
from smalti.serving.channel import BlockingChannel
from smalti.serving.checkpoint_slots import CheckpointSlots
from smalti.serving.loading import load_engine
from smalti.serving.messages import Cancel, CannotServe, Draw, Ready, Slots, Stop, Tick, ToWorker
from smalti.serving.model_settings import ModelSettings
from smalti.training.memory import keep_freed_memory

_IDLE_SECONDS = 1.0  # between heartbeats of a worker that has nothing to do


class WorkerArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with, as JSON in its one argument: two open file descriptors among it."""

    parent: int
    number: int
    connection: int
    memory: int
    model: ModelSettings


def serve(channel: BlockingChannel[ToWorker], memory: int, settings: ModelSettings, number: int) -> None:
    """Load the model as the worker of that number, then draw until told to stop.

    Raises ConnectionError when the parent is gone.
    """
    try:
        engine = load_engine(settings, channel.queue, number)
    except UserError as error:
        channel.queue(CannotServe(str(error)))
        channel.flush()
        return
    channel.queue(Ready(engine.card))
    channel.flush()
    stopping = False
    while not (stopping and engine.idle):
        for message in channel.receive(_IDLE_SECONDS if engine.idle else 0.0):
            match message:
                case Draw():
                    engine.draw(message)
                case Cancel():
                    engine.cancel(message.number)
                case Slots():
                    engine.slots = CheckpointSlots(memory, message.count, message.largest)
                case Stop():
                    stopping = True
        tick: Tick = engine.tick()
        channel.queue(tick)
        channel.flush()


def main() -> None:
    """Serve as the one argument says."""
    arguments = msgspec.json.decode(sys.argv[1], type=WorkerArguments)
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent drains
    keep_freed_memory()  # each tick asks for the same buffers: faulting their pages in again is a quarter of it
    connection = socket.socket(fileno=arguments.connection)
    with suppress(ConnectionError):
        serve(BlockingChannel(connection, ToWorker), arguments.memory, arguments.model, arguments.number)


if __name__ == "__main__":
    main()
