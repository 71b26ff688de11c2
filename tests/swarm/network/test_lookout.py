"""Peers that lose each other find each other again; real ones, on loopback."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from swarm.network import dht
from swarm.network.clock import CLOCK
from swarm.network.peer import Peer, PeerOptions
from swarm.wire.records import ServerInfo, ServerState
from tests.swarm_e2e.nodes import free_port

HERE = {"host": "127.0.0.1"}


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 120)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.05)


def test_a_first_peer_that_comes_back_is_found_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has forgotten everybody; the other one asks for it."""

    async def work() -> None:
        port = free_port()

        async def start_first() -> Peer:
            return await Peer.start(PeerOptions(port=port, identity=tmp_path / "first.key", **HERE))

        first = await start_first()
        other = await Peer.start(PeerOptions(initial_peers=first.addresses, **HERE))
        client = await Peer.start(PeerOptions(initial_peers=first.addresses, client=True))
        assert not other.lookout.alone
        await first.stop()
        await dht.fetch(other.dht, "m", 1)  # what finds out
        await until(lambda: other.lookout.alone)
        (tmp_path / "first.key.peers").unlink(missing_ok=True)
        again = asyncio.ensure_future(other.lookout.pause(100.0))
        first = await start_first()
        await again
        await until(lambda: not other.lookout.alone)
        assert other.peer_id in first.dht.protocol.routing_table, "it knows the other one too"
        await until(lambda: first.peer_id in client.dht.protocol.routing_table)
        for peer in (first, other, client):
            await peer.stop()

    with caplog.at_level(logging.WARNING):
        run(work)
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "is alone" in text]) in (1, 2), "each once, the client if it has noticed"
    assert "other peers of the swarm are there again" in said


def test_a_swarm_opens_by_those_that_were_met(tmp_path: Path) -> None:
    """Its first peer is gone; so is, later, what the first peer itself had."""

    async def work() -> None:
        options = PeerOptions(port=free_port(), identity=tmp_path / "first.key", **HERE)
        first = await Peer.start(options)
        initial = first.addresses[:1]
        other = await Peer.start(PeerOptions(initial_peers=initial, **HERE))
        mine = PeerOptions(initial_peers=initial, identity=tmp_path / "mine.key", **HERE)
        met = await Peer.start(mine)
        for name in ("mine", "first"):
            await until(lambda name=name: other.peer_id.to_base58() in _text(tmp_path / f"{name}.key.peers"))
        await met.stop()
        await first.stop()
        met = await Peer.start(mine)
        assert other.peer_id in met.dht.protocol.routing_table
        first = await Peer.start(options)  # without initial peers
        assert first.dht.protocol.routing_table.peer_id_to_uid
        for peer in (first, other, met):
            await peer.stop()

    run(work)


def test_a_clock_that_is_set_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is told at once, as after sleep."""

    async def work() -> None:
        first = await Peer.start(PeerOptions(**HERE))
        other = await Peer.start(PeerOptions(initial_peers=first.addresses, **HERE))
        await dht.announce(first.dht, "m", 0, 1, ServerInfo(ServerState.ONLINE, 1.0), ttl=60)
        before = CLOCK.now()
        right = time.time
        await asyncio.sleep(0)  # both look out now
        noticed = asyncio.ensure_future(other.lookout.pause(100.0))
        monkeypatch.setattr(time, "time", lambda: right() + 95)
        await noticed
        assert CLOCK.now() - before < 60
        assert 94 < CLOCK.wall_ahead() < 96
        assert first.peer_id in (await dht.fetch(other.dht, "m", 1))[0]
        for peer in (other, first):
            await peer.stop()
        monkeypatch.undo()

    run(work)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
