"""Gets pieces from all peers that have them, at once, and checks each."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hivemind.p2p import PeerID
from numpy.typing import NDArray

from ...chance import CHANCE
from ...errors import BadRequestError, ModelError
from ...network.peer import Peer
from ...wire.rpc import Response
from ...wire.stream import MessageStream
from .holders import CONNECT_SECONDS, fetch_holders
from .picker import FEWEST_ASKED, Bits, Picker, next_depth
from .protocol import MAX_REPLY_BYTES, PIECES, PiecesRequest, load_have
from .store import WeightStore

logger = logging.getLogger(__name__)
LOOK_SECONDS = 2.0
"""Between two looks for more peers in the DHT."""
HAVE_SECONDS = 0.3
"""Between two questions to a peer what it has by now."""
REPLY_SECONDS = 60.0
RETRY_SECONDS = 5.0
MAX_LINKS = 32
"""Peers that are asked at a time."""
PATIENCE_SECONDS = 120.0
"""Without a single piece; then nobody is expected any more."""

_LOCK_SECONDS = 0.5  # between two looks whether another process is done

Report = Callable[[int, int, int], None]
"""``report(bytes done, bytes to get, peers that send)``."""


class WrongPieceError(Exception):
    """A peer sent something else than it was asked for."""


class _DiskError(Exception):
    """Of our own."""


class Download:
    """Gets the pieces ``wanted`` (``[pieces]`` of bool) into a store whose lock the caller has. ``refused`` are peers
    that have sent wrong pieces; it grows. ``order`` (``[pieces]``): those with smaller numbers are got first."""

    def __init__(
        self,
        peer: Peer,
        prefix: str,
        store: WeightStore,
        wanted: Bits,
        report: Report,
        refused: set[PeerID],
        *,
        order: NDArray[np.int64] | None = None,
    ) -> None:
        self._peer, self._prefix, self._store, self._report = peer, prefix, store, report
        self._picker: Picker[PeerID] = Picker(wanted & ~store.has, refused, order=order)
        self._refused = refused
        self._total, self._done = store.size_of(self._picker.missing), 0
        self._sources: Counter[PeerID] = Counter()
        self._links: dict[PeerID, asyncio.Task[None]] = {}
        self._sending: set[PeerID] = set()
        self._writing = ThreadPoolExecutor(1)  # one: the store is written by one thread
        self._over = asyncio.Event()
        self._failure: _DiskError | None = None

    async def run(self) -> Mapping[PeerID, int]:
        """Gets it all; returns the bytes that came from each peer.

        Raises:
            ModelError: no room on the disk, or nobody has sent anything for :data:`PATIENCE_SECONDS`. What is here is
                kept.
        """
        free = shutil.disk_usage(self._store.directory).free
        if self._total > free:
            raise ModelError(
                f"{self._total / 2**30:.1f} GiB are to be fetched, but there are {free / 2**30:.1f} GiB left where "
                f"{self._store.directory} is: make room, or name another directory"
            )
        self._report(0, self._total, 0)
        looking = asyncio.create_task(self._look())
        try:
            await self._wait()
        finally:
            self._over.set()  # too: Python 3.11's wait_for may swallow a cancellation
            tasks = [looking, *self._links.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writing.shutdown()
        return self._sources

    async def _wait(self) -> None:
        before = -1
        while self._picker.missing.any():
            if self._done == before:
                raise ModelError(
                    f"{np.count_nonzero(self._picker.missing)} pieces are missing and nobody has sent one for "
                    f"{PATIENCE_SECONDS:.0f} s: see that a node that has them is up, and start again (what is here is "
                    "kept)"
                )
            before = self._done
            try:
                await asyncio.wait_for(self._over.wait(), PATIENCE_SECONDS)
            except asyncio.TimeoutError:
                continue
            if self._failure is not None:
                raise ModelError(f"can't keep weights in {self._store.directory}: {self._failure}") from self._failure

    async def _look(self) -> None:
        while not self._over.is_set():
            try:
                holders = await fetch_holders(self._peer.dht, self._prefix)
            except Exception as error:
                logger.warning("could not look for weights, will try again: %s", error)
                holders = {}
            for peer_id, holder in CHANCE.sample(list(holders.items()), len(holders)):
                known = peer_id in self._links or peer_id in self._refused
                if holder.root == self._store.manifest.root and not known and len(self._links) < MAX_LINKS:
                    self._links[peer_id] = asyncio.create_task(self._link(peer_id))
            await asyncio.sleep(LOOK_SECONDS)

    async def _link(self, peer_id: PeerID) -> None:
        """Asks a peer for as long as it answers."""
        try:
            await self._connect(peer_id)
        except WrongPieceError as error:
            logger.warning("%s is asked no more: %s", peer_id, error)
            self._picker.refuse(peer_id)
        except _DiskError as error:
            self._failure = error
            self._over.set()
        except Exception as error:
            logger.debug("%s sends no weights at the moment: %r", peer_id, error)
        finally:
            self._picker.leave(peer_id)
            self._sending.discard(peer_id)
            self._tell_coming()
        if not self._over.is_set():
            await asyncio.sleep(RETRY_SECONDS)
            del self._links[peer_id]

    async def _connect(self, peer_id: PeerID) -> None:
        call = self._peer.p2p.call_binary_stream_handler(peer_id, PIECES)
        _, reader, writer = await asyncio.wait_for(call, CONNECT_SECONDS)
        stream = MessageStream(reader, writer, max_bytes=MAX_REPLY_BYTES)
        try:
            await self._talk(peer_id, stream)
        finally:
            stream.close()

    async def _talk(self, peer_id: PeerID, stream: MessageStream) -> None:
        loop = asyncio.get_running_loop()
        root, told, depth = self._store.manifest.root, -HAVE_SECONDS, FEWEST_ASKED
        asked = deque[tuple[int | None, float]]()  # None: what it has
        while not self._over.is_set():
            if loop.time() - told >= HAVE_SECONDS and all(piece is not None for piece, _ in asked):
                await stream.send(PiecesRequest(root).to_message())
                told = loop.time()
                asked.append((None, told))
            while len(asked) < depth and (piece := self._picker.next(peer_id, loop.time())) is not None:
                self._store.coming[piece] = True
                number, index = self._store.place(piece)
                await stream.send(PiecesRequest(root, number, (index,)).to_message())
                asked.append((piece, loop.time()))
            if not asked:
                await asyncio.sleep(max(0.01, told + HAVE_SECONDS - loop.time()))
                continue
            reply = await asyncio.wait_for(stream.receive(Response), REPLY_SECONDS)
            if reply is None:
                return
            piece, since = asked.popleft()
            if piece is not None:
                depth = next_depth(depth, loop.time() - since)
            await self._take(peer_id, piece, reply.metadata)

    async def _take(self, peer_id: PeerID, piece: int | None, data: bytes) -> None:
        if piece is None:
            try:
                self._picker.tell(peer_id, *load_have(data, self._store.num_pieces))
            except BadRequestError as error:
                raise WrongPieceError(str(error)) from error
            return
        if not data:
            self._picker.lacks(peer_id, piece)
            return
        loop = asyncio.get_running_loop()
        try:
            right = await loop.run_in_executor(self._writing, self._store.write, piece, data)
        except OSError as error:
            raise _DiskError(error.strerror or str(error)) from error
        if not right:
            raise WrongPieceError("it has sent bytes that are not the piece")
        self._sending.add(peer_id)
        if self._picker.arrived(peer_id, piece):
            self._done += len(data)
            self._sources[peer_id] += len(data)
            self._report(self._done, self._total, len(self._sending))
        if not self._picker.missing.any():
            self._over.set()

    def _tell_coming(self) -> None:
        self._store.coming[:] = False
        self._store.coming[list(self._picker.asked)] = True


async def download(
    peer: Peer,
    prefix: str,
    store: WeightStore,
    wanted: Bits,
    report: Report,
    *,
    refused: set[PeerID] | None = None,
    order: NDArray[np.int64] | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> Mapping[PeerID, int]:
    """As :class:`Download`, with the store's lock: waits while another process downloads into it, after ``on_wait``.

    Raises:
        ModelError: as :meth:`Download.run`, or what has come can't be kept.
    """
    waited = False
    while not store.try_lock():
        if not waited:
            waited = True
            on_wait()
        await asyncio.sleep(_LOCK_SECONDS)
    try:
        await asyncio.to_thread(store.refresh)
        coming = Download(peer, prefix, store, wanted, report, set() if refused is None else refused, order=order)
        return await coming.run()
    finally:
        try:
            store.finish()
        except OSError as error:
            raise ModelError(f"can't keep weights in {store.directory}: {error.strerror or error}") from error
