"""The stream that carries a session: steps come in, wait for their turn, and are answered in order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import BadRequestError, OutOfCacheError, PeerLostError, SwarmError
from swarm.wire import rpc
from swarm.wire.codec import encode
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.scheduling.row_group import RowGroup
from ..engine.scheduling.work import StepTimes
from .fetching import fetch_columns
from .requests import STEP_TENSORS, Arrived, Opening, open_message, read_step
from .shared import Shared

logger = logging.getLogger(__name__)


class SessionStream:
    """A session that is open.

    Attributes:
        opening, rows: what it was opened with, and what the engine has of it.
        over: done when it has ended.
        reorders: how many steps have reordered the rows.
        idle_since: in the event loop's seconds; None while a step is under way.
    """

    def __init__(self, shared: Shared, stream: MessageStream, peer: PeerID, opening: Opening, rows: RowGroup) -> None:
        self._shared, self._stream, self.opening, self.rows = shared, stream, opening, rows
        self._room_for = shared.budget.room(peer)  # what is sent for this client
        self._waiting: deque[Arrived | SwarmError | None] = deque()
        self._early: list[Arrived] = []  # pushed, and have overtaken one that comes another way
        self._done: deque[str] = deque(maxlen=2 * shared.limits.max_waiting_steps)  # names of steps that have begun
        self._room = asyncio.Event()  # set when a step that waited has begun
        self._busy = True  # no step can begin: one is under way, or the session isn't admitted yet
        self._position = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle_since: float | None = None
        self.reorders = 0
        self._pusher = opening.pusher

    @property
    def is_full(self) -> bool:
        """Whether as many steps wait as may."""
        return len(self._waiting) >= self._shared.limits.max_waiting_steps

    def read(self) -> asyncio.Task[None]:
        """Begins to take what the client sends."""
        return asyncio.create_task(self._read())

    def begin(self) -> None:
        """Begins with the message that opened the session, which has been admitted."""
        self._busy = False
        self.go_on()

    def admits_push(self, peer: PeerID) -> bool:
        """Whether a peer may put steps into the session. Petals' clients don't say who may, so anybody may."""
        return self._pusher is None or peer == self._pusher

    def end_after_step(self, error: SwarmError) -> None:
        """Ends it when the step that is under way, if there is one, has ended; none that waits begins."""
        since = self.idle_since
        self._waiting.appendleft(error)
        self.go_on()
        self.idle_since = since or self.idle_since

    def end(self, error: BaseException | None) -> None:
        """Ends it; the first error counts."""
        if not self.over.done():
            self.over.set_result(None) if error is None else self.over.set_exception(error)
        for arrived in (*self._waiting, *self._early):
            if isinstance(arrived, Arrived):
                arrived.let_go()
        self._waiting.clear()
        self._early.clear()

    async def _read(self) -> None:
        """Takes what the client sends."""
        last: SwarmError | None = None
        try:
            while (request := await self._stream.receive(Request)) is not None:
                arrived = open_message(request, self._stream.claim())
                try:
                    while self.is_full:
                        self._room.clear()
                        await self._room.wait()
                except BaseException:
                    arrived.let_go()
                    raise
                self.take(arrived)
        except SwarmError as error:
            last = error
        except Exception as error:  # whatever it is, nobody reads on
            logger.exception("a message of a session can't be read")
            last = BadRequestError(f"a message can't be read: {error!r}")
        self.take(last)

    async def take_over(self, reading: asyncio.Task[None]) -> None:
        """Fetches what it is to begin with from the node that has it, as far as that is possible, unless the client
        goes away meanwhile."""
        source = self.opening.take_over
        if source is None or self._shared.engine.span.state_bytes:
            return

        async def fetch() -> None:
            async for columns in fetch_columns(self._shared, source, self.opening, self.rows):
                self._position = columns

        fetching = asyncio.create_task(fetch())
        seconds = min(source.seconds, self._shared.limits.handover_timeout)
        try:
            await asyncio.wait({fetching, reading}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            fetching.cancel()
        (failed,) = await asyncio.gather(fetching, return_exceptions=True)
        logger.info("has %d of %d columns from %s (%r)", self._position, source.columns, source.peer_id, failed)

    async def admit(self, reading: asyncio.Task[None], timeout: float) -> None:
        """Gets cache, if need be by waiting up to ``timeout`` seconds while ``reading`` goes on.

        Raises:
            OutOfCacheError: there is no room.
            PeerLostError: the client went away.
        """
        opening, timeout = self.opening, min(timeout, self._shared.limits.admission_timeout)
        prefix = opening.prefix if self._shared.engine.page_size == rpc.NAMED_TOKENS else None
        wait = timeout > 0 and self._shared.waiting < self._shared.limits.max_waiting_sessions
        promise = asyncio.wrap_future(
            self._shared.engine.admit(self.rows, opening.max_length, prefix=prefix, wait=wait)
        )
        self._shared.waiting += wait
        try:
            either: set[asyncio.Future[Any]] = {promise, reading}
            await asyncio.wait(either, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED)
            if promise.done():
                self._position = promise.result()  # columns of it that are there already
                return
            if reading.done():
                raise PeerLostError("the peer went away while it waited")
            raise OutOfCacheError(f"the KV cache is full, and stayed so for {timeout:.0f} seconds")
        finally:
            self._shared.waiting -= wait
            promise.cancel()

    # A step goes on in plain calls, and comes back from the engine in one: each task or future between would be a way
    # through the event loop, some tens of microseconds behind layers that have pushed all else out of the caches.

    def take(self, arrived: Arrived | SwarmError | None) -> None:
        """Has a step wait for its turn, which may be now; or what ends the session: an error, or its client (None)."""
        self._waiting.append(arrived)
        if self.over.done():
            self.end(None)
        self.go_on()

    def go_on(self) -> None:
        """Begins what waits, up to a step that takes time."""
        while self._waiting and not self._busy and not self.over.done():
            arrived = self._waiting.popleft()
            self._room.set()
            if arrived is None or isinstance(arrived, SwarmError):
                self.end(arrived)
            elif self._is_early(arrived):
                self._early.append(arrived)
            elif not arrived.request.tensors:  # an empty request ends the session, too
                self.end(None)
            else:
                try:
                    self._begin(arrived)
                except Exception as error:
                    arrived.let_go()
                    self.end(error)
        self.idle_since = None if self._busy else asyncio.get_running_loop().time()

    def _is_early(self, arrived: Arrived) -> bool:
        start = arrived.metadata.start
        early = arrived.metadata.pushed and start is not None and start > self._position
        return early and len(self._early) < self._shared.limits.max_waiting_steps

    def _begin(self, arrived: Arrived) -> None:
        """Begins a step, unless it has come before."""
        metadata = arrived.metadata
        if metadata.pusher is not None and not metadata.pushed:
            self._pusher = metadata.pusher
        if metadata.step_id is not None:
            if metadata.step_id in self._done:
                arrived.let_go()
                return
            self._done.append(metadata.step_id)
        step = read_step(arrived, self.opening, self._shared.served, self._shared.limits, position=self._position)
        start, columns = step.start, step.hidden.shape[1]
        self._busy = True
        if columns == 0:
            arrived.let_go()
            output = encode(step.hidden.to(self._shared.served.dtype))
            self._position = start
            self._reply(Response(tensors=[output], metadata=_about(arrived, reused=start)))
            return
        times = StepTimes()
        future = self._shared.engine.step(
            self.rows,
            step.hidden,
            start=start,
            hypo_ids=step.hypo_ids,
            prompts=step.prompts,
            names=[list(row) for row in metadata.names],
            times=times,
        )
        self._shared.busy += 1
        loop, pushes = asyncio.get_running_loop(), step.prompts is None

        def finish() -> None:
            self._shared.busy -= 1
            arrived.let_go()
            if not self.over.done():
                try:
                    output = encode(future.result())
                    self._position = start + columns
                    self._waiting.extendleft(reversed(self._early))
                    self._early.clear()
                    self.reorders += step.hypo_ids is not None
                    if metadata.next_servers and pushes:
                        self._push_on(output, arrived)
                    about = _about(arrived, queue_s=times.queue_s, compute_s=times.compute_s)
                    self._reply(Response(tensors=[output], metadata=about))
                except Exception as error:
                    self.end(error)
                self.go_on()

        future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(finish))

    def _reply(self, response: Response) -> None:
        """Answers the step that is under way; unless much waits to be sent, the next can begin then."""
        self._busy = not self._stream.send_now(response)
        if self._busy:
            self._shared.spawn(self._reply_later(response))

    async def _reply_later(self, response: Response) -> None:
        size = response.ByteSize()
        try:
            await self._room_for.take(size)
            try:
                await self._stream.send(response)
            finally:
                self._room_for.give_back(size)
        except SwarmError as error:
            self.end(error)
        except asyncio.CancelledError:
            self.end(PeerLostError("the node has left"))
            raise
        self._busy = False
        self.go_on()

    def _push_on(self, output: runtime_pb2.Tensor, arrived: Arrived) -> None:
        request, fields, metadata, _ = arrived
        hop, *rest = metadata.next_servers
        passed_on = dict(
            fields, session_id=hop.session_id, next_servers=[following.to_tuple() for following in rest], pushed=True
        )
        onward = Request(
            uid=span_uid(self._shared.served.prefix, hop.start, hop.end),
            tensors=[output, *request.tensors[1:STEP_TENSORS]],  # what was not looked at stays here
            metadata=rpc.dump(passed_on),
        )
        if not self._shared.pusher.push_now(hop.peer_id, onward):
            self._shared.spawn(self._push_later(hop.peer_id, onward, metadata.step_id))

    async def _push_later(self, peer_id: PeerID, onward: Request, step_id: str | None) -> None:
        size = onward.ByteSize()
        try:
            if not self._room_for.try_take(size):
                raise PeerLostError("too much waits to be pushed for this client")
            try:
                await self._shared.pusher.push(peer_id, onward)
            finally:
                self._room_for.give_back(size)
        except PeerLostError as error:
            logger.debug("%s", error)
            # the client forwards the output itself, or finds that the next hop is gone
            with suppress(PeerLostError):
                await self._stream.send(Response(metadata=rpc.dump({"push_failed": step_id})))


def _about(arrived: Arrived, **told: float) -> bytes:
    return rpc.dump({"step_id": arrived.metadata.step_id, **told})
