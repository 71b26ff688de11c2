"""A node's part in handing weights around: where its own come from, and giving them to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import numpy as np
from hivemind.p2p import PeerID
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from numpy.typing import NDArray

from swarm.compute.threads import in_thread
from swarm.errors import ModelError, UsageError
from swarm.model.skeleton import block_tensors
from swarm.model.source import BUNDLED, ModelSource, resolve, resolve_store
from swarm.network.peer import Peer
from swarm.ranges import as_ranges
from swarm.weights.checkpoint import INDEX, SINGLE, Checkpoint
from swarm.weights.sharing.download import download
from swarm.weights.sharing.find import find_store, weights_folder
from swarm.weights.sharing.holders import Holder, announce_holder, fetch_holders, nobody_has
from swarm.weights.sharing.manifest import SMALL_FILES, keep_manifest, manifest_of
from swarm.weights.sharing.picker import Bits
from swarm.weights.sharing.protocol import is_root
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore

from ..output import Output
from ..settings import NodeSettings

logger = logging.getLogger(__name__)
WEIGHTS = ("hub", "peers", "auto")
_GOODBYE_SECONDS = 2.0


class Sharing:
    """Hands out what is in a store, gets what isn't, and tells the swarm what there is."""

    def __init__(self, peer: Peer, prefix: str, store: WeightStore, settings: NodeSettings, output: Output) -> None:
        self.peer, self.prefix, self.store = peer, prefix, store
        self._output, self._period, self._manifests = output, settings.update_period, _manifests(settings)
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
        """From now on it is known which pieces are which block's."""
        names = await in_thread(lambda: block_tensors(source))
        self._blocks = [self.store.pieces_of(each) for each in names]

    async def fetch_small(self) -> None:
        """Gets the config and what else everybody needs."""
        await self._fetch(self.store.small_pieces(), "Getting the model's config from peers")

    async def fetch(self, order: Sequence[int]) -> None:
        """Gets the blocks of a range, in this order, which :meth:`know` must have made known."""
        when = np.full(self.store.num_pieces, len(order), np.int64)
        for number, block in reversed(list(enumerate(order))):
            when[self._blocks[block]] = number
        text = f"Getting blocks {min(order)}:{max(order) + 1} from peers"
        await self._fetch(when < len(order), text, when)

    def has_block(self, block: int) -> bool:
        """Whether all of a block is here."""
        return not (self._blocks[block] & ~self.store.has).any()

    async def wait_for(self, block: int) -> None:
        """Returns once all of a block is here, which somebody else sees to."""
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
            await asyncio.sleep(self._period)

    async def _announce(self) -> None:
        blocks = as_ranges(block for block in range(len(self._blocks)) if self.has_block(block))
        await self._tell(Holder(self.root, blocks, self.store.is_whole))

    async def _tell(self, holder: Holder | None) -> None:
        ttl = max(60.0, 3 * self._period)
        await announce_holder(self.peer.dht, self.prefix, holder, ttl=ttl)


async def find_source(
    settings: NodeSettings, output: Output, stack: AsyncExitStack
) -> tuple[ModelSource, Peer | None, Sharing | None]:
    """The model that is asked for, from where ``settings.weights`` says; also the peer, if it had to be started for
    that (it ends with ``stack``), and the node's part in sharing, if it has one; of weights that are here already, that
    has not begun.

    Raises:
        UsageError: the model can't be found or used, or is not the one that ``settings.manifest`` names.
    """
    if settings.weights not in WEIGHTS:
        raise UsageError(f"--weights is one of {', '.join(WEIGHTS)}; got {settings.weights!r}")
    if settings.manifest is not None and not is_root(settings.manifest):
        raise UsageError("--manifest is the root of a manifest, 64 hex digits, as swarm-node seed prints it")
    source = None
    if settings.weights != "peers":
        with output.stage("resolve", f"Looking up {settings.model}"):
            source = await in_thread(lambda: _resolve(settings) if settings.weights == "hub" else whole_here(settings))
    unasked = not settings.seed and settings.manifest is None
    if source is not None and unasked and (settings.weights == "hub" or source.path.is_file()):  # GGUF has no manifest
        return source, None, None
    if source is not None:
        store = await _seed_store(settings, source, output)
    peer = await Peer.start(settings.peer)
    stack.push_async_callback(peer.stop)
    if source is not None:
        await _check_other_roots(peer, source.dht_prefix, store, settings)
        sharing = Sharing(peer, source.dht_prefix, store, settings, output)
        await sharing.know(source)
        return source, peer, sharing

    found = await find_store(
        peer,
        settings.model,
        prefix=settings.dht_prefix,
        root=settings.manifest,
        folder=weights_folder(settings.cache_dir),
        directory=settings.store,
        parts=settings.weights == "peers",
    )
    if found is None:
        if settings.weights == "peers" or settings.manifest is not None:
            raise await nobody_has(peer, settings.model)
        with output.stage("resolve", f"Looking up {settings.model} on the Hub"):
            return await in_thread(lambda: _resolve(settings)), peer, None
    prefix, kept = found
    sharing = Sharing(peer, prefix, kept, settings, output)
    await sharing.begin(stack)
    await sharing.fetch_small()
    source = await in_thread(lambda: resolve_store(settings.model, kept, prefix))
    await sharing.know(source)
    return source, peer, sharing


async def _seed_store(settings: NodeSettings, source: ModelSource, output: Output) -> WeightStore:
    """The checkpoint that is here."""
    if source.path.is_file():
        raise UsageError(f"{source.path} is a GGUF file: only checkpoints in safetensors form can be handed out")
    if source.hub is not None:
        with output.stage("whole", "Looking for files that are missing"):
            await in_thread(lambda: make_whole(source, weights=settings.weights == "hub"))
    with output.stage("download", "Hashing the checkpoint (once)") as report:
        manifest = await in_thread(lambda: manifest_of(source.path, _manifests(settings), lambda *done: report(*done)))
    known = {file.name for file in manifest.files}
    if missing := sorted(set(Checkpoint.open(source).files.values()) - known):
        raise ModelError(f"{missing[0]} is missing from {source.path}: only a whole checkpoint can be handed out")
    if settings.manifest not in (None, manifest.root):
        raise UsageError(
            f"the weights in {source.path} have the manifest {manifest.root}, not {settings.manifest}: check "
            "--manifest, or get the right weights with --weights peers"
        )
    return WeightStore(source.path, manifest)


async def _check_other_roots(peer: Peer, prefix: str, store: WeightStore, settings: NodeSettings) -> None:
    if settings.manifest is not None:
        return  # whoever gives the root knows which are right
    root = store.manifest.root
    if others := {holder.root for holder in (await fetch_holders(peer.dht, prefix)).values()} - {root}:
        raise UsageError(
            f"this swarm has other weights under the name {prefix!r}: their manifest is {', '.join(sorted(others))}, "
            f"that of {store.directory} is {root}. Get theirs with --weights peers, name these differently with "
            f"--dht-prefix, or say with --manifest {root} that these are right"
        )


def _resolve(settings: NodeSettings) -> ModelSource:
    return resolve(
        settings.model,
        revision=settings.revision,
        token=settings.token,
        cache_dir=settings.cache_dir,
        dht_prefix=settings.dht_prefix,
    )


def whole_here(settings: NodeSettings) -> ModelSource | None:
    """The model, if all of it is on this machine."""
    if Path(settings.model).expanduser().exists() or settings.model in BUNDLED:
        return _resolve(settings)
    try:
        cached = try_to_load_from_cache(settings.model, "config.json", settings.cache_dir, settings.revision)
    except HFValidationError:
        return None
    if not isinstance(cached, str):
        return None
    try:
        source = _resolve(settings)
        if not any((source.path / name).is_file() for name in (SINGLE, INDEX)):
            return None
        files = Checkpoint.open(source).files.values()
    except ModelError as error:  # no network, for one: peers may have it
        logger.info("%s", error)
        return None
    return source if all((source.path / file).is_file() for file in files) else None


def make_whole(source: ModelSource, *, weights: bool) -> None:
    """Of a Hub model what is missing here: all nodes must have the same files, or their manifests would differ."""
    assert source.hub is not None
    for name in sorted(SMALL_FILES):
        try:
            source.hub.fetch(name)
        except ModelError as error:
            logger.info("%s", error)  # no network
    for name in sorted(set(Checkpoint.open(source).files.values())) if weights else ():
        source.hub.fetch(name)


def _manifests(settings: NodeSettings) -> Path | None:
    return settings.cache_dir / "swarm-manifests" if settings.cache_dir is not None else None


def _from(count: int) -> str:
    return f"from {count} peer{'' if count == 1 else 's'}"
