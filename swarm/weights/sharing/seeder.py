"""Hands out pieces to whoever asks, a piece at a time and in turns."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from ...errors import BadRequestError, PeerLostError, RemoteError, SwarmError
from ...wire.rpc import Request, Response
from ...wire.stream import MessageStream
from .protocol import MANIFEST, MAX_REQUEST_BYTES, PIECES, PiecesRequest, dump_have, manifest_parts
from .store import WeightStore

logger = logging.getLogger(__name__)
_MAX_STREAMS, _MAX_STREAMS_OF_ONE = 128, 2
_IDLE_SECONDS = 60.0
_SEND_SECONDS = 120.0


class UploadLimit:
    """Spreads what is sent over time. Who waits is served in the order of coming, so peers take turns.

    Args:
        rate: bytes per second; 0 for no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at, self._turn = rate, 0.0, asyncio.Lock()

    async def wait(self, count: int) -> None:
        """Returns when ``count`` bytes may be sent."""
        if not self._rate:
            return
        loop = asyncio.get_running_loop()
        async with self._turn:
            if (delay := self._free_at - loop.time()) > 0:
                await asyncio.sleep(delay)
            self._free_at = max(self._free_at, loop.time()) + count / self._rate


class Seeder:
    """Serves one store to other peers.

    Attributes:
        sent: bytes of pieces sent so far.
    """

    def __init__(self, p2p: P2P, store: WeightStore, *, upload_rate: float = 0.0) -> None:
        self._p2p, self._store, self._limit = p2p, store, UploadLimit(upload_rate)
        self._streams: Counter[PeerID] = Counter()
        self.sent = 0

    async def register(self) -> None:
        """Starts to serve."""
        for name, answer in ((MANIFEST, self._manifest), (PIECES, self._pieces)):
            await self._p2p.add_binary_stream_handler(name, self._handler(answer))

    async def _manifest(self, stream: MessageStream) -> None:
        if await self._next(stream) is None:
            return
        for part in await asyncio.to_thread(lambda: list(manifest_parts(self._store.manifest))):
            await self._send(stream, part)
        await stream.send_end()

    async def _pieces(self, stream: MessageStream) -> None:
        while (request := await self._next(stream)) is not None:
            async for data in self._answers(request):
                await self._send(stream, data)

    async def _answers(self, request: PiecesRequest) -> AsyncIterator[bytes]:
        store = self._store
        if not request.pieces:
            yield dump_have(store.has, store.coming)
            return
        if request.file >= len(store.manifest.files):
            raise BadRequestError("there is no such file")
        count = len(store.manifest.files[request.file].pieces)
        for index in request.pieces:
            data = None
            if index < count:
                data = await asyncio.to_thread(store.read, int(store.first[request.file]) + index)
            yield data or b""
            self.sent += len(data or b"")

    async def _next(self, stream: MessageStream) -> PiecesRequest | None:
        message = await asyncio.wait_for(stream.receive(Request), _IDLE_SECONDS)
        if message is None:
            return None
        request = PiecesRequest.from_message(message)
        if request.root != self._store.manifest.root:
            raise RemoteError("this node has other weights")
        return request

    async def _send(self, stream: MessageStream, data: bytes) -> None:
        await self._limit.wait(len(data))
        await asyncio.wait_for(stream.send(Response(metadata=data)), _SEND_SECONDS)

    @contextmanager
    def _counted(self, peer_id: PeerID) -> Iterator[None]:
        """Counts a stream of a peer's while it is answered; a refusal that still goes out is none."""
        if self._streams[peer_id] >= _MAX_STREAMS_OF_ONE or self._streams.total() >= _MAX_STREAMS:
            raise RemoteError("too many ask this node for weights: ask others")
        self._streams[peer_id] += 1
        try:
            yield
        finally:
            self._streams[peer_id] -= 1
            self._streams += Counter()  # forgets who has none

    def _handler(
        self, answer: Callable[[MessageStream], Awaitable[None]]
    ) -> Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def handle(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = MessageStream(reader, writer, max_bytes=MAX_REQUEST_BYTES)
            try:
                with self._counted(info.peer_id):
                    await answer(stream)
            except (PeerLostError, asyncio.TimeoutError):
                pass  # the peer went away, or has nothing to ask
            except SwarmError as error:
                await stream.send_error(error)
                await stream.linger()
            except Exception as error:
                logger.exception("a request for weights of %s failed", info.peer_id)
                await stream.send_error(error)
            finally:
                stream.close()

        return handle
