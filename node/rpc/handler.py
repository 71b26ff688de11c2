"""The RPCs of a node: registered with the peer, and their errors told to whoever asked. Computes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from swarm.errors import OutOfCacheError, PeerLostError, SwarmError
from swarm.wire import rpc
from swarm.wire.error_text import to_wire
from swarm.wire.handover import HANDOVER
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.engine import Engine
from .dense import DensePasses
from .info import describe_node
from .limits import Limits
from .requests import Served
from .sessions import Sessions
from .shared import Shared

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
_MAX_REFUSING = 64


class Handler:
    """Serves the RPCs of :mod:`swarm.wire.rpc` for one engine."""

    def __init__(self, p2p: P2P, engine: Engine, served: Served, limits: Limits) -> None:
        self._p2p = p2p
        self._shared = Shared(p2p, engine, served, limits)
        self._sessions = Sessions(self._shared)
        dense = DensePasses(self._shared)
        self._streams = {
            rpc.INFERENCE: self._sessions.serve,
            rpc.PUSH_STREAM: self._sessions.take_pushes,
            HANDOVER: self._sessions.handovers.give,
            rpc.FORWARD_STREAM: dense.stream_of(dense.forward),
            rpc.BACKWARD_STREAM: dense.stream_of(dense.backward),
        }
        self._answers: dict[str, Callable[[Request, PeerID], Awaitable[Response]]] = {
            rpc.PUSH: self._sessions.take_push,
            rpc.FORWARD: lambda request, _: dense.forward(request),
            rpc.BACKWARD: lambda request, _: dense.backward(request),
        }
        self._open: set[MessageStream] = set()
        self._refusing = 0

    async def register(self) -> None:
        """Starts to serve."""
        for name, handle in self._streams.items():
            await self._p2p.add_binary_stream_handler(rpc.handle_name(name), self._guarded(handle))
        for name, answer in self._answers.items():
            await self._p2p.add_protobuf_handler(rpc.handle_name(name), self._unary(answer), Request)
        await self._p2p.add_protobuf_handler(rpc.handle_name(rpc.INFO), self._info, runtime_pb2.ExpertUID)
        self._shared.spawn(self._sessions.end_idle())
        self._shared.spawn(self._end_stuck())

    def serve(self, start: int, end: int) -> None:
        """From now on these are the blocks that are served; sessions that are open go on."""
        self._shared.served = replace(self._shared.served, start=start, end=end)

    async def leave(self, timeout: float, handover: float = 0.0) -> None:
        """Takes no more work and ends the sessions, each after the step that is under way, for which it has ``timeout``
        seconds. Their cache is kept for up to ``handover`` seconds for the nodes that go on with them."""
        self._shared.leaving = True
        self._sessions.end_all()
        deadline = asyncio.get_running_loop().time() + timeout
        while (self._shared.busy or self._sessions.open) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await self._sessions.handovers.finish(handover)
        await asyncio.sleep(0.1)  # lets the goodbyes out
        self._shared.cancel()
        self._shared.pusher.close()

    async def unregister(self) -> None:
        """After :meth:`leave`: another handler may take this one's place."""
        self._sessions.close_pushes()
        for stream in [*self._open]:  # of peers that don't take what they are sent, or they would keep the engine
            stream.abort()
        for name in self._streams:
            await self._p2p.remove_binary_stream_handler(rpc.handle_name(name))
        for name in (*self._answers, rpc.INFO):
            await self._p2p.remove_protobuf_handler(rpc.handle_name(name))

    async def _info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        return describe_node(self._shared.engine, self._shared.served, request.uid)

    def _guarded(
        self, handle: Callable[[MessageStream, PeerID], Awaitable[None]]
    ) -> Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        """Wraps a stream's handler: its errors go to the peer, never further."""

        async def guarded(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            limit = self._shared.limits.message_bytes(self._shared.served.hidden_size)
            peer, budget = info.peer_id, self._shared.budget
            stream = MessageStream(reader, writer, max_bytes=limit, memory=budget.room(peer))
            if not budget.streams.take(peer):
                await self._refuse(stream)
                return
            self._open.add(stream)
            try:
                await handle(stream, peer)
            except PeerLostError:
                pass  # the peer went away; nobody is left to tell
            except SwarmError as error:
                logger.debug("refused a request of %s: %s", info.peer_id, error)
                await stream.send_error(error)
                await stream.linger()
            except Exception as error:
                logger.exception("a request of %s failed", info.peer_id)
                await stream.send_error(error)
                await stream.linger()
            finally:
                stream.close()
                self._open.discard(stream)
                budget.streams.give_back(peer)

        return guarded

    def _unary(
        self, answer: Callable[[Request, PeerID], Awaitable[Response]]
    ) -> Callable[[Request, P2PContext], Awaitable[Response]]:
        calls = self._shared.budget.calls

        async def handle(request: Request, context: P2PContext) -> Response:
            peer = context.remote_id
            try:
                if not calls.take(peer):
                    raise OutOfCacheError("this node has no room for another request of yours now")
                try:
                    return await answer(request, peer)
                finally:
                    calls.give_back(peer)
            except Exception as error:
                if not isinstance(error, SwarmError):
                    logger.exception("a request of %s failed", peer)
                raise RuntimeError(to_wire(error)) from None  # hivemind sends the text

        return handle

    async def _refuse(self, stream: MessageStream) -> None:
        """Tells who has too many streams; not those that come too fast even for that."""
        if self._refusing < _MAX_REFUSING:
            self._refusing += 1
            try:
                await stream.send_error(OutOfCacheError("this node has no room for another stream of yours now"))
                await stream.linger()
            finally:
                self._refusing -= 1
        stream.abort()

    async def _end_stuck(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for stream in [*self._open]:
                if stream.is_stuck():
                    stream.abort()
