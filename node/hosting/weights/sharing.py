"""A node's part in handing weights around: getting its own from peers, and giving them to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import numpy as np
from hivemind.p2p import PeerID
from numpy.typing import NDArray

from swarm.compute.threads import in_thread
from swarm.model.model_source import ModelSource
from swarm.model.tensors import block_tensors
from swarm.network.peer import Peer
from swarm.ranges import as_ranges
from swarm.weights.sharing.download import download
from swarm.weights.sharing.holders import Holder, announce_holder
from swarm.weights.sharing.manifest import keep_manifest
from swarm.weights.sharing.picker import Bits
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore

from ...output import Output
from ...settings import NodeSettings

logger = logging.getLogger(__name__)
_GOODBYE_SECONDS = 2.0


class Sharing:
    """Hands out what is in a store, gets what isn't, and tells the swarm what there is."""

    def __init__(self, peer: Peer, prefix: str, store: WeightStore, settings: NodeSettings, output: Output) -> None:
        self.peer, self.prefix, self.store = peer, prefix, store
        self._output, self._period, self._manifests = output, settings.update_period, manifests_folder(settings)
        self._seeder = Seeder(peer.p2p, store, upload_rate=settings.upload_rate)
        self._blocks: list[Bits] = []
        self._refused: set[PeerID] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()

    @property
    def root(self) -> str:
        """Of the manifest."""
        return self.store.manifest.root

    async def begin(self, stack: AsyncExitStack) -> None:
        """Hands out weights, and says so, until ``stack`` ends."""
        if self._announcing is None:
            await self._seeder.register()
            self._announcing = asyncio.create_task(self._announce_again())
            stack.push_async_callback(self._end)
            text = f"Weights of {self.prefix}: manifest {self.root}"
            self._output.event("sharing", text, manifest=self.root, prefix=self.prefix)

    async def _end(self) -> None:
        assert self._announcing is not None
        self._announcing.cancel()
        self._output.event("sent", f"{self._seeder.sent / 2**20:.1f} MiB sent", bytes=self._seeder.sent)
        with suppress(Exception):
            await asyncio.wait_for(self._tell(None), _GOODBYE_SECONDS)

    async def know(self, source: ModelSource) -> None:
        """Learns which pieces each block of the model is made of."""
        names = await in_thread(lambda: block_tensors(source))
        self._blocks = [self.store.pieces_of(each) for each in names]

    async def fetch_small(self) -> None:
        """Gets the config and what else everybody needs."""
        await self._fetch(self.store.small_pieces(), "Getting the model's config from peers")

    async def fetch(self, order: Sequence[int]) -> None:
        """Gets the blocks of a range, in this order. :meth:`know` comes first."""
        when = np.full(self.store.num_pieces, len(order), np.int64)
        for number, block in reversed(list(enumerate(order))):
            when[self._blocks[block]] = number
        text = f"Getting blocks {min(order)}:{max(order) + 1} from peers"
        await self._fetch(when < len(order), text, when)

    def has_block(self, block: int) -> bool:
        """Whether all of a block is here."""
        return not (self._blocks[block] & ~self.store.has).any()

    async def wait_for(self, block: int) -> None:
        """Waits until all of a block is here; another task fetches it."""
        while not self.has_block(block):
            self._arrived.clear()
            await self._arrived.wait()

    async def fetch_all(self) -> None:
        """Gets the whole checkpoint."""
        await self._fetch(np.ones(self.store.num_pieces, np.bool_), "Getting the weights from peers")

    async def _fetch(self, wanted: Bits, text: str, order: NDArray[np.int64] | None = None) -> None:
        store = self.store
        if not (wanted & ~store.has).any():
            return
        with self._output.stage("download", text) as stage:

            def report(done: int, total: int, count: int) -> None:
                stage(done, total, _from(count))
                self._arrived.set()

            sources = await download(
                self.peer,
                self.prefix,
                store,
                wanted,
                report,
                refused=self._refused,
                order=order,
                on_wait=self._say_waiting,
            )
        if store.is_whole:
            await in_thread(lambda: keep_manifest(store.directory, store.manifest, self._manifests))
        await self._announce()
        total = sum(sources.values())
        by_peer = {peer_id.to_base58(): count for peer_id, count in sources.items()}
        self._output.event("fetched", f"{total / 2**20:.1f} MiB {_from(len(by_peer))}", bytes=total, sources=by_peer)

    def _say_waiting(self) -> None:
        text = f"Another process downloads into {self.store.directory}: waiting for it…"
        self._output.event("waiting", text)

    async def _announce_again(self) -> None:
        while True:
            try:
                await self._announce()
            except Exception as error:
                logger.warning("could not announce the weights, will try again: %s", error)
            await self.peer.lookout.pause(self._period)

    async def _announce(self) -> None:
        blocks = as_ranges(block for block in range(len(self._blocks)) if self.has_block(block))
        await self._tell(Holder(self.root, blocks, self.store.is_whole))

    async def _tell(self, holder: Holder | None) -> None:
        ttl = max(60.0, 3 * self._period)
        await announce_holder(self.peer.dht, self.prefix, holder, ttl=ttl)


def manifests_folder(settings: NodeSettings) -> Path | None:
    """Where manifests are kept that were made by hashing; ``None``: the usual place."""
    return settings.cache_dir / "swarm-manifests" if settings.cache_dir is not None else None


def _from(count: int) -> str:
    return f"from {count} peer{'' if count == 1 else 's'}"
