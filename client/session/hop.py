"""One hop of a session: an open stream to a node that holds the KV cache of some blocks."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from hivemind.p2p import PeerID

from swarm.errors import BadRequestError, PeerLostError, RemoteError, SwarmError
from swarm.network.calls import look_at
from swarm.network.daemon import LastingP2P
from swarm.network.reach import call_failed
from swarm.wire import rpc
from swarm.wire.codec import DTYPES, all_finite, decode, encode
from swarm.wire.handover import KEY_BYTES, TakeOver
from swarm.wire.limits import limits_of
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..routing.route import Leg
from .history import History
from .trace import Answered

_ANSWER_SECONDS = 1.0
_EMPTY, _EMPTY_INT64 = encode(rpc.EMPTY), encode(rpc.EMPTY_INT64)


class Hop:
    """Serves the blocks ``start:end`` in one session. Made by :meth:`open`; lives in one event loop."""

    def __init__(self, leg: Leg, model: str, session_id: str, stream: MessageStream, shape: tuple[int, int]) -> None:
        self.peer_id: PeerID = leg.peer_id
        self.start, self.end = leg.start, leg.end
        self.name = leg.span.info.public_name
        self.session_id = session_id
        self.history = History()
        self.on_push_failed: Callable[[str], None] | None = None
        self.limits = limits_of(leg.span.info)
        self.dtype = DTYPES.get(leg.span.info.torch_dtype or "")
        self.is_petals = leg.span.info.offer is None  # passes nothing on, and can't forget columns
        self.left_padding: tuple[int, ...] = ()  # of its rows, in the order in which it was opened
        self.reused = 0  # columns that it had in its cache when the session was opened
        self.restarts = 0  # of the own daemon, when it was opened
        self.reorders = 0  # steps that have reordered its rows
        self.failed_at: float | None = None  # by time.monotonic()
        self.cropped = False  # was to forget columns, and is to be replaced as it can't
        self._uid = span_uid(model, leg.start, leg.end)
        self._stream = stream
        self._rows, self._hidden_size = shape
        self._order: deque[str] = deque()  # steps without an answer; Petals answers in order and names none
        self._replies: dict[str, asyncio.Future[torch.Tensor]] = {}
        self._answered: dict[str, Answered] = {}
        self._key = b""
        self._failure: SwarmError | None = None
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        p2p: LastingP2P,
        leg: Leg,
        model: str,
        *,
        rows: int,
        hidden_size: int,
        max_length: int,
        left_padding: Sequence[int],
        prefix: tuple[bytes, list[bytes] | None] | None = None,
        adapter: str | None = None,
        wait: float = 0.0,
        max_bytes: int,
        timeout: float,
        hands_over: bool = False,
        take_over: TakeOver | None = None,
        pusher: PeerID | None = None,
    ) -> Hop:
        """Opens a session for ``rows`` rows of up to ``max_length`` columns at the leg's peer.

        Args:
            prefix: ``prefix_context`` and ``page_names`` of the session, where it may share cache with others.
            adapter: the LoRA adapter that all of it goes through, if any.
            wait: seconds to queue at a peer without room, beyond ``timeout``.
            hands_over: whether another hop may fetch what the session has in its cache.
            take_over: what it may fetch from another hop; it has time for that, too.
            pusher: the only one who may push steps into the session; None: anybody.

        Raises:
            PeerLostError: the peer can't be reached, or doesn't answer in ``timeout`` seconds.
            OutOfCacheError: the peer has no room for the session.
            RemoteError: the peer refuses.
        """
        fields: dict[str, Any] = {"max_length": max_length}
        if any(left_padding):
            fields["left_padding"] = list(left_padding)
        if prefix is not None:
            fields["prefix_context"], names = prefix
            if names is not None:
                fields["page_names"] = names
        if adapter:
            fields["active_adapter"] = adapter
        if wait:
            fields["alloc_timeout"] = wait
        if hands_over:
            fields["handover_key"] = os.urandom(KEY_BYTES)
        if pusher is not None:
            fields["pusher"] = pusher.to_base58()
        if take_over is not None:
            fields["take_over"] = take_over.to_dict()
        timeout += wait + (take_over.seconds if take_over is not None else 0.0)
        try:
            return await asyncio.wait_for(cls._open(p2p, leg, model, (rows, hidden_size), fields, max_bytes), timeout)
        except asyncio.TimeoutError as error:
            raise PeerLostError(f"{leg.peer_id} does not answer") from error

    @classmethod
    async def _open(
        cls,
        p2p: LastingP2P,
        leg: Leg,
        model: str,
        shape: tuple[int, int],
        fields: dict[str, Any],
        max_bytes: int,
    ) -> Hop:
        try:
            _, reader, writer = await p2p.call_binary_stream_handler(leg.peer_id, rpc.handle_name(rpc.INFERENCE))
        except Exception as error:
            raise call_failed(error) from error
        hop = cls(leg, model, str(uuid.uuid4()), MessageStream(reader, writer, max_bytes=max_bytes), shape)
        hop.restarts = p2p.restarts
        try:
            fields["session_id"], hop._key = hop.session_id, fields.get("handover_key", b"")
            # no columns yet: the answer says that the session is there, so that others may push to it
            await hop._stream.send(hop._request(fields))
            response = await hop._stream.receive(Response)
            if response is None:
                raise PeerLostError(f"{leg.peer_id} ended the session")
            reused = rpc.load(response.metadata).get("reused")
            hop.reused = max(0, reused) if type(reused) is int else 0
        except BaseException:
            hop._stream.close()
            raise
        hop._reader = asyncio.create_task(hop._read())
        return hop

    async def send(
        self,
        step_id: str,
        start: int,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None,
        next_hops: Sequence[Hop],
        page_names: list[bytes] | None = None,
    ) -> None:
        """Sends a step (``hidden`` ``[rows, T, H]``); the hop passes its output on along ``next_hops``."""
        if self._failure is not None:
            raise self._failure  # says more than that the stream is closed
        fields: dict[str, object] = {"session_id": self.session_id, "step_id": step_id, "start": start}
        if next_hops:
            hops = [rpc.NextHop(hop.peer_id, hop.session_id, hop.start, hop.end) for hop in next_hops]
            fields["next_servers"] = [hop.to_tuple() for hop in hops]
        if page_names is not None:
            fields["page_names"] = page_names
        if self.dtype is not None and hidden.dtype != self.dtype:
            hidden = hidden.to(self.dtype)
        request = self._request(fields, hidden, hypo_ids)
        self.expect(step_id)
        await self._stream.send(request)

    def expect(self, step_id: str) -> None:
        """Notes that the hop is to answer this step, sent or pushed to it by now or soon."""
        if step_id not in self._replies:
            self._order.append(step_id)
            self._replies[step_id] = asyncio.get_running_loop().create_future()
            if self._failure is not None:
                self._fail(self._failure)

    def has_answered(self, step_id: str) -> bool:
        """Whether the answer to a step is here, for a step that was pushed."""
        reply = self._replies.get(step_id)
        return reply is not None and reply.done() and reply.exception() is None

    async def reply(self, step_id: str, timeout: float) -> torch.Tensor | None:
        """The hop's output for a step, ``[rows, T, H]``; ``None`` if it says nothing for ``timeout`` seconds.

        Raises:
            SwarmError: the hop failed, or answered nonsense.
        """
        reply = self._replies[step_id]
        if not reply.done():
            await asyncio.wait({reply}, timeout=timeout)
        if not reply.done():
            return None
        return reply.result()

    def answered(self, step_id: str) -> Answered | None:
        """When the answer to a step came, and what it says of its time; until it is forgotten."""
        return self._answered.get(step_id)

    def forget(self, step_id: str) -> None:
        """Lets go of a step's answer."""
        self._answered.pop(step_id, None)
        reply = self._replies.pop(step_id, None)
        if reply is not None and reply.done():
            look_at(reply)

    def handover(self, seconds: float) -> TakeOver | None:
        """What another hop, which has ``seconds`` for it, takes over from this one; None if there is nothing."""
        if not self._key or not self.history.position:
            return None
        return TakeOver(self.peer_id, self.session_id, self._key, self.history.position, self.reorders, seconds)

    async def let_push(self, peer_id: PeerID) -> None:
        """From now on only this peer may push steps into the session. Never fails: if the hop has, its next step says
        so."""
        step_id = uuid.uuid4().hex
        request = self._request({"session_id": self.session_id, "step_id": step_id, "pusher": peer_id.to_base58()})

        async def tell() -> None:
            await self._stream.send(request)
            await self.reply(step_id, _ANSWER_SECONDS)

        self.expect(step_id)
        with suppress(SwarmError, asyncio.TimeoutError):
            await asyncio.wait_for(tell(), _ANSWER_SECONDS)
        self.forget(step_id)

    async def close(self) -> None:
        """Ends the session at the node; never fails."""
        try:
            with suppress(Exception):
                await asyncio.wait_for(self._stream.send(Request()), 1.0)
                await asyncio.wait_for(self._stream.send_end(), 1.0)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drops the connection: the node notices."""
        if self._reader is not None:
            self._reader.cancel()
        self._stream.close()
        self._fail(PeerLostError("the hop was closed"))

    async def _read(self) -> None:
        try:
            while (response := await self._stream.receive(Response)) is not None:
                self._take(response)
            raise PeerLostError(f"{self.peer_id} ended the session")
        except SwarmError as error:
            self._fail(error)
        except Exception as error:
            self._fail(RemoteError(f"{self.peer_id} answered nonsense: {error}"))

    def _take(self, response: Response) -> None:
        fields = rpc.load(response.metadata)
        failed = fields.get("push_failed")
        if failed is not None:
            if self.on_push_failed is not None:
                self.on_push_failed(failed)
            return
        step_id = fields.get("step_id")
        if not isinstance(step_id, str):
            step_id = self._order[0] if self._order else ""
        if step_id in self._order:
            self._order.remove(step_id)
        reply = self._replies.get(step_id)
        if reply is None or reply.done():
            return
        reply.set_result(self._check(response))
        now = asyncio.get_running_loop().time()
        self._answered[step_id] = Answered(now, _seconds(fields, "queue_s"), _seconds(fields, "compute_s"))

    def _check(self, response: Response) -> torch.Tensor:
        if len(response.tensors) != 1:
            raise RemoteError(f"{self.peer_id} answered with {len(response.tensors)} tensors")
        message = response.tensors[0]
        elements = self._rows * self._hidden_size * max(1, message.size[1] if len(message.size) == 3 else 1)
        try:
            output = decode(message, max_elements=elements)
        except BadRequestError as error:
            raise RemoteError(f"{self.peer_id} answered nonsense: {error}") from error
        if output.ndim != 3 or output.shape[0] != self._rows or output.shape[2] != self._hidden_size:
            raise RemoteError(f"{self.peer_id} answered with a tensor of shape {tuple(output.shape)}")
        if not output.is_floating_point() or not all_finite(output):
            raise RemoteError(f"{self.peer_id} answered with numbers that are not finite")
        return output

    def _request(
        self, fields: Mapping[str, object], hidden: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> Request:
        """A message with ``hidden`` ``[rows, T, H]``; by default without columns."""
        if hidden is None:
            hidden = torch.empty(self._rows, 0, self._hidden_size, dtype=self.dtype or torch.float32)
        reorder = _EMPTY_INT64 if hypo_ids is None else encode(hypo_ids)
        return Request(uid=self._uid, tensors=[encode(hidden), _EMPTY, reorder], metadata=rpc.dump(fields))

    def _fail(self, error: SwarmError) -> None:
        if self._failure is None:
            self._failure, self.failed_at = error, time.monotonic()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(self._failure)
                look_at(reply)


def _seconds(fields: Mapping[str, object], name: str) -> float:
    """A time that a node tells; 0 if it doesn't, or not in earnest."""
    value = fields.get(name)
    return value if isinstance(value, float) and 0 <= value < 1e6 else 0.0
