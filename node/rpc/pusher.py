"""Sends a node's outputs straight to the next hop, over one open stream per peer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import PeerLostError
from swarm.wire.rpc import PUSH, PUSH_STREAM, handle_name
from swarm.wire.stream import MessageStream

from .budget import Turns

_MAX_STREAMS = 256
_MAX_WAITING, _MAX_WAITING_FOR_ONE = 1024, 64


class Pusher:
    """Pushes requests to peers; each peer's arrive in the order in which they were pushed."""

    def __init__(self, p2p: P2P, *, timeout: float = 10.0) -> None:
        self._p2p, self._timeout = p2p, timeout
        self._streams: OrderedDict[PeerID, MessageStream] = OrderedDict()
        self._turns = Turns()
        self._unary: set[PeerID] = set()  # Petals' servers know no push stream

    def push_now(self, peer_id: PeerID, request: runtime_pb2.ExpertRequest) -> bool:
        """Delivers ``request`` at once if that needs no waiting; False if it does: then :meth:`push` it."""
        stream = self._streams.get(peer_id)
        if stream is None or self._turns.waiting[peer_id]:
            return False
        try:
            return stream.send_now(request)
        except PeerLostError:
            self._drop(peer_id)
            return False

    async def push(self, peer_id: PeerID, request: runtime_pb2.ExpertRequest) -> None:
        """Delivers ``request`` to the peer's daemon.

        Raises:
            PeerLostError: the peer can't be reached from here.
        """
        waiting = self._turns.waiting
        if waiting[peer_id] >= _MAX_WAITING_FOR_ONE or waiting.total() >= _MAX_WAITING:
            raise PeerLostError(f"can't push to {peer_id}: too many wait for it")
        try:
            async with self._turns.of(peer_id):
                await asyncio.wait_for(self._send(peer_id, request), self._timeout)
        except Exception as error:
            self._drop(peer_id)
            raise PeerLostError(f"can't push to {peer_id}: {error}") from error

    def close(self) -> None:
        """Closes all streams."""
        for peer_id in list(self._streams):
            self._drop(peer_id, broken=False)

    async def _send(self, peer_id: PeerID, request: runtime_pb2.ExpertRequest) -> None:
        stream = self._streams.get(peer_id)
        if stream is not None:
            try:
                return await stream.send(request)
            except PeerLostError:
                self._drop(peer_id)  # the peer restarted, or its idle stream was cut: open a new one
        if peer_id not in self._unary:
            try:
                stream = await self._open(peer_id)
            except Exception:
                self._unary.add(peer_id)
            else:
                return await stream.send(request)
        try:
            await self._p2p.call_protobuf_handler(peer_id, handle_name(PUSH), request, runtime_pb2.ExpertResponse)
        except Exception:
            self._unary.discard(peer_id)  # unreachable rather than old: try the stream again next time
            raise
        return None

    async def _open(self, peer_id: PeerID) -> MessageStream:
        _, reader, writer = await self._p2p.call_binary_stream_handler(peer_id, handle_name(PUSH_STREAM))
        stream = MessageStream(reader, writer, max_bytes=2**16)
        self._streams[peer_id] = stream
        while len(self._streams) > _MAX_STREAMS:
            self._drop(next(iter(self._streams)), broken=False)
        return stream

    def _drop(self, peer_id: PeerID, *, broken: bool = True) -> None:
        stream = self._streams.pop(peer_id, None)
        if stream is not None:
            stream.abort() if broken else stream.close()
