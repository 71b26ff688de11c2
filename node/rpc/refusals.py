"""What a request fails with goes to the peer that sent it, never further."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from hivemind.p2p import P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm.errors import PeerLostError, SwarmError
from swarm.wire.error_text import to_wire
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

logger = logging.getLogger(__name__)
Answer: TypeAlias = Callable[[Request], Awaitable[Response]]
StreamHandler: TypeAlias = Callable[[MessageStream, PeerID], Awaitable[None]]


def over_stream(
    handle: StreamHandler, max_bytes: int
) -> Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """The handler of a stream as the daemon calls it; a message has ``max_bytes`` at most."""

    async def guarded(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = MessageStream(reader, writer, max_bytes=max_bytes)
        try:
            await handle(stream, info.peer_id)
        except PeerLostError:
            pass  # the peer went away; nobody is left to tell
        except Exception as error:
            if isinstance(error, SwarmError):
                logger.debug("refused a request of %s: %s", info.peer_id, error)
            else:
                logger.exception("a request of %s failed", info.peer_id)
            await stream.send_error(error)
            await stream.linger()
        finally:
            stream.close()

    return guarded


def unary(answer: Answer) -> Callable[[Request, P2PContext], Awaitable[Response]]:
    """The handler of a unary RPC as hivemind calls it."""

    async def handle(request: Request, context: P2PContext) -> Response:
        try:
            return await answer(request)
        except Exception as error:
            if not isinstance(error, SwarmError):
                logger.exception("a request of %s failed", context.remote_id)
            raise RuntimeError(to_wire(error)) from None  # hivemind sends the text

    return handle
