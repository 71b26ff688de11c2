"""Which weights a swarm has for a model, and where they are kept on this machine."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from huggingface_hub import constants

from ...network.peer import Peer
from .holders import fetch_manifest, find_weights, possible_prefixes
from .store import WeightStore, find_root


def weights_folder(cache_dir: str | Path | None) -> Path:
    """Where weights from peers go, each in a directory of its own: nodes and clients of a machine share them."""
    return Path(cache_dir or constants.HF_HOME) / "swarm-weights"


async def find_store(
    peer: Peer,
    model: str,
    *,
    prefix: str | None,
    root: str | None,
    folder: Path,
    directory: Path | None = None,
    parts: bool = True,
) -> tuple[str, WeightStore] | None:
    """The name in the DHT and the store of what peers have, or of what an earlier run has left when nobody is up; None
    if there is neither.

    Args:
        prefix: the model's name in the DHT, if it isn't the usual one.
        root: the weights' manifest, if it is known.
        folder: the store is in a directory in it, unless ``directory`` names one.
        parts: take also what an earlier run has left unfinished.

    Raises:
        UsageError: peers have other weights, or several.
        ModelError: nobody sends the manifest, or it can't be kept.
    """
    found = await find_weights(peer, model, prefix=prefix, root=root)
    if found is None:
        for name in possible_prefixes(model, prefix):
            store = await asyncio.to_thread(_left, name, root, folder, directory)
            if store is not None and (store.is_whole or parts):
                return name, store
        return None
    place = directory or folder / f"{_safe(found.prefix)}-{found.root[:16]}"
    if find_root(place) == found.root and (kept := await asyncio.to_thread(WeightStore.open, place)):
        return found.prefix, kept
    manifest = await fetch_manifest(peer, found.root, found.holders)
    return found.prefix, await asyncio.to_thread(WeightStore.create, place, manifest)


def _left(prefix: str, root: str | None, folder: Path, directory: Path | None) -> WeightStore | None:
    """What an earlier run has left, if it is certain which is meant."""
    places = [directory] if directory is not None else list(folder.glob(f"{_safe(prefix)}-*"))
    known = [(place, find_root(place)) for place in places]
    left = [place for place, found in known if found is not None and root in (None, found)]
    return WeightStore.open(left[0]) if len(left) == 1 else None


def _safe(prefix: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", prefix)
