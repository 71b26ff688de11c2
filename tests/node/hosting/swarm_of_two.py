"""Two real peers on loopback for tests of a node's parts: the node's own, and one that looks on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch

from swarm.model.model_source import ModelSource
from swarm.model.source import resolve
from swarm.network import dht
from swarm.network.peer import Peer, PeerOptions
from swarm.node.hosting.means import Means
from swarm.node.hosting.placement.memory import Plan
from swarm.node.hosting.weights.sharing import Sharing
from swarm.node.output import Stage
from swarm.node.settings import NodeSettings
from swarm.wire.records import Offer, ServerInfo, ServerState

JOINING = ServerInfo(ServerState.JOINING, 0.0, offer=Offer(cache_tokens_total=256))


@asynccontextmanager
async def two_peers() -> AsyncIterator[tuple[Peer, Peer]]:
    node = await Peer.start(PeerOptions(host="127.0.0.1"))
    other = await Peer.start(PeerOptions(host="127.0.0.1", initial_peers=node.addresses[:1]))
    yield node, other
    await other.stop()
    await node.stop()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def states(looking: Peer, of: Peer, prefix: str, num_blocks: int) -> str:
    """What the swarm knows of a node's blocks, one letter each: J for joining, O for online, - for offline or none."""
    records = await dht.fetch(looking.dht, prefix, num_blocks)
    known = (block.get(of.peer_id) for block in records)
    return "".join("-" if info is None or info.state == ServerState.OFFLINE else info.state.name[0] for info in known)


class Recorder:
    """An output that keeps what is said."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for known, fields in self.events if known == name]

    def event(self, name: str, text: str, **fields: Any) -> None:
        self.events.append((name, {"text": text, **fields}))

    def panel(self, name: str, title: str, lines: list[str], **fields: Any) -> None:
        self.event(name, title, lines=lines, **fields)

    def error(self, text: str) -> None:
        self.event("error", text)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Stage]:
        self.event("stage", text, stage=name)
        yield lambda done, total, note="": None


def make_means(
    path: Path,
    peer: Peer,
    output: Recorder,
    *,
    count: int,
    source: ModelSource | None = None,
    sharing: Sharing | None = None,
    **settings: Any,
) -> Means:
    """For ``count`` blocks of the model in ``path``, in float32 on the CPU."""
    chosen = NodeSettings(str(path), **settings)
    plan, devices = Plan(count, "none", 256, 1, ""), [torch.device("cpu")] * count
    return Means(chosen, output, peer, source or resolve(str(path)), sharing, plan, torch.float32, None, None, devices)
