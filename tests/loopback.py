"""hivemind's way to other peers, without a daemon: real sockets of this process, and servers that tests write."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from hivemind.p2p import P2PHandlerError, PeerID

from swarm.errors import SwarmError
from swarm.wire.error_text import to_wire
from swarm.wire.stream import MessageStream

Serve = Callable[[PeerID, MessageStream], Awaitable[None]]
Answer = Callable[[PeerID, Any], Awaitable[Any]]


class LoopbackP2P:
    """Calls go to ``streams`` and ``answers``, by the name of the RPC. Peers in ``unreachable`` can't be reached."""

    def __init__(self, streams: dict[str, Serve] | None = None, answers: dict[str, Answer] | None = None) -> None:
        self.streams, self.answers = streams or {}, answers or {}
        self.unreachable: set[PeerID] = set()
        self.opened = self.restarts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def call_binary_stream_handler(
        self, peer_id: PeerID, name: str
    ) -> tuple[None, asyncio.StreamReader, asyncio.StreamWriter]:
        if peer_id in self.unreachable or name not in self.streams:
            raise OSError("no good addresses")
        self.opened += 1
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        task = asyncio.create_task(self._serve(peer_id, name, theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None, reader, writer

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, request: Any, kind: Any) -> Any:
        if peer_id in self.unreachable or name not in self.answers:
            raise OSError("no good addresses")
        try:
            return await self.answers[name](peer_id, request)
        except SwarmError as error:
            raise P2PHandlerError(to_wire(error)) from None

    async def _serve(self, peer_id: PeerID, name: str, theirs: socket.socket) -> None:
        stream = MessageStream(*await asyncio.open_connection(sock=theirs), max_bytes=2**24)
        try:
            with suppress(asyncio.CancelledError):
                await self.streams[name](peer_id, stream)
        except SwarmError as error:
            await stream.send_error(error)
        finally:
            stream.close()
