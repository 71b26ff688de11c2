"""The RPCs of a node. Checks each message, queues its work for the engine and sends the result on; computes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from swarm import __version__
from swarm.errors import (
    BadRequestError,
    EvictedError,
    LeavingError,
    OutOfCacheError,
    PeerLostError,
    SwarmError,
)
from swarm.network.overview import METER
from swarm.wire import rpc
from swarm.wire.codec import COMPRESSIONS, NONE, encode, join, split
from swarm.wire.error_text import to_wire
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.engine import Engine
from ..engine.scheduling.session import RowGroup, StepTimes
from .limits import Limits
from .pusher import Pusher
from .requests import Opening, Served, check_opening, read_backward, read_forward, read_step

logger = logging.getLogger(__name__)


class _Arrived(NamedTuple):
    """A step, and what its metadata says."""

    request: Request
    fields: dict[str, Any]
    metadata: rpc.Metadata


@dataclass(eq=False)
class _Session:
    """A session that is open.

    Attributes:
        waiting: the client's steps and those pushed by other nodes, in order, and what ends the session: an error or,
            with None, its client.
        over: done when it has ended.
        busy: no step can begin, since one is under way or the session isn't admitted yet.
        done: names of steps that have begun.
        room: set when one that waited has begun.
    """

    stream: MessageStream
    opening: Opening
    engine_session: RowGroup
    over: asyncio.Future[None]
    done: deque[str]
    waiting: deque[_Arrived | SwarmError | None] = field(default_factory=deque)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    busy: bool = True
    position: int = 0
    idle_since: float | None = None

    def end(self, error: BaseException | None) -> None:
        """Ends it; the first error counts."""
        if not self.over.done():
            self.over.set_result(None) if error is None else self.over.set_exception(error)


def _open(request: Request) -> _Arrived:
    fields = rpc.load(request.metadata)
    return _Arrived(request, fields, rpc.parse(fields))


class Handler:
    """Serves the RPCs of :mod:`swarm.wire.rpc` for one engine."""

    def __init__(self, p2p: P2P, engine: Engine, served: Served, limits: Limits) -> None:
        self._p2p, self._engine, self._served, self._limits = p2p, engine, served, limits
        self._pusher = Pusher(p2p)
        self._sessions: dict[str, _Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushed: set[MessageStream] = set()  # streams over which others push
        self._leaving = False
        self._busy = 0  # steps and requests under way
        self._waiting = 0  # sessions that wait for cache

    async def register(self) -> None:
        """Starts to serve."""
        streams = {
            rpc.INFERENCE: self._inference,
            rpc.PUSH_STREAM: self._push_stream,
            rpc.FORWARD_STREAM: self._stream_of(self._forward),
            rpc.BACKWARD_STREAM: self._stream_of(self._backward),
        }
        for name, handle in streams.items():
            await self._p2p.add_binary_stream_handler(rpc.handle_name(name), self._guarded(handle))
        for name, answer in ((rpc.PUSH, self._push), (rpc.FORWARD, self._forward), (rpc.BACKWARD, self._backward)):
            await self._p2p.add_protobuf_handler(rpc.handle_name(name), _unary(answer), Request)
        await self._p2p.add_protobuf_handler(rpc.handle_name(rpc.INFO), self._info, runtime_pb2.ExpertUID)
        self._spawn(self._end_idle_sessions())

    def serve(self, start: int, end: int) -> None:
        """From now on these are the blocks that are served; sessions that are open go on."""
        self._served = replace(self._served, start=start, end=end)

    async def leave(self, timeout: float) -> None:
        """Takes no more work, gives what is under way ``timeout`` seconds, then ends the sessions."""
        self._leaving = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self._busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for session in list(self._sessions.values()):
            self._take(session, LeavingError("this node is shutting down"))
        await asyncio.sleep(0.1)  # lets the goodbyes out
        for task in self._tasks:
            task.cancel()
        self._pusher.close()

    async def unregister(self) -> None:
        """After :meth:`leave`: another handler may take this one's place."""
        for stream in self._pushed:  # or others would go on pushing to this one
            stream.close()
        for name in (rpc.INFERENCE, rpc.PUSH_STREAM, rpc.FORWARD_STREAM, rpc.BACKWARD_STREAM):
            await self._p2p.remove_binary_stream_handler(rpc.handle_name(name))
        for name in (rpc.PUSH, rpc.FORWARD, rpc.BACKWARD, rpc.INFO):
            await self._p2p.remove_protobuf_handler(rpc.handle_name(name))

    # sessions

    async def _inference(self, stream: MessageStream, peer: PeerID) -> None:
        request = await asyncio.wait_for(stream.receive(Request), self._limits.step_timeout)
        if request is None:
            return
        if self._leaving:
            raise LeavingError("this node is shutting down: open the session elsewhere")
        first = _open(request)
        opening = check_opening(request, first.metadata, self._served, self._limits)
        session_id = first.metadata.session_id or f"unnamed {id(first)} {peer}"  # without a name nobody can push to it
        engine_session = self._engine.open(
            rows=opening.rows,
            first=opening.first,
            last=opening.last,
            left_padding=opening.left_padding,
            adapter=opening.adapter,
        )
        over = asyncio.get_running_loop().create_future()
        done: deque[str] = deque(maxlen=2 * self._limits.max_waiting_steps)
        session = _Session(stream, opening, engine_session, over, done)
        reading = asyncio.create_task(self._read(session))
        try:
            session.position = await self._admit(session, reading, first.metadata.alloc_timeout)
            if session_id in self._sessions:
                raise BadRequestError("there is a session of this id already")
            self._sessions[session_id] = session
            try:
                session.waiting.appendleft(first)
                session.busy = False
                self._go_on(session)
                await session.over
            finally:
                del self._sessions[session_id]
        finally:
            reading.cancel()
            session.end(None)
            self._engine.close(engine_session)

    async def _read(self, session: _Session) -> None:
        """Takes what the client sends."""
        last: SwarmError | None = None
        try:
            while (request := await session.stream.receive(Request)) is not None:
                arrived = _open(request)
                while len(session.waiting) >= self._limits.max_waiting_steps:
                    session.room.clear()
                    await session.room.wait()
                self._take(session, arrived)
        except SwarmError as error:
            last = error
        self._take(session, last)

    async def _admit(self, session: _Session, reading: asyncio.Task[None], timeout: float) -> int:
        """Gets cache for a session, if need be by waiting; how many columns of it are there already."""
        opening, timeout = session.opening, min(timeout, self._limits.admission_timeout)
        prefix = opening.prefix if self._engine.page_size == rpc.NAMED_TOKENS else None
        wait = timeout > 0 and self._waiting < self._limits.max_waiting_sessions
        promise = asyncio.wrap_future(
            self._engine.admit(session.engine_session, opening.max_length, prefix=prefix, wait=wait)
        )
        self._waiting += wait
        try:
            either: set[asyncio.Future[Any]] = {promise, reading}
            await asyncio.wait(either, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED)
            if promise.done():
                return promise.result()
            if reading.done():
                raise PeerLostError("the peer went away while it waited")
            raise OutOfCacheError(f"the KV cache is full, and stayed so for {timeout:.0f} seconds")
        finally:
            self._waiting -= wait
            promise.cancel()

    # A step goes on in plain calls, and comes back from the engine in one: each task or future between would be a way
    # through the event loop, some tens of microseconds behind layers that have pushed all else out of the caches.

    def _take(self, session: _Session, arrived: _Arrived | SwarmError | None) -> None:
        """Has something wait for its turn in a session, which may be now."""
        session.waiting.append(arrived)
        self._go_on(session)

    def _go_on(self, session: _Session) -> None:
        """Begins what waits, up to a step that takes time."""
        while session.waiting and not session.busy and not session.over.done():
            arrived = session.waiting.popleft()
            session.room.set()
            if arrived is None or isinstance(arrived, SwarmError):
                session.end(arrived)
            elif not arrived.request.tensors:  # an empty request ends the session, too
                session.end(None)
            else:
                try:
                    self._begin(session, arrived)
                except Exception as error:
                    session.end(error)
        session.idle_since = None if session.busy else asyncio.get_running_loop().time()

    def _begin(self, session: _Session, arrived: _Arrived) -> None:
        """Begins a step, unless it has come before."""
        request, _, metadata = arrived
        if metadata.step_id is not None:
            if metadata.step_id in session.done:
                return
            session.done.append(metadata.step_id)
        opening, position = session.opening, session.position
        step = read_step(request, metadata, opening, self._served, self._limits, position=position)
        start = position if metadata.start is None else metadata.start
        columns = step.hidden.shape[1]
        session.busy = True
        if columns == 0:
            output = encode(step.hidden.to(self._served.dtype))
            session.position = start
            self._reply(session, Response(tensors=[output], metadata=_about(arrived, reused=start)))
            return
        times = StepTimes()
        future = self._engine.step(
            session.engine_session,
            step.hidden,
            start=start,
            hypo_ids=step.hypo_ids,
            prompts=step.prompts,
            names=[list(row) for row in metadata.names],
            times=times,
        )
        self._busy += 1
        loop, pushes = asyncio.get_running_loop(), step.prompts is None

        def finish() -> None:
            self._busy -= 1
            if not session.over.done():
                try:
                    output = encode(future.result())
                    session.position = start + columns
                    if metadata.next_servers and pushes:
                        self._push_on(session.stream, output, arrived)
                    about = _about(arrived, queue_s=times.queue_s, compute_s=times.compute_s)
                    self._reply(session, Response(tensors=[output], metadata=about))
                except Exception as error:
                    session.end(error)
                self._go_on(session)

        future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(finish))

    def _reply(self, session: _Session, response: Response) -> None:
        """Answers the step that is under way; unless much waits to be sent, the next can begin then."""
        session.busy = not session.stream.send_now(response)
        if session.busy:
            self._spawn(self._reply_later(session, response))

    async def _reply_later(self, session: _Session, response: Response) -> None:
        try:
            await session.stream.send(response)
        except PeerLostError as error:
            session.end(error)
        session.busy = False
        self._go_on(session)

    def _push_on(self, stream: MessageStream, output: runtime_pb2.Tensor, arrived: _Arrived) -> None:
        request, fields, metadata = arrived
        hop, *rest = metadata.next_servers
        passed_on = dict(
            fields, session_id=hop.session_id, next_servers=[following.to_tuple() for following in rest], pushed=True
        )
        onward = Request(
            uid=span_uid(self._served.prefix, hop.start, hop.end),
            tensors=[output, *request.tensors[1:]],
            metadata=rpc.dump(passed_on),
        )
        if not self._pusher.push_now(hop.peer_id, onward):
            self._spawn(self._push_later(stream, hop.peer_id, onward, metadata.step_id))

    async def _push_later(self, stream: MessageStream, peer_id: PeerID, onward: Request, step_id: str | None) -> None:
        try:
            await self._pusher.push(peer_id, onward)
        except PeerLostError as error:
            logger.debug("%s", error)
            # the client forwards the output itself, or finds that the next hop is gone
            with suppress(PeerLostError):
                await stream.send(Response(metadata=rpc.dump({"push_failed": step_id})))

    async def _end_idle_sessions(self) -> None:
        """Ends sessions that are idle for too long: much sooner, and one at a time, while others wait for cache."""
        limit, short = self._limits.step_timeout, self._limits.idle_seconds
        while True:
            await asyncio.sleep(min(limit, short, 10.0) / 10)
            now = asyncio.get_running_loop().time()
            idle = [(session.idle_since, session) for session in self._sessions.values() if session.idle_since]
            for number, (since, session) in enumerate(sorted(idle, key=lambda pair: pair[0])):
                if now - since > limit or (number == 0 and self._waiting and now - since > short):
                    self._take(session, EvictedError(f"the session was idle for {now - since:.0f} seconds"))

    # pushes from other nodes

    async def _push_stream(self, stream: MessageStream, peer: PeerID) -> None:
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
        arrived = _open(request)
        session = self._sessions.get(arrived.metadata.session_id or "")
        if session is None:
            return  # its client is gone, or has found another route
        if len(session.waiting) >= self._limits.max_waiting_steps:
            raise BadRequestError("too many steps of one session are waiting")
        self._take(session, arrived)

    # forward and backward without a session

    async def _forward(self, request: Request) -> Response:
        self._refuse_if_leaving()
        metadata = rpc.parse(rpc.load(request.metadata))
        first, last, hidden, prompts = read_forward(request, metadata, self._served, self._limits)
        output = await self._run(
            self._engine.forward(hidden, first=first, last=last, prompts=prompts, adapter=metadata.active_adapter)
        )
        return Response(tensors=_encode_outputs([output], metadata))

    async def _backward(self, request: Request) -> Response:
        self._refuse_if_leaving()
        metadata = rpc.parse(rpc.load(request.metadata))
        first, last, hidden, grad, prompts = read_backward(request, metadata, self._served, self._limits)
        grads = await self._run(
            self._engine.backward(
                hidden, grad, first=first, last=last, prompts=prompts, adapter=metadata.active_adapter
            )
        )
        return Response(tensors=_encode_outputs([tensor for tensor in grads if tensor is not None], metadata))

    def _stream_of(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[MessageStream, PeerID], Awaitable[None]]:
        """The streaming variant of a unary RPC: the same request and response, cut into parts."""

        async def handle(stream: MessageStream, peer: PeerID) -> None:
            head = Request()

            async def parts() -> AsyncIterator[runtime_pb2.Tensor]:
                while (request := await stream.receive(Request)) is not None:
                    if request.uid and head.uid and request.uid != head.uid:
                        raise BadRequestError("the parts of a request name different blocks")
                    head.uid = head.uid or request.uid
                    head.metadata = head.metadata or request.metadata
                    for tensor in request.tensors:
                        yield tensor

            limit = 3 * self._limits.message_bytes(self._served.hidden_size)
            tensors = await asyncio.wait_for(join(parts(), max_bytes=limit), self._limits.request_timeout)
            response = await answer(Request(uid=head.uid, metadata=head.metadata, tensors=tensors))
            for tensor in response.tensors:
                for part in split(tensor):
                    await stream.send(Response(tensors=[part]))
            await stream.send_end()

        return handle

    async def _info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        stats = self._engine.stats()
        info: dict[str, Any] = {
            "version": f"swarm {__version__}",
            "dht_client_mode": False,
            "cache_tokens_available": stats.cache_block_tokens_free,
            "meter": {name: getattr(stats, name) for name in METER},
        }
        if request.uid:
            self._served.blocks_of(request.uid)
            hidden = BatchTensorDescriptor(1, 2048, self._served.hidden_size, dtype=self._served.dtype)
            extra = (BatchTensorDescriptor((), dtype=self._served.dtype), BatchTensorDescriptor((), dtype=torch.int64))
            info["forward_schema"] = ((hidden,), {})
            info["outputs_schema"] = (hidden,)
            info["keyword_names"] = ()
            info["inference_schema"] = ((hidden, *extra), {})
        return runtime_pb2.ExpertInfo(serialized_info=rpc.dump(info))

    # helpers

    async def _run(self, future: Any) -> Any:
        self._busy += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._busy -= 1

    def _refuse_if_leaving(self) -> None:
        if self._leaving:
            raise LeavingError("this node is shutting down")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _guarded(
        self, handle: Callable[[MessageStream, PeerID], Awaitable[None]]
    ) -> Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        """Wraps a stream's handler: its errors go to the peer, never further."""

        async def guarded(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            limit = self._limits.message_bytes(self._served.hidden_size)
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


def _about(arrived: _Arrived, **told: float) -> bytes:
    return rpc.dump({"step_id": arrived.metadata.step_id, **told})


def _unary(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request, P2PContext], Awaitable[Response]]:
    async def handle(request: Request, context: P2PContext) -> Response:
        try:
            return await answer(request)
        except Exception as error:
            if not isinstance(error, SwarmError):
                logger.exception("a request of %s failed", context.remote_id)
            raise RuntimeError(to_wire(error)) from None  # hivemind sends the text

    return handle


def _encode_outputs(outputs: list[torch.Tensor], metadata: rpc.Metadata) -> list[runtime_pb2.Tensor]:
    wanted = metadata.output_compression or (NONE,) * len(outputs)
    if len(wanted) != len(outputs) or any(compression not in COMPRESSIONS for compression in wanted):
        raise BadRequestError(f"output_compression is to be {len(outputs)} of {list(COMPRESSIONS)}")
    return [encode(output, compression) for output, compression in zip(outputs, wanted, strict=True)]
