"""Handing over what sessions have in the cache to the nodes that go on with them: when this one leaves, or sooner."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from hivemind.p2p import PeerID

from swarm.errors import BadRequestError, SwarmError
from swarm.wire import rpc
from swarm.wire.codec import dtype_name
from swarm.wire.fields import read
from swarm.wire.handover import Fetch
from swarm.wire.records import parse_span_uid
from swarm.wire.rpc import Request
from swarm.wire.stream import MessageStream

from ..engine.session_cache import SessionCache
from .chunks import ChunkFormat, write_chunk
from .session_stream import SessionStream
from .shared import Shared

_AT_ONCE = 8  # of others that fetch
_AHEAD = 2  # chunks that are read while another is sent
_SILENCE_SECONDS = 10.0
_ACTIVE_SECONDS = 10.0  # a session that was idle for longer is not waited for


@dataclass(eq=False)
class _Kept:
    session: SessionStream
    missing: set[int] = field(default_factory=set)  # blocks that nobody has fetched


class Handovers:
    """Gives what sessions have in the cache to whoever shows their key.

    Args:
        open: the sessions that are open.
    """

    def __init__(self, shared: Shared, open: Mapping[str, SessionStream]) -> None:
        self._shared, self._open = shared, open
        self._kept: dict[str, _Kept] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def keep(self, session_id: str, session: SessionStream) -> None:
        """Keeps the cache of a session that has ended, if its client may be about to go on elsewhere."""
        since, opening = session.idle_since, session.opening
        now = asyncio.get_running_loop().time()
        active = since is not None and now - since < _ACTIVE_SECONDS
        if active and opening.handover_key and session.rows.position and not self._shared.engine.span.state_bytes:
            self._kept[session_id] = _Kept(session, set(range(opening.first, opening.last)))

    def keeps(self, session: SessionStream) -> bool:
        """Whether a session's cache is kept here."""
        return any(kept.session is session for kept in self._kept.values())

    async def finish(self, timeout: float) -> None:
        """Waits until all that is kept has been fetched, or ``timeout`` seconds, and then keeps nothing."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._kept and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for session_id in list(self._kept):
            self._drop(session_id)

    async def give(self, stream: MessageStream, peer: PeerID) -> None:
        """``rpc_handover``: the first columns of a session, some of them in each message.

        Raises:
            SwarmError: there is no such session, or it is not what was asked for.
        """
        request = await asyncio.wait_for(stream.receive(Request), _SILENCE_SECONDS)
        if request is None:
            return
        fetch = _parse(request)
        session = self._find(fetch)
        async with self._slots:
            first, last = self._check(request.uid, fetch, session)
            async for chunk, end in self._read(session, first, last, min(fetch.columns, session.rows.position)):
                await asyncio.wait_for(stream.send(write_chunk(chunk, end)), _SILENCE_SECONDS)
            await stream.send_end()
            with suppress(SwarmError, asyncio.TimeoutError):  # until the other side has it all and closes the stream
                await asyncio.wait_for(stream.receive(Request), _SILENCE_SECONDS)
        kept = self._kept.get(fetch.session_id)
        if kept is not None:
            kept.missing.difference_update(range(first, last))
            if not kept.missing:
                self._drop(fetch.session_id)

    def _find(self, fetch: Fetch) -> SessionStream:
        kept = self._kept.get(fetch.session_id)
        session = kept.session if kept is not None else self._open.get(fetch.session_id)
        key = b"" if session is None else session.opening.handover_key
        if session is None or not key or not hmac.compare_digest(key, fetch.key):
            raise BadRequestError("there is no such session, or this is not its key")
        return session

    def _check(self, uid: str, fetch: Fetch, session: SessionStream) -> tuple[int, int]:
        try:
            first, last = parse_span_uid(uid, self._shared.served.prefix)
        except ValueError as error:
            raise BadRequestError(str(error)) from error
        wrong = mismatch(fetch, session, dtype_name(self._shared.engine.span.dtype))
        if wrong:
            raise BadRequestError(f"the session {wrong}: send everything again")
        if not session.opening.first <= first < last <= session.opening.last:
            raise BadRequestError(f"the session has no cache of the blocks {first}:{last}")
        return first, last

    async def _read(
        self, session: SessionStream, first: int, last: int, columns: int
    ) -> AsyncIterator[tuple[list[torch.Tensor], int]]:
        rows, engine = session.rows, self._shared.engine
        form: ChunkFormat = self._shared.chunk_format(first, last, rows.padding)
        ahead: deque[tuple[asyncio.Future[list[torch.Tensor]], int]] = deque()
        for start, end in form.divide(columns):
            reading = engine.visit(
                partial(SessionCache.read, session=rows, first=first, last=last, start=start, end=end)
            )
            ahead.append((asyncio.wrap_future(reading), end))
            if len(ahead) > _AHEAD:
                chunk, at = ahead.popleft()
                yield await chunk, at
        for chunk, at in ahead:
            yield await chunk, at

    def _drop(self, session_id: str) -> None:
        self._shared.engine.close(self._kept.pop(session_id).session.rows)


def mismatch(fetch: Fetch, session: SessionStream, dtype: str) -> str:
    """In what the session is not the one that ``fetch`` means; empty if it is."""
    if session.idle_since is None:
        return "has a step under way"
    if fetch.reorders != session.reorders:
        return "has other rows since"
    if fetch.left_padding != tuple(session.rows.padding):
        return "has other left padding"
    if fetch.adapter != session.opening.adapter:
        return "goes through another adapter"
    return f"has its cache in {dtype}" if fetch.dtype != dtype else ""


def _parse(request: Request) -> Fetch:
    try:
        return read(Fetch, rpc.load(request.metadata))
    except ValueError as error:
        raise BadRequestError(f"metadata of a request: {error}") from error
