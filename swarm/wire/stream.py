"""Protobuf messages over a libp2p stream, in hivemind's framing: a marker byte, eight bytes of length, the message.

hivemind's own reader takes any length it is told and starts three tasks a message. This one knows a limit, gets memory
for large messages before it reads them, and starts none; it is the same on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.proto.p2pd_pb2 import RPCError

from ..errors import MalformedError, PeerLostError
from .error_text import from_wire, to_wire

_MESSAGE, _ERROR = b"\x00", b"\x01"
_LENGTH_BYTES = 8
_MAX_ERROR_BYTES = 2**16
_MAX_UNSENT_BYTES = 2**20
_LINGER_SECONDS, _LINGER_BYTES = 0.5, 2**22
_SMALL_BYTES = 2**16  # messages that need no room: there are few in one stream
_STUCK_SECONDS = 30.0
_SLOWEST = 2**15  # bytes a second

M = TypeVar("M", bound=Message)


class Memory(Protocol):
    """Where a stream gets memory for messages."""

    async def take(self, size: int) -> None:
        """Takes so many bytes when they are there.

        Raises:
            SwarmError: they aren't, for long.
        """

    def give_back(self, size: int) -> None:
        """Gives them back."""


class MessageStream:
    """One side of a stream. ``max_bytes`` limits what is received, one message at a time; ``memory``, if there is one,
    what all that are there have together."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        max_bytes: int,
        memory: Memory | None = None,
    ) -> None:
        self._reader, self._writer, self._max_bytes, self._memory = reader, writer, max_bytes, memory
        self._held = 0  # bytes of the message that was received last
        self._receiving = self._sending = math.inf  # when it is to be done at the latest

    async def send(self, message: Message) -> None:
        """Sends a message.

        Raises:
            PeerLostError: the stream is closed.
        """
        await self._write(_MESSAGE, message)

    def send_now(self, message: Message) -> bool:
        """Sends a message at once, without waiting; False if too much waits to be sent already.

        Raises:
            PeerLostError: the stream is closed.
        """
        if self._writer.is_closing():
            raise PeerLostError("the stream is closed")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            return False
        self._put(_MESSAGE, message)
        return True

    async def send_error(self, error: BaseException) -> None:
        """Sends an error, the last message of a stream. Never fails: the peer may be gone."""
        with contextlib.suppress(PeerLostError):
            await self._write(_ERROR, RPCError(message=to_wire(error)))

    async def linger(self) -> None:
        """Reads on for a moment without looking, so that the peer gets what was sent last before the stream closes.

        To close a socket with data unread would throw away what the other side has not read yet.
        """
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self._discard(), _LINGER_SECONDS)

    async def _discard(self) -> None:
        left = _LINGER_BYTES
        while left > 0 and (data := await self._reader.read(2**16)):
            left -= len(data)

    async def send_end(self) -> None:
        """Says that no more messages come from this side."""
        await self._write(_ERROR, RPCError())

    async def receive(self, kind: type[M]) -> M | None:
        """The next message, or ``None`` after the peer's last one.

        Raises:
            SwarmError: what the peer sent as an error.
            MalformedError: a message that is too large or malformed. The stream can't be used any longer.
            PeerLostError: the stream broke.
        """
        self.claim()()
        try:
            head = await self._reader.readexactly(1 + _LENGTH_BYTES)
            marker, length = head[:1], int.from_bytes(head[1:], "big")
            if length > (self._max_bytes if marker == _MESSAGE else _MAX_ERROR_BYTES):
                raise MalformedError(f"a message of {length} bytes is too large: the limit is {self._max_bytes}")
            if self._memory is not None and length > _SMALL_BYTES:
                await self._memory.take(length)
                self._held = length
            self._receiving = _until(length)
            data = await self._reader.readexactly(length)
        except BaseException as error:
            self.claim()()
            if isinstance(error, asyncio.IncompleteReadError | OSError):
                raise PeerLostError("the stream ended") from error
            raise
        finally:
            self._receiving = math.inf
        try:
            if marker == _MESSAGE:
                return kind.FromString(data)
            if marker == _ERROR:
                text = RPCError.FromString(data).message
                if not text:
                    return None
                raise from_wire(text)
        except DecodeError as error:
            raise MalformedError(f"a message that is no {kind.__name__}") from error
        raise MalformedError(f"a message with the unknown marker {marker.hex()}")

    def claim(self) -> Callable[[], None]:
        """Keeps the message that was received last, whose memory the stream would give back when it is asked for the
        next one: call what this returns when it is no longer needed. To call it again does nothing."""
        memory, left, self._held = self._memory, [self._held] if self._held else [], 0
        if memory is None or not left:
            return _nothing

        def let_go() -> None:
            if left:
                memory.give_back(left.pop())

        return let_go

    def is_stuck(self) -> bool:
        """Whether the peer has begun a message and doesn't go on with it, or doesn't take one."""
        return min(self._receiving, self._sending) < asyncio.get_running_loop().time()

    def close(self) -> None:
        """Closes both directions at once; what was sent still goes out."""
        self.claim()()
        self._writer.close()

    def abort(self) -> None:
        """Closes both directions, and throws away what the peer hasn't taken."""
        self.claim()()
        self._writer.transport.abort()

    async def _write(self, marker: bytes, message: Message) -> None:
        try:
            size = self._put(marker, message)
            self._sending = _until(size)
            await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise PeerLostError("the stream is closed") from error
        finally:
            self._sending = math.inf

    def _put(self, marker: bytes, message: Message) -> int:
        data = message.SerializeToString()
        self._writer.writelines((marker, len(data).to_bytes(_LENGTH_BYTES, "big"), data))
        return len(data)


def _until(size: int) -> float:
    return asyncio.get_running_loop().time() + _STUCK_SECONDS + size / _SLOWEST


def _nothing() -> None:
    pass
