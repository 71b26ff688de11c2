"""Fetching what a session is to begin with from the node that has it in its cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from swarm.wire import rpc
from swarm.wire.codec import dtype_name
from swarm.wire.handover import HANDOVER, Fetch, TakeOver
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..engine.scheduling.row_group import RowGroup
from ..engine.session_cache import SessionCache
from .chunks import read_chunk
from .requests import Opening
from .shared import Shared


async def fetch_columns(shared: Shared, source: TakeOver, opening: Opening, rows: RowGroup) -> AsyncIterator[int]:
    """Puts the columns of the session at ``source`` into ``rows``, a new session. Yields how many are there by now.

    Raises:
        SwarmError: the other node refuses, or sends nonsense.
        Exception: it can't be reached.
    """
    columns = min(source.columns, opening.max_length)
    form = shared.chunk_format(opening.first, opening.last, rows.padding)
    fetch = Fetch(
        source.session_id,
        source.key,
        columns,
        source.reorders,
        tuple(rows.padding),
        opening.adapter,
        dtype_name(form.dtype),
    )
    uid = span_uid(shared.served.prefix, opening.first, opening.last)
    _, reader, writer = await shared.p2p.call_binary_stream_handler(source.peer_id, rpc.handle_name(HANDOVER))
    stream = MessageStream(reader, writer, max_bytes=form.message_bytes)
    try:
        await stream.send(Request(uid=uid, metadata=rpc.dump(vars(fetch))))
        at = 0
        while (response := await stream.receive(Response)) is not None:
            end, tensors = read_chunk(response, form, at, columns)
            write = partial(SessionCache.write, session=rows, start=at, end=end, tensors=tensors, columns=columns)
            await asyncio.wrap_future(shared.engine.visit(write))
            at = end
            yield at
    finally:
        stream.close()  # which tells the other node that all of it has come
