"""What ``swarm-node fetch`` and ``swarm-node seed`` do: weights go around, nothing is computed."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack

from swarm.model.layout import parse_blocks
from swarm.network import dht
from swarm.network.peer import Peer

from ..hosting.invitation import how_to_join
from ..hosting.life import finish_unless, run_until
from ..hosting.weights.find import find_source
from ..output import Output
from ..settings import NodeSettings

_LISTED_SECONDS = 24 * 3600.0


async def fetch(settings: NodeSettings, output: Output, stop: asyncio.Event) -> None:
    """Gets the weights, or ``settings.blocks`` of them, and ends. While it runs, others get from it what it has.

    Raises:
        UsageError: nobody has them, or there is no such block.
    """
    async with AsyncExitStack() as stack:
        working = await finish_unless(stop, _fetch(settings, output, stack))
        if working is None:
            output.event("stopped", "Stopped. What is here is kept: the same command goes on from there.")
        else:
            working.result()


async def _fetch(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> None:
    source, _, sharing = await find_source(dataclasses.replace(settings, weights="peers"), output, stack)
    assert sharing is not None
    if settings.blocks is None:
        await sharing.fetch_all()
        what = "The checkpoint"
    else:
        start, end = parse_blocks(settings.blocks, source.num_blocks)
        await sharing.fetch(range(start, end))
        what = f"Blocks {start}:{end}"
    directory = str(sharing.store.directory)
    output.event("done", f"{what}: {directory}", directory=directory, whole=sharing.store.is_whole)


async def seed(settings: NodeSettings, output: Output, stop: asyncio.Event) -> None:
    """Hands out a checkpoint until ``stop`` is set.

    Raises:
        UsageError: it can't be used, or the swarm has others under its name.
        DaemonError: the network daemon is lost.
    """
    await run_until(stop, lambda stack: _seed(settings, output, stack), work=Peer.watch_daemon)
    output.event("stopped", "Stopped.")


async def _seed(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> Peer:
    source, peer, sharing = await find_source(dataclasses.replace(settings, seed=True), output, stack)
    assert peer is not None
    assert sharing is not None
    await sharing.begin(stack)
    if peer.presence is not None:
        peer.presence.serve(sharing.prefix)
    await dht.announce_model(peer.dht, sharing.prefix, source.num_blocks, None, ttl=_LISTED_SECONDS)
    join = how_to_join(peer)
    output.panel(
        "ready",
        f"Handing out the weights of {source.name}",
        [
            "Others serve blocks of it with:",
            f"  swarm-node serve {sharing.prefix} --weights peers {join}",
            "talk to it, once all blocks are served, with:",
            f"  swarm chat {sharing.prefix} --weights peers {join}",
            "or get a copy with:",
            f"  swarm-node fetch {sharing.prefix} {join}",
            "To be sure of getting exactly these weights, they add:",
            f"  --manifest {sharing.root}",
        ],
        maddrs=list(peer.addresses),
        peer_id=peer.peer_id.to_base58(),
        manifest=sharing.root,
        prefix=sharing.prefix,
        model=source.name,
    )
    return peer
