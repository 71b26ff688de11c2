"""A session on its way through a node: steps come over its client's stream and from other nodes, outputs go out."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from hivemind.p2p import PeerID

from swarm.errors import BadRequestError, OutOfCacheError, PeerLostError, SwarmError
from swarm.wire import rpc
from swarm.wire.codec import encode
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.scheduling.session import StepTimes
from .requests import Message, Opening, Step, read_step
from .serving import Serving

logger = logging.getLogger(__name__)


class SessionStream:
    """A client's stream, and the session that it carries from its first message to its end.

    Attributes:
        idle_since: when it began to wait for a step, in seconds of the event loop's clock; None if it doesn't.
    """

    def __init__(self, serving: Serving, stream: MessageStream, opening: Opening) -> None:
        self._serving, self._stream, self._opening = serving, stream, opening
        self._rows = serving.engine.open(
            rows=opening.rows,
            first=opening.first,
            last=opening.last,
            left_padding=opening.left_padding,
            adapter=opening.adapter,
        )
        self._over = asyncio.get_running_loop().create_future()
        # the client's steps and those pushed by other nodes, in order, and what ends the session: an error or, with
        # None, its client
        self._waiting: deque[Message | SwarmError | None] = deque()
        self._room = asyncio.Event()  # set when one that waited has begun
        self._begun: deque[str] = deque(maxlen=2 * serving.limits.max_waiting_steps)  # names of steps
        self._busy = True  # no step can begin, since one is under way or the session isn't admitted yet
        self._position = 0
        self.idle_since: float | None = None

    async def run(self, first: Message, name: str, sessions: dict[str, SessionStream]) -> None:
        """Serves the session, which stands in ``sessions`` under its name while it is open.

        Raises:
            SwarmError: it was refused, or ended otherwise than by its client.
        """
        reading = asyncio.create_task(self._read())
        try:
            self._position = await self._admit(reading, first.metadata.alloc_timeout)
            if name in sessions:
                raise BadRequestError("there is a session of this id already")
            sessions[name] = self
            try:
                self._waiting.appendleft(first)
                self._busy = False
                self._go_on()
                await self._over
            finally:
                del sessions[name]
        finally:
            reading.cancel()
            self._end(None)
            self._serving.engine.close(self._rows)

    def push(self, message: Message) -> None:
        """Takes a step from another node.

        Raises:
            BadRequestError: too many wait already.
        """
        if len(self._waiting) >= self._serving.limits.max_waiting_steps:
            raise BadRequestError("too many steps of one session are waiting")
        self.take(message)

    def take(self, message: Message | SwarmError | None) -> None:
        """Has a step, or what ends the session, wait for its turn, which may be now."""
        self._waiting.append(message)
        self._go_on()

    async def _read(self) -> None:
        """Takes what the client sends."""
        last: SwarmError | None = None
        try:
            while (request := await self._stream.receive(Request)) is not None:
                message = Message.of(request)
                while len(self._waiting) >= self._serving.limits.max_waiting_steps:
                    self._room.clear()
                    await self._room.wait()
                self.take(message)
        except SwarmError as error:
            last = error
        self.take(last)

    async def _admit(self, reading: asyncio.Task[None], timeout: float) -> int:
        """Gets cache for the session, if need be by waiting; how many columns of it are there already."""
        serving, opening = self._serving, self._opening
        timeout = min(timeout, serving.limits.admission_timeout)
        prefix = opening.prefix if serving.engine.page_size == rpc.NAMED_TOKENS else None
        wait = timeout > 0 and serving.waiting < serving.limits.max_waiting_sessions
        promise = asyncio.wrap_future(serving.engine.admit(self._rows, opening.max_length, prefix=prefix, wait=wait))
        serving.waiting += wait
        try:
            either: set[asyncio.Future[Any]] = {promise, reading}
            await asyncio.wait(either, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED)
            if promise.done():
                return promise.result()
            if reading.done():
                raise PeerLostError("the peer went away while it waited")
            raise OutOfCacheError(f"the KV cache is full, and stayed so for {timeout:.0f} seconds")
        finally:
            serving.waiting -= wait
            promise.cancel()

    # A step goes on in plain calls, and comes back from the engine in one: each task or future between would be a way
    # through the event loop, some tens of microseconds behind layers that have pushed all else out of the caches.

    def _go_on(self) -> None:
        """Begins what waits, up to a step that takes time."""
        while self._waiting and not self._busy and not self._over.done():
            message = self._waiting.popleft()
            self._room.set()
            if message is None or isinstance(message, SwarmError):
                self._end(message)
            elif not message.request.tensors:  # an empty request ends the session, too
                self._end(None)
            else:
                try:
                    self._begin(message)
                except Exception as error:
                    self._end(error)
        self.idle_since = None if self._busy else asyncio.get_running_loop().time()

    def _end(self, error: BaseException | None) -> None:
        """Ends it; the first error counts."""
        if not self._over.done():
            self._over.set_result(None) if error is None else self._over.set_exception(error)

    def _begin(self, message: Message) -> None:
        """Begins a step, unless it has come before."""
        serving, name = self._serving, message.metadata.step_id
        if name is not None:
            if name in self._begun:
                return
            self._begun.append(name)
        step = read_step(message, self._opening, serving.served, serving.limits, position=self._position)
        self._busy = True
        if step.hidden.shape[1] == 0:
            output = encode(step.hidden.to(serving.served.dtype))
            self._position = step.start
            self._reply(Response(tensors=[output], metadata=_about(message, reused=step.start)))
            return
        times, loop = StepTimes(), asyncio.get_running_loop()
        future = serving.engine.step(self._rows, **vars(step), times=times)
        serving.under_way += 1
        future.add_done_callback(
            lambda done: loop.is_closed() or loop.call_soon_threadsafe(self._finish, message, step, done, times)
        )

    def _finish(self, message: Message, step: Step, done: Future[torch.Tensor], times: StepTimes) -> None:
        """Sends a step's output on, and begins the next step."""
        self._serving.under_way -= 1
        if self._over.done():
            return
        try:
            output = encode(done.result())
            self._position = step.start + step.hidden.shape[1]
            if message.metadata.next_servers and step.prompts is None:
                peer_id, onward = message.passed_on(output, self._serving.served.prefix)
                if not self._serving.pusher.push_now(peer_id, onward):
                    self._serving.spawn(self._push_later(peer_id, onward, message.metadata.step_id))
            about = _about(message, queue_s=times.queue_s, compute_s=times.compute_s)
            self._reply(Response(tensors=[output], metadata=about))
        except Exception as error:
            self._end(error)
        self._go_on()

    async def _push_later(self, peer_id: PeerID, onward: Request, step_id: str | None) -> None:
        try:
            await self._serving.pusher.push(peer_id, onward)
        except PeerLostError as error:
            logger.debug("%s", error)
            # the client forwards the output itself, or finds that the next hop is gone
            with suppress(PeerLostError):
                await self._stream.send(Response(metadata=rpc.dump({"push_failed": step_id})))

    def _reply(self, response: Response) -> None:
        """Answers the step that is under way; unless much waits to be sent, the next can begin then."""
        self._busy = not self._stream.send_now(response)
        if self._busy:
            self._serving.spawn(self._reply_later(response))

    async def _reply_later(self, response: Response) -> None:
        try:
            await self._stream.send(response)
        except PeerLostError as error:
            self._end(error)
        self._busy = False
        self._go_on()


def _about(message: Message, **told: float) -> bytes:
    return rpc.dump({"step_id": message.metadata.step_id, **told})
