"""The RPCs of a node. Each message is checked, its work queued for the engine and the result sent on; nothing is
computed here."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import EvictedError, LeavingError
from swarm.wire import rpc
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.engine import Engine
from . import forward_backward
from .info import describe
from .limits import Limits
from .pusher import Pusher
from .refusals import Answer, over_stream, unary
from .requests import Message, Served, read_opening
from .serving import Serving
from .session_stream import SessionStream


class Handler:
    """Serves the RPCs of :mod:`swarm.wire.rpc` for one engine."""

    def __init__(self, p2p: P2P, engine: Engine, served: Served, limits: Limits) -> None:
        self._p2p = p2p
        self._serving = serving = Serving(engine, served, limits, Pusher(p2p))
        self._sessions: dict[str, SessionStream] = {}
        self._pushed: set[MessageStream] = set()  # streams over which others push
        forward = partial(forward_backward.forward, serving)
        backward = partial(forward_backward.backward, serving)
        self._streams = {
            rpc.INFERENCE: self._inference,
            rpc.PUSH_STREAM: self._push_stream,
            rpc.FORWARD_STREAM: forward_backward.in_parts(serving, forward),
            rpc.BACKWARD_STREAM: forward_backward.in_parts(serving, backward),
        }
        self._unary: dict[str, Answer] = {rpc.PUSH: self._push, rpc.FORWARD: forward, rpc.BACKWARD: backward}

    async def register(self) -> None:
        """Starts to serve."""
        for name, handle in self._streams.items():
            guarded = over_stream(handle, self._serving.message_bytes)
            await self._p2p.add_binary_stream_handler(rpc.handle_name(name), guarded)
        for name, answer in self._unary.items():
            await self._p2p.add_protobuf_handler(rpc.handle_name(name), unary(answer), Request)
        await self._p2p.add_protobuf_handler(rpc.handle_name(rpc.INFO), self._info, runtime_pb2.ExpertUID)
        self._serving.spawn(self._end_idle_sessions())

    def serve(self, start: int, end: int) -> None:
        """From now on these are the blocks that are served; sessions that are open go on."""
        self._serving.served = replace(self._serving.served, start=start, end=end)

    async def leave(self, timeout: float) -> None:
        """Takes no more work, gives what is under way ``timeout`` seconds, then ends the sessions."""
        self._serving.leaving = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self._serving.under_way and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for session in list(self._sessions.values()):
            session.take(LeavingError("this node is shutting down"))
        await asyncio.sleep(0.1)  # lets the goodbyes out
        for task in self._serving.tasks:
            task.cancel()
        self._serving.pusher.close()

    async def unregister(self) -> None:
        """After :meth:`leave`: another handler may take this one's place."""
        for stream in self._pushed:  # or others would go on pushing to this one
            stream.close()
        for name in self._streams:
            await self._p2p.remove_binary_stream_handler(rpc.handle_name(name))
        for name in (*self._unary, rpc.INFO):
            await self._p2p.remove_protobuf_handler(rpc.handle_name(name))

    async def _inference(self, stream: MessageStream, peer: PeerID) -> None:
        serving = self._serving
        request = await asyncio.wait_for(stream.receive(Request), serving.limits.step_timeout)
        if request is None:
            return
        serving.refuse_if_leaving()
        first = Message.of(request)
        session = SessionStream(serving, stream, read_opening(first, serving.served, serving.limits))
        name = first.metadata.session_id or f"unnamed {id(first)} {peer}"  # without a name nobody can push to it
        await session.run(first, name, self._sessions)

    async def _push_stream(self, stream: MessageStream, _: PeerID) -> None:
        self._pushed.add(stream)
        try:
            while (request := await stream.receive(Request)) is not None:
                self._deliver(request)
        finally:
            self._pushed.discard(stream)

    async def _push(self, request: Request) -> Response:
        self._deliver(request)
        return Response()

    def _deliver(self, request: Request) -> None:
        message = Message.of(request)
        session = self._sessions.get(message.metadata.session_id or "")
        if session is not None:  # or else its client is gone, or has found another route
            session.push(message)

    async def _info(self, request: runtime_pb2.ExpertUID, _: P2PContext) -> runtime_pb2.ExpertInfo:
        info = describe(request.uid, self._serving.served, self._serving.engine.stats())
        return runtime_pb2.ExpertInfo(serialized_info=rpc.dump(info))

    async def _end_idle_sessions(self) -> None:
        """Ends sessions that are idle for too long: much sooner, and one at a time, while others wait for cache."""
        limit, short = self._serving.limits.step_timeout, self._serving.limits.idle_seconds
        while True:
            await asyncio.sleep(min(limit, short, 10.0) / 10)
            now = asyncio.get_running_loop().time()
            idle = [(session.idle_since, session) for session in self._sessions.values() if session.idle_since]
            for number, (since, session) in enumerate(sorted(idle, key=lambda pair: pair[0])):
                if now - since > limit or (number == 0 and self._serving.waiting and now - since > short):
                    session.take(EvictedError(f"the session was idle for {now - since:.0f} seconds"))
