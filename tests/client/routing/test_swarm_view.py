"""What a client knows of its swarm, over a real DHT on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from swarm.client.routing.left_out import Needs
from swarm.client.routing.swarm_view import SwarmView
from swarm.client.settings import ClientSettings
from swarm.errors import MissingBlocksError, PeerLostError, UsageError
from swarm.network import dht
from swarm.network.options import PeerOptions
from swarm.network.peer import Peer
from swarm.wire.limits import MessageLimits
from swarm.wire.records import Offer, ServerInfo, ServerState

BLOCKS = 4
NODES = 3
LOCAL = {"host": "127.0.0.1"}


def info(**fields: Any) -> ServerInfo:
    offer = fields.pop("offer", {})
    return ServerInfo(
        fields.pop("state", ServerState.ONLINE), 100.0, inference_rps=100.0, offer=Offer("same", **offer), **fields
    )


async def tell(peer: Peer, start: int, end: int, record: ServerInfo, prefix: str) -> None:
    assert await dht.announce(peer.dht, prefix, start, end, record, ttl=60.0)


def look(
    name: str, told: dict[int, tuple[int, int, ServerInfo]], check: Callable[[SwarmView, list[Peer]], Awaitable[None]]
) -> None:
    """``check`` is given the view of a swarm whose nodes have announced what ``told`` has by their numbers."""

    async def run() -> None:
        nodes = [await Peer.start(PeerOptions(**LOCAL))]
        first = [str(address) for address in nodes[0].addresses][:1]
        nodes += await asyncio.gather(
            *(Peer.start(PeerOptions(initial_peers=first, **LOCAL)) for _ in range(NODES - 1))
        )
        client = await Peer.start(PeerOptions(initial_peers=first, client=True))
        settings = ClientSettings(wait_timeout=0.0, ban_seconds=60.0)
        view = SwarmView(client, name, BLOCKS, "same", settings)
        view._ping_new = lambda spans: None  # type: ignore[method-assign]  # all are as far away
        try:
            for number, (start, end, record) in told.items():
                await tell(nodes[number], start, end, record, name)
            await view.start()
            await check(view, nodes)
        finally:
            view.close()
            await asyncio.gather(client.stop(), *(node.stop() for node in nodes))

    asyncio.run(run())


def test_routes_go_around_peers_that_failed_or_are_full() -> None:
    async def check(view: SwarmView, nodes: list[Peer]) -> None:
        a, b, c = (node.peer_id for node in nodes)
        used = {leg.peer_id for _ in range(40) for leg in await view.route(0, BLOCKS)}
        assert used == {a, b, c}  # equals share the load
        view.full(b)
        assert {leg.peer_id for _ in range(20) for leg in await view.route(0, BLOCKS)} == {
            a,
            c,
        }
        view.failed(c, PeerLostError("it is\ngone"))
        view.failed(b, PeerLostError("gone too"))
        with pytest.raises(MissingBlocksError, match=r"it is gone") as raised:
            await view.route(0, BLOCKS)
        assert raised.value.blocks == (2, 3)
        view.succeeded(c)
        assert [leg.peer_id for leg in await view.route(0, BLOCKS)] == [a, c]
        assert [leg.peer_id for leg in await view.route(0, BLOCKS, avoid={c})] == [
            a,
            c,
        ]

    look("bans", {0: (0, 2, info()), 1: (2, 4, info()), 2: (2, 4, info())}, check)


def test_only_nodes_that_the_user_wants_are_used() -> None:
    async def check(view: SwarmView, nodes: list[Peer]) -> None:
        a, b, c = (node.peer_id for node in nodes)
        view._settings = ClientSettings(wait_timeout=0.0, blocked_peers=[str(c)])
        assert {leg.peer_id for _ in range(20) for leg in await view.route(0, BLOCKS)} == {a, b}
        view._settings = ClientSettings(wait_timeout=0.0, allowed_peers=[a, c])
        assert {leg.peer_id for _ in range(20) for leg in await view.route(0, BLOCKS)} == {a, c}
        view._settings = ClientSettings(wait_timeout=0.0, allowed_peers=[a], blocked_peers=[b])
        with pytest.raises(MissingBlocksError, match=r"is one of blocked_peers.*|is none of allowed_peers"):
            await view.route(0, BLOCKS)

    look("wanted", {0: (0, 2, info()), 1: (2, 4, info()), 2: (2, 4, info())}, check)


@pytest.mark.parametrize("wrong", ["Qm", ["Qm"], 3])
def test_what_is_no_list_of_peers(wrong: Any) -> None:
    with pytest.raises(UsageError, match="PeerID"):
        ClientSettings(allowed_peers=wrong)


def test_what_nodes_say_of_themselves() -> None:
    async def check(view: SwarmView, nodes: list[Peer]) -> None:
        assert view.adapters() == ["both"]
        assert view.cache_tokens() == 500
        assert view.limits(0, 4) == MessageLimits(4, 300)
        assert view.limits(0, 2) == MessageLimits(8, 300)
        assert len(await view.route(0, 4, Needs(adapter="both"))) == 2
        with pytest.raises(MissingBlocksError, match="adapter 'one'"):
            await view.route(0, 4, Needs(adapter="one"))
        with pytest.raises(UsageError, match="no node serves an adapter 'none'"):
            await view.route(0, 4, Needs(adapter="none"))
        with pytest.raises(MissingBlocksError, match="is still loading"):
            await view.route(2, 4, Needs(rows=5))

    said = {"cache_tokens_total": 1000, "max_rows": 8, "max_step_tokens": 300}
    less = {"cache_tokens_total": 500, "max_rows": 4, "max_step_tokens": 400}
    look(
        "offers",
        {
            0: (0, 2, info(adapters=("both", "one"), offer=said)),
            1: (2, 4, info(adapters=("both",), offer=less)),
            2: (2, 4, info(state=ServerState.JOINING, offer=said)),
        },
        check,
    )


def test_a_model_of_another_shape_under_this_name_is_refused() -> None:
    async def check(view: SwarmView, nodes: list[Peer]) -> None:
        raise AssertionError

    other = ServerInfo(ServerState.ONLINE, 100.0, offer=Offer("another"))
    with pytest.raises(UsageError, match="another shape"):
        look("shapes", {0: (0, 4, other)}, check)


def test_it_waits_for_a_node_that_comes() -> None:
    async def check(view: SwarmView, nodes: list[Peer]) -> None:
        waiting = asyncio.create_task(view.route(0, BLOCKS, patience=30.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await tell(nodes[1], 2, 4, info(), "late")
        assert [leg.peer_id for leg in await waiting] == [nodes[0].peer_id, nodes[1].peer_id]

    look("late", {0: (0, 2, info())}, check)
