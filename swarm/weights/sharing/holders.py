"""Who has weights: the DHT's record of it, and the manifest that a root names.

Key ``{prefix}.weights``, subkey the PeerID in base58, value ``{"root": …, "blocks": [[start, end], …], "whole": …}``:
what can be asked for there. Which single pieces a peer has, only the peer itself says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from hivemind.dht import DHTNode
from hivemind.p2p import P2P, PeerID

from ...chance import CHANCE
from ...errors import ModelError, SwarmError, UsageError
from ...network import dht
from ...network.clock import CLOCK
from ...network.peer import Peer
from ...wire.dht_prefix import default_dht_prefix
from ...wire.fields import read
from ...wire.peer_id import read_peer_id
from ...wire.rpc import Response
from ...wire.stream import MessageStream
from .manifest import Manifest
from .protocol import MANIFEST, MAX_MANIFEST_BYTES, MAX_REPLY_BYTES, PiecesRequest, is_root, join_manifest

logger = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
_MAX_RANGES = 1024
_PART_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """What a peer says it has of the weights that ``root`` names: ``blocks`` as ranges, or the ``whole`` model."""

    root: str
    blocks: Annotated[tuple[tuple[int, int], ...], msgspec.Meta(max_length=_MAX_RANGES)] = ()
    whole: bool = False

    @classmethod
    def from_value(cls, found: Any) -> Holder:
        """Reads a stranger's record.

        Raises:
            ValueError: it is none.
        """
        holder = read(cls, found)
        if not is_root(holder.root):
            raise ValueError("a holder's record has a root")
        return replace(holder, blocks=tuple((start, end) for start, end in holder.blocks if 0 <= start < end))


@dataclass(frozen=True)
class Found:
    """Weights that a swarm has: their prefix in the DHT, their manifest's root, and who has some of them."""

    prefix: str
    root: str
    holders: tuple[PeerID, ...]


async def announce_holder(node: DHTNode, prefix: str, holder: Holder | None, *, ttl: float) -> None:
    """Says for ``ttl`` seconds what this peer has; None takes back what it said."""
    value: dict[str, object] = {}  # which nobody can read; it can be signed, as None can't
    if holder is not None:
        value = {"root": holder.root, "blocks": [list(each) for each in holder.blocks], "whole": holder.whole}
    await node.store(
        key=_key(prefix),
        subkey=node.peer_id.to_base58(),
        value=value,
        expiration_time=CLOCK.now() + ttl,
    )


async def fetch_holders(node: DHTNode, prefix: str) -> dict[PeerID, Holder]:
    """Who has weights of the model, by the newest records; this peer left out."""
    found = await node.get(_key(prefix), latest=True)
    holders: dict[PeerID, Holder] = {}
    if found is not None and isinstance(found.value, Mapping):
        for peer, record in found.value.items():
            try:
                holders[read_peer_id(peer)] = Holder.from_value(record.value)
            except (ValueError, TypeError, AttributeError) as error:
                logger.debug("a record of weights of %s can't be read: %s", prefix, error)
    holders.pop(node.peer_id, None)
    return holders


def possible_prefixes(model: str, asked: str | None) -> list[str]:
    """The names that a model may have in the DHT whose config isn't known: ``model`` may be one itself."""
    if asked is not None:
        return [asked]
    names = [default_dht_prefix(model, kind) for kind in ("", "llama", "bloom")]
    if "." not in model and not any(character.isspace() for character in model):
        names.insert(0, model)
    return list(dict.fromkeys(names))


async def find_weights(peer: Peer, model: str, *, prefix: str | None, root: str | None) -> Found | None:
    """Which weights the swarm has for ``model``, a name or a manifest's root; None if it has none.

    Raises:
        UsageError: several, and ``root`` doesn't say which; or others than ``root``.
    """
    names = possible_prefixes(model, prefix)
    if by_root := is_root(model):
        root, names = model, [prefix] if prefix is not None else sorted(await dht.fetch_models(peer.dht))
    for name in names:
        holders = await fetch_holders(peer.dht, name)
        roots = sorted({holder.root for holder in holders.values()})
        if not roots or (by_root and root not in roots):
            continue
        if root is not None and root not in roots:
            raise UsageError(
                f"nobody in this swarm has weights of {name!r} with the manifest {root}; there are: "
                f"{', '.join(roots)}. Check --manifest, or join the swarm that has them"
            )
        if root is None and len(roots) > 1:
            raise UsageError(
                f"this swarm has different weights under the name {name!r}: say with --manifest which are meant, "
                f"of {', '.join(roots)}"
            )
        chosen = root or roots[0]
        return Found(name, chosen, tuple(peer_id for peer_id, holder in holders.items() if holder.root == chosen))
    return None


async def nobody_has(peer: Peer, model: str) -> ModelError:
    """The error for weights that the swarm doesn't have; it names those that are listed."""
    listed = sorted(await dht.fetch_models(peer.dht))
    others = f"; models in this swarm: {', '.join(listed[:20])}" if listed else ""
    return ModelError(
        f"no node in this swarm hands out weights of {model!r}{others}. Run swarm-node seed where they are, "
        "or check the name and --initial-peers"
    )


async def fetch_manifest(peer: Peer, root: str, holders: Sequence[PeerID]) -> Manifest:
    """The manifest with that root, from whoever has it.

    Raises:
        ModelError: nobody sends it.
    """
    for peer_id in CHANCE.sample(holders, len(holders)):
        try:
            data = await _ask_manifest(peer.p2p, peer_id, root)
            return await asyncio.to_thread(join_manifest, data, root)
        except (SwarmError, ValueError, OSError, asyncio.TimeoutError) as error:
            logger.warning("no manifest from %s: %s", peer_id, error)
        except Exception as error:  # hivemind's own, when a peer can't be reached
            logger.info("no manifest from %s: %r", peer_id, error)
    raise ModelError(
        f"none of {len(holders)} nodes sends the manifest {root}: check that they can be reached from here"
    )


async def _ask_manifest(p2p: P2P, peer_id: PeerID, root: str) -> bytes:
    _, reader, writer = await asyncio.wait_for(p2p.call_binary_stream_handler(peer_id, MANIFEST), CONNECT_SECONDS)
    stream = MessageStream(reader, writer, max_bytes=MAX_REPLY_BYTES)
    parts: list[bytes] = []
    try:
        await stream.send(PiecesRequest(root).to_message())
        while (part := await asyncio.wait_for(stream.receive(Response), _PART_SECONDS)) is not None:
            parts.append(part.metadata)
            if sum(map(len, parts)) > MAX_MANIFEST_BYTES:
                raise ValueError("a manifest that is too large")
    finally:
        stream.close()
    return b"".join(parts)


def _key(prefix: str) -> str:
    return f"{prefix}.weights"
