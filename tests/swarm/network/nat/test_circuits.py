"""Places at relays."""

from __future__ import annotations

import asyncio

import pytest

from swarm.network.daemon_calls import connect
from swarm.network.nat.circuits import Terms, read_terms, reserve
from swarm.network.nat.ways import WayfindingP2P

MINUTES_ONLY = bytes.fromhex("2206087810808008") + b"\x28\x64"  # 120 s, 128 KiB


def test_terms() -> None:
    assert read_terms(MINUTES_ONLY) == Terms(120, 131072)
    assert not Terms(120, 131072).ample
    assert not Terms(0, 131072).ample
    assert read_terms(b"\x28\x64") == Terms()
    assert Terms().ample
    assert read_terms(b"\x28\xc8\x01") is None
    for broken in (b"\x28", b"\x22\x05\x08", b"\xff" * 20, b"\x2d\x00\x00\x00\x00"):
        with pytest.raises(ValueError, match="message"):
            read_terms(broken)


def test_our_own_relays_have_no_narrow_limits() -> None:
    """The daemon starts two relays, and which of them serves must be no matter of luck."""

    async def run() -> list[Terms | None]:
        asking = await WayfindingP2P.create(dht_mode="client", host_maddrs=None, no_listen=True)
        terms = []
        for _ in range(5):
            relay = await WayfindingP2P.create(force_reachability="public", nat_port_map=False)
            addresses = [str(each).partition("/p2p/")[0] for each in await relay.get_visible_maddrs(latest=True)]
            await connect(asking, relay.peer_id, addresses)
            terms.append(await reserve(asking, relay.peer_id, 5.0))
            await relay.shutdown()
        await asking.shutdown()
        return terms

    assert all(each is not None and each.ample for each in asyncio.run(run()))
