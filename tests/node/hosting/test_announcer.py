"""A node's records: what is in them, and when they are written."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network import dht
from swarm.network.peer import Peer
from swarm.node.hosting.announcer import Announcer, records_of
from swarm.wire.records import ServerInfo, ServerState, block_uid
from tests.node.hosting.swarm_of_two import JOINING, states, two_peers, until

SPAN = dataclasses.replace(JOINING, start_block=1, end_block=4)


@given(st.data())
def test_records_cover_the_span_once(data: st.DataObject) -> None:
    """What is ready is online and named by its records; the rest is joining, and its records name the whole span."""
    start = data.draw(st.integers(0, 6))
    first = data.draw(st.integers(start, 8))
    last = data.draw(st.integers(first + 1, 9))
    end = data.draw(st.integers(last, 10))
    state = data.draw(st.sampled_from(ServerState))
    info = ServerInfo(state, 1.0, start_block=start, end_block=end)
    records = sorted(records_of(info, (first, last)), key=lambda record: record[0])
    assert [block for low, high, _ in records for block in range(low, high)] == list(range(start, end))
    assert all(low < high for low, high, _ in records)
    for low, high, record in records:
        serving = state == ServerState.ONLINE and (low, high) == (first, last)
        assert (record.start_block, record.end_block) == ((first, last) if serving else (start, end))
        assert record.state == (ServerState.JOINING if state == ServerState.ONLINE and not serving else state)


def run(work: Callable[[Peer, Peer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with two_peers() as (node, other):
            await asyncio.wait_for(work(node, other), 60)

    asyncio.run(main())


async def expiration(peer: Peer, block: int) -> float:
    """Until when the DHT keeps the one record of a block: each time it is written anew, longer."""
    found = await peer.dht.get(block_uid("m", block), latest=True)
    return next(iter(found.value.values())).expiration_time


def test_each_change_is_told_at_once() -> None:
    async def work(node: Peer, other: Peer) -> None:
        announcer = Announcer(node, "m", 5, None, SPAN, period=3600.0)
        await announcer.announce(ServerState.JOINING)
        assert await states(other, node, "m", 5) == "-JJJ-"
        await announcer.announce(ServerState.ONLINE, ready=(2, 3), throughput=7.0)
        assert await states(other, node, "m", 5) == "-JOJ-"
        assert (await dht.fetch(other.dht, "m", 5))[2][node.peer_id].throughput == 7.0
        assert await dht.fetch_models(other.dht) == {"m": 5}
        await announcer.announce(ServerState.ONLINE, ready=(1, 4))
        assert await states(other, node, "m", 5) == "-OOO-"
        await announcer.announce(ServerState.OFFLINE)
        assert await states(other, node, "m", 5) == "-----"

    run(work)


def test_records_are_written_again_until_the_node_leaves(caplog: pytest.LogCaptureFixture) -> None:
    async def work(node: Peer, other: Peer) -> None:
        following = dataclasses.replace(SPAN, state=ServerState.ONLINE, start_block=4, end_block=5)
        await dht.announce(other.dht, "m", 4, 5, following, ttl=60)
        announcer = Announcer(node, "m", 5, None, SPAN, period=0.01)
        await announcer.announce(ServerState.ONLINE)
        begun = await expiration(other, 1)
        while await expiration(other, 1) <= begun:
            await asyncio.sleep(0.01)
        while not (pings := (await dht.fetch(other.dht, "m", 5))[1][node.peer_id].next_pings):
            await asyncio.sleep(0.01)
        assert list(pings) == [other.peer_id.to_base58()], "it tells how far the peers behind it are"
        await announcer.announce(ServerState.OFFLINE)
        gone = await expiration(other, 1)
        await asyncio.sleep(0.1)  # ten periods
        assert await expiration(other, 1) == gone, "a node that has left says nothing more"

    run(work)
    assert not caplog.records


def test_a_dht_that_fails_is_said_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(node: Peer, other: Peer) -> None:
        announcer = Announcer(node, "m", 5, None, SPAN, period=0.01)
        await announcer.announce(ServerState.ONLINE)
        begun = await expiration(other, 1)

        async def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no network")

        with monkeypatch.context() as broken:
            broken.setattr(node.dht, "store_many", fail)  # hivemind's
            await until(lambda: len(caplog.records) >= 2)
        said = {(record.levelno, record.getMessage()) for record in caplog.records}
        assert said == {(logging.WARNING, "could not announce the blocks, will try again: no network")}
        while await expiration(other, 1) <= begun:
            await asyncio.sleep(0.01)
        await announcer.announce(ServerState.OFFLINE)

    run(work)
