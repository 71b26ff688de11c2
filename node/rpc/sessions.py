"""The sessions that are open at a node: opened by clients, fed by clients and by the hops before, ended when idle."""

from __future__ import annotations

import asyncio
import logging

from hivemind.p2p import PeerID

from swarm.errors import BadRequestError, EvictedError, LeavingError
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from .handovers import Handovers
from .requests import Arrived, check_opening, open_message
from .session_stream import SessionStream
from .shared import Shared

logger = logging.getLogger(__name__)


class Sessions:
    """By the ids that clients gave them."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._open: dict[str, SessionStream] = {}
        self._pushed: set[MessageStream] = set()  # streams over which others push
        self.handovers = Handovers(shared, self._open)

    @property
    def open(self) -> int:
        """How many are open."""
        return len(self._open)

    async def serve(self, stream: MessageStream, peer: PeerID) -> None:
        """``rpc_inference``: one session, from its first message to its end.

        Raises:
            SwarmError: it can't be opened, or what ended it.
        """
        shared = self._shared
        request = await asyncio.wait_for(stream.receive(Request), shared.limits.opening_timeout)
        if request is None:
            return
        shared.refuse_if_leaving()
        first = open_message(request, stream.claim())
        try:
            opening = check_opening(first, shared.served, shared.limits)
            rows = shared.engine.open(
                rows=opening.rows,
                first=opening.first,
                last=opening.last,
                left_padding=opening.left_padding,
                adapter=opening.adapter,
            )
        except BaseException:
            first.let_go()
            raise
        session_id = first.metadata.session_id or f"unnamed {id(first)} {peer}"  # without a name nobody can push to it
        session = SessionStream(shared, stream, peer, opening, rows)
        session.take(first)
        reading = session.read()
        try:
            await session.admit(reading, first.metadata.alloc_timeout)
            await session.take_over(reading)
            shared.refuse_if_leaving()
            if session_id in self._open:
                raise BadRequestError("there is a session of this id already")
            self._open[session_id] = session
            try:
                session.begin()
                await session.over
            finally:
                del self._open[session_id]
        except LeavingError:
            self.handovers.keep(session_id, session)
            raise
        finally:
            reading.cancel()
            session.end(None)
            if not self.handovers.keeps(session):
                shared.engine.close(rows)

    async def take_pushes(self, stream: MessageStream, peer: PeerID) -> None:
        """``rpc_push_stream``: outputs of another node, one after the other."""
        self._pushed.add(stream)
        try:
            while (request := await stream.receive(Request)) is not None:
                self._deliver(open_message(request, stream.claim()), peer)
        finally:
            self._pushed.discard(stream)

    async def take_push(self, request: Request, peer: PeerID) -> Response:
        """``rpc_push``, as Petals' servers do it: one output."""
        self._deliver(open_message(request), peer)
        return Response()

    def _deliver(self, arrived: Arrived, peer: PeerID) -> None:
        session = self._open.get(arrived.metadata.session_id or "")
        if session is None:
            arrived.let_go()  # its client is gone, or has found another route
        elif not session.admits_push(peer):
            arrived.let_go()
            logger.warning("%s may not push into a session of another peer's", peer)
        elif session.is_full:
            arrived.let_go()
            raise BadRequestError("too many steps of one session are waiting")
        else:
            session.take(arrived)

    async def end_idle(self) -> None:
        """Ends sessions that are idle for too long: much sooner, and one at a time, while others wait for cache."""
        limit, short = self._shared.limits.step_timeout, self._shared.limits.idle_seconds
        while True:
            await asyncio.sleep(min(limit, short, 10.0) / 10)
            now = asyncio.get_running_loop().time()
            idle = [(session.idle_since, session) for session in self._open.values() if session.idle_since]
            for number, (since, session) in enumerate(sorted(idle, key=lambda pair: pair[0])):
                if now - since > limit or (number == 0 and self._shared.waiting and now - since > short):
                    session.take(EvictedError(f"the session was idle for {now - since:.0f} seconds"))

    def end_all(self) -> None:
        """Ends all sessions, each after its step, with an error that sends their clients elsewhere."""
        for session in list(self._open.values()):
            session.end_after_step(LeavingError("this node is shutting down"))

    def close_pushes(self) -> None:
        """Ends the streams over which others push, or they would go on pushing to this handler."""
        for stream in self._pushed:
            stream.close()
