"""Messages over a socket: a length of four bytes, then MessagePack. One end blocks (a worker), one is asyncio's."""

import asyncio
import select
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

import msgspec

_LENGTH = struct.Struct("<I")
_READ = 1 << 16

Received = TypeVar("Received")


def framed(messages: Sequence[msgspec.Struct]) -> bytes:
    """Messages as they go over the wire."""
    bodies = [msgspec.msgpack.encode(message) for message in messages]
    return b"".join(_LENGTH.pack(len(body)) + body for body in bodies)


class BlockingChannel(Generic[Received]):
    """A worker's end. Raises ConnectionError when the other end is gone."""

    def __init__(self, connection: socket.socket, received: object) -> None:
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._buffer = bytearray()
        self._outgoing: list[msgspec.Struct] = []

    def queue(self, message: msgspec.Struct) -> None:
        """Keep a message for the next flush."""
        self._outgoing.append(message)

    def flush(self) -> None:
        """Send what is queued."""
        messages, self._outgoing = self._outgoing, []
        self._socket.sendall(framed(messages))

    def receive(self, timeout: float) -> list[Received]:
        """The messages that are there, after waiting for the first of them up to timeout seconds."""
        while select.select([self._socket], [], [], timeout)[0]:
            part = self._socket.recv(_READ)
            if not part:
                raise ConnectionError("the parent has closed the connection")
            self._buffer += part
            timeout = 0.0
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _next(self) -> Received | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        message = self._decoder.decode(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return message


async def received(reader: asyncio.StreamReader, kind: object) -> AsyncIterator[msgspec.Struct]:
    """The messages of a stream, until it ends, wherever it ends."""
    decoder: msgspec.msgpack.Decoder[msgspec.Struct] = msgspec.msgpack.Decoder(kind)
    while True:
        try:
            length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        yield decoder.decode(body)
