"""Where a client gets the model's ends from: a directory, the Hub, or peers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import tqdm

from swarm.compute.threads import in_thread
from swarm.errors import ModelError, UsageError
from swarm.model.model_source import ModelSource
from swarm.model.source import is_here, resolve, resolve_store
from swarm.model.tensors import end_tensors
from swarm.network.peer import Peer
from swarm.weights.hub.one_file import HubRepo
from swarm.weights.sharing.download import download
from swarm.weights.sharing.find import find_store, weights_folder
from swarm.weights.sharing.holders import nobody_has
from swarm.weights.sharing.manifest import SMALL_FILES
from swarm.weights.sharing.picker import Bits
from swarm.weights.sharing.protocol import is_root
from swarm.weights.sharing.store import WeightStore
from swarm.wire.dht_prefix import check_dht_prefix

from ..runtime import Runtime

logger = logging.getLogger(__name__)
WEIGHTS = ("hub", "peers", "auto")


def find_model(
    model: str,
    initial_peers: Sequence[str],
    *,
    weights: str = "hub",
    manifest: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    dht_prefix: str | None = None,
    startup_timeout: float = 30.0,
) -> ModelSource:
    """The model, of which what a client needs is here or can be read from the Hub.

    Args:
        weights: ``"hub"``: a directory here, or else the Hub. ``"peers"``: nodes of the swarm that hand weights out;
            ``model`` is then its name there, or its manifest's root. ``"auto"``: a directory here, else peers, else the
            Hub. From peers come only the config, the tokenizer and the ends, each piece checked against the manifest.
        manifest: the root of the weights' manifest. Without it, peers are believed which weights are right.

    Raises:
        UsageError: the arguments don't fit together, or peers have other weights, or several.
        ModelError: the model can't be found or used.
        ConnectError: none of ``initial_peers`` answers.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights is one of {', '.join(WEIGHTS)}; got {weights!r}")
    if manifest is not None and not is_root(manifest):
        raise UsageError("manifest is the root of a manifest, 64 hex digits, as swarm-node seed prints it")
    elsewhere = weights == "hub" or (weights == "auto" and is_here(model))
    if elsewhere and manifest is not None:
        raise UsageError("manifest is for weights from peers: say weights='peers', or leave it out")
    if dht_prefix is not None:
        check_dht_prefix(dht_prefix)
    found = None
    if not elsewhere:
        if not initial_peers:
            raise UsageError("say which swarm: initial_peers=['/ip4/…/tcp/…/p2p/…'], as printed by swarm-node serve")
        required = weights == "peers" or manifest is not None or is_root(model)
        runtime, peers = Runtime.get(), tuple(initial_peers)

        async def find() -> ModelSource | None:
            peer = await runtime.join(peers, startup_timeout=startup_timeout)
            try:
                return await _from_peers(peer, model, dht_prefix, manifest, weights_folder(cache_dir), required)
            finally:
                await runtime.leave(peers)

        found = runtime.run(find())
    if found is not None:
        return found
    source = resolve(model, revision=revision, token=token, cache_dir=cache_dir, dht_prefix=dht_prefix)
    if source.hub is not None:
        _fetch_small_files(source.hub)
    return source


def _fetch_small_files(hub: HubRepo) -> None:
    """The tokenizer and the model's other small files, to where its config is (:attr:`ModelSource.path`)."""
    if constants.HF_HUB_OFFLINE:
        return
    for name in sorted(SMALL_FILES):
        known = try_to_load_from_cache(hub.name, name, cache_dir=hub.cache_dir, revision=hub.revision)
        if known is not None:  # it is here, or known not to be there
            continue
        try:
            hub.fetch(name)
        except ModelError as error:  # no network, though the config is cached: then these may be, too, or not be there
            logger.warning("%s", error)
            return


async def _from_peers(
    peer: Peer, model: str, prefix: str | None, root: str | None, folder: Path, required: bool
) -> ModelSource | None:
    found = await find_store(peer, model, prefix=prefix, root=root, folder=folder)
    if found is None:
        if required:
            raise await nobody_has(peer, model)
        return None
    prefix, store = found
    await _fetch(peer, prefix, store, store.small_pieces, "config and tokenizer")
    source = await in_thread(lambda: resolve_store(model, store, prefix))
    await _fetch(peer, prefix, store, lambda: store.pieces_of(end_tensors(source)), "embeddings and head")
    return source


async def _fetch(peer: Peer, prefix: str, store: WeightStore, pieces: Callable[[], Bits], what: str) -> None:
    """Gets pieces that aren't here yet; a bar on stderr, as the Hub's library has it, shows how far it is."""
    wanted = await in_thread(pieces)
    if not (wanted & ~store.has).any():
        return
    with tqdm(unit="B", unit_scale=True, desc=f"{what} from peers") as bar:
        shown: Any = bar

        def report(done: int, total: int, count: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        def say_waiting() -> None:
            shown.set_postfix_str("waits for another process that downloads the same")

        await download(peer, prefix, store, wanted, report, on_wait=say_waiting)
