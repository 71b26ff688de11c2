"""Where the model is that a node is to serve: here, at peers, or on the Hub. Whether what is here can be handed on."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from swarm.compute.threads import in_thread
from swarm.errors import ModelError, UsageError
from swarm.model.model_source import ModelSource
from swarm.model.open_checkpoint import open_checkpoint
from swarm.model.source import BUNDLED, resolve, resolve_store
from swarm.network.peer import Peer
from swarm.weights.checkpoint import INDEX, SINGLE
from swarm.weights.sharing.find import find_store, weights_folder
from swarm.weights.sharing.holders import fetch_holders, nobody_has
from swarm.weights.sharing.manifest import SMALL_FILES, manifest_of
from swarm.weights.sharing.protocol import is_root
from swarm.weights.sharing.store import WeightStore

from ...output import Output
from ...settings import NodeSettings
from ..joining import join
from .sharing import Sharing, manifests_folder

logger = logging.getLogger(__name__)
WEIGHTS = ("hub", "peers", "auto")
Found: TypeAlias = tuple[ModelSource, Peer | None, Sharing | None]


async def find_source(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> Found:
    """The model that is asked for, from where ``settings.weights`` says. Also the peer, if it had to be started for
    that (it ends with ``stack``), and the node's part in sharing, if it has one; the sharing of weights that were here
    already has not begun.

    Raises:
        UsageError: the model can't be found or used, or is not the one that ``settings.manifest`` names.
    """
    _check(settings)
    source = await _look_here(settings, output)
    store = None
    if source is not None:
        unasked = not settings.seed and settings.manifest is None
        if unasked and (settings.weights == "hub" or source.path.is_file()):  # GGUF has no manifest
            return source, None, None
        store = await _seed_store(settings, source, output)
    peer = await join(settings, source, output)
    stack.push_async_callback(peer.stop)
    if source is None or store is None:
        return await _find_at_peers(settings, peer, output, stack)
    await _check_other_roots(peer, source.dht_prefix, store, settings)
    sharing = Sharing(peer, source.dht_prefix, store, settings, output)
    await sharing.know(source)
    return source, peer, sharing


def _check(settings: NodeSettings) -> None:
    if settings.weights not in WEIGHTS:
        raise UsageError(f"--weights is one of {', '.join(WEIGHTS)}; got {settings.weights!r}")
    if settings.manifest is not None and not is_root(settings.manifest):
        raise UsageError("--manifest is the root of a manifest, 64 hex digits, as swarm-node seed prints it")


async def _look_here(settings: NodeSettings, output: Output) -> ModelSource | None:
    """On this machine or, if weights come from the Hub, there. None: peers have to be asked."""
    if settings.weights == "peers":
        return None
    with output.stage("resolve", f"Looking up {settings.model}"):
        return await in_thread(lambda: _resolve(settings) if settings.weights == "hub" else whole_here(settings))


async def _find_at_peers(settings: NodeSettings, peer: Peer, output: Output, stack: AsyncExitStack) -> Found:
    """From peers, and from the Hub if they have nothing and it may be asked."""
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
    prefix, store = found
    sharing = Sharing(peer, prefix, store, settings, output)
    await sharing.begin(stack)
    await sharing.fetch_small()
    source = await in_thread(lambda: resolve_store(settings.model, store, prefix))
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
        manifest = await in_thread(
            lambda: manifest_of(source.path, manifests_folder(settings), lambda *done: report(*done))
        )
    known = {file.name for file in manifest.files}
    if missing := sorted(set(open_checkpoint(source).files.values()) - known):
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
        files = open_checkpoint(source).files.values()
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
    for name in sorted(set(open_checkpoint(source).files.values())) if weights else ():
        source.hub.fetch(name)
