"""The RPCs of a node: registered with the peer, and their errors told to whoever asked. Computes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from swarm.errors import PeerLostError, SwarmError
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
        self._answers = {
            rpc.PUSH: self._sessions.take_push,
            rpc.FORWARD: dense.forward,
            rpc.BACKWARD: dense.backward,
        }

    async def register(self) -> None:
        """Starts to serve."""
        for name, handle in self._streams.items():
            await self._p2p.add_binary_stream_handler(rpc.handle_name(name), self._guarded(handle))
        for name, answer in self._answers.items():
            await self._p2p.add_protobuf_handler(rpc.handle_name(name), _unary(answer), Request)
        await self._p2p.add_protobuf_handler(rpc.handle_name(rpc.INFO), self._info, runtime_pb2.ExpertUID)
        self._shared.spawn(self._sessions.end_idle())

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
            stream = MessageStream(reader, writer, max_bytes=limit)
            try:
                await handle(stream, info.peer_id)
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

        return guarded


def _unary(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request, P2PContext], Awaitable[Response]]:
    async def handle(request: Request, context: P2PContext) -> Response:
        try:
            return await answer(request)
        except Exception as error:
            if not isinstance(error, SwarmError):
                logger.exception("a request of %s failed", context.remote_id)
            raise RuntimeError(to_wire(error)) from None  # hivemind sends the text

    return handle
