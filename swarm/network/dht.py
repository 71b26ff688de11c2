"""Reading and writing the swarm's records."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hivemind.dht import DHTNode
from hivemind.p2p import P2P, PeerID

from ..wire.peer_id import read_peer_id
from ..wire.records import ServerInfo, ServerState, block_uid
from .clock import CLOCK
from .nat.ways import WayfindingP2P

logger = logging.getLogger(__name__)
MODELS_KEY = "_petals.models"
_MAX_BLOCKS = 10_000  # that a stranger's record may make anybody ask for


@dataclass(frozen=True)
class RemoteSpan:
    """A peer and the blocks ``start:end`` that it serves."""

    peer_id: PeerID
    start: int
    end: int
    info: ServerInfo


async def announce(dht: DHTNode, prefix: str, start: int, end: int, info: ServerInfo, *, ttl: float) -> bool:
    """Says for ``ttl`` seconds that this peer serves the blocks ``start:end``; whether all records were taken."""
    keys = [block_uid(prefix, block) for block in range(start, end)]
    stored = await dht.store_many(
        keys=keys,
        subkeys=[dht.peer_id.to_base58()] * len(keys),
        values=[info.to_tuple()] * len(keys),
        expiration_time=CLOCK.now() + ttl,
    )
    return all(stored.values())


async def announce_model(dht: DHTNode, prefix: str, num_blocks: int, repository: str | None, *, ttl: float) -> None:
    """Lists the model, so that tools find which models a swarm has."""
    await dht.store(
        key=MODELS_KEY,
        subkey=prefix,
        value={"num_blocks": num_blocks, "repository": repository},
        expiration_time=CLOCK.now() + ttl,
    )


async def fetch_models(dht: DHTNode) -> dict[str, int]:
    """The models that are listed, by their names in the DHT, with their numbers of blocks."""
    found = await dht.get(MODELS_KEY, latest=True)
    models: dict[str, int] = {}
    if found is not None and isinstance(found.value, Mapping):
        for name, record in found.value.items():
            value = record.value if isinstance(record.value, Mapping) else {}
            count = value.get("num_blocks")
            if isinstance(name, str) and type(count) is int and 0 < count <= _MAX_BLOCKS:
                models[name] = count
    return models


async def fetch(dht: DHTNode, prefix: str, num_blocks: int) -> list[dict[PeerID, ServerInfo]]:
    """For each block its servers, by the newest records. Records that can't be read are left out."""
    uids = [block_uid(prefix, block) for block in range(num_blocks)]
    found = await dht.get_many(uids, sufficient_expiration_time=math.inf)
    blocks: list[dict[PeerID, ServerInfo]] = []
    for uid in uids:
        servers: dict[PeerID, ServerInfo] = {}
        value = found[uid].value if found[uid] is not None else None
        if isinstance(value, Mapping):
            for peer, record in value.items():
                try:
                    servers[read_peer_id(peer)] = ServerInfo.from_tuple(record.value)
                except (ValueError, TypeError, AttributeError) as error:
                    logger.debug("a record for %s can't be read: %s", uid, error)
        blocks.append(servers)
    _learn_ways(dht.protocol.p2p, blocks)
    return blocks


def _learn_ways(p2p: P2P, blocks: list[dict[PeerID, ServerInfo]]) -> None:
    """From now on calls reach these peers, through relays where they say so."""
    if isinstance(p2p, WayfindingP2P):
        for peer_id, info in {peer: info for servers in blocks for peer, info in servers.items()}.items():
            p2p.learn(peer_id, info.offer.relays if info.offer is not None else ())


def spans_of(
    blocks: list[dict[PeerID, ServerInfo]], *, min_state: ServerState = ServerState.ONLINE
) -> dict[PeerID, RemoteSpan]:
    """Each peer's span, from the records of single blocks. A peer's record says its span; else its blocks do. Of a peer
    that serves some blocks and is still getting others, it is what it serves."""
    spans: dict[PeerID, RemoteSpan] = {}
    for block, servers in enumerate(blocks):
        for peer_id, info in servers.items():
            if info.state < min_state:
                continue
            known = spans.get(peer_id)
            if known is None or info.state > known.info.state:
                spans[peer_id] = RemoteSpan(peer_id, block, block + 1, info)
            elif info.state == known.info.state:
                start = known.start if known.end == block else block
                spans[peer_id] = RemoteSpan(peer_id, start, block + 1, info)
    return {peer_id: _within_record(span) for peer_id, span in spans.items()}


def _within_record(span: RemoteSpan) -> RemoteSpan:
    # right after a node has moved, records of its old blocks are still there: its own word counts
    start, end = span.info.start_block, span.info.end_block
    if start is None or end is None or start >= end:
        return span
    start, end = max(span.start, start), min(span.end, end)
    return RemoteSpan(span.peer_id, start, end, span.info) if start < end else span
