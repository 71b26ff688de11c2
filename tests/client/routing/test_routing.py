"""Routes over made-up swarms."""

from __future__ import annotations

import hashlib

import pytest
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.routing.bans import Bans
from swarm.client.routing.route import find_route
from swarm.errors import MissingBlocksError, UsageError
from swarm.network.dht import RemoteSpan
from swarm.wire.records import Offer, ServerInfo, ServerState


def peer(name: str) -> PeerID:
    return PeerID(hashlib.sha256(name.encode()).digest())


def span(
    name: str, start: int, end: int, *, rps: float = 100.0, left: int | None = None, sessions: int = 0
) -> RemoteSpan:
    info = ServerInfo(
        ServerState.ONLINE, rps, inference_rps=rps, cache_tokens_left=left, offer=Offer(sessions=sessions)
    )
    return RemoteSpan(peer(name), start, end, info)


def legs(spans: list[RemoteSpan], first: int = 0, last: int = 8, **options: object) -> list[tuple[PeerID, int, int]]:
    route = find_route(spans, first, last, rtts={}, **options)  # type: ignore[arg-type]
    return [(leg.peer_id, leg.start, leg.end) for leg in route]


def test_a_span_may_be_entered_in_its_middle() -> None:
    assert legs([span("a", 0, 5), span("b", 3, 8)]) in (
        [(peer("a"), 0, 5), (peer("b"), 5, 8)],
        [(peer("a"), 0, 3), (peer("b"), 3, 8)],
    )


INNER = frozenset({4, 5, 6, 7})  # the blocks 3:8 are kept together


def test_a_route_keeps_blocks_together() -> None:
    assert legs([span("a", 0, 8), span("b", 5, 8, rps=1000)], inner=INNER) == [(peer("a"), 0, 8)]
    assert legs([span("a", 0, 6), span("b", 2, 8, rps=10)], inner=INNER) in (
        [(peer("a"), 0, 2), (peer("b"), 2, 8)],
        [(peer("a"), 0, 3), (peer("b"), 3, 8)],
    )
    with pytest.raises(MissingBlocksError) as caught:
        legs([span("a", 0, 6), span("b", 6, 8)], inner=INNER)  # each block is there, but the five aren't together
    assert caught.value.blocks == (3, 4, 5, 6, 7)
    with pytest.raises(UsageError, match="blocks 0:5 can't be used without those around them: 3:8"):
        legs([span("a", 0, 8)], last=5, inner=INNER)


def test_fewer_hops_win_among_equals_and_a_slow_node_is_left_early() -> None:
    assert legs([span("all", 0, 8), span("a", 0, 4), span("b", 4, 8)]) == [(peer("all"), 0, 8)]
    route = legs([span("slow", 0, 8, rps=1), span("quick", 2, 8, rps=1000)])
    assert route == [(peer("slow"), 0, 2), (peer("quick"), 2, 8)]


def test_full_and_busy_nodes_are_avoided_but_used_if_there_is_no_other() -> None:
    full, roomy = span("full", 0, 8, left=10), span("roomy", 0, 8, left=1000, rps=50)
    assert legs([full, roomy], cache_tokens=100) == [(peer("roomy"), 0, 8)]
    assert legs([full], cache_tokens=100) == [(peer("full"), 0, 8)]
    assert legs([span("busy", 0, 8, sessions=50), span("idle", 0, 8)]) == [(peer("idle"), 0, 8)]


def test_a_petals_server_has_more_room_for_fewer_of_its_blocks() -> None:
    def petals(left: int) -> RemoteSpan:
        info = ServerInfo(ServerState.ONLINE, 1.0, 0, 8, inference_rps=1000.0, cache_tokens_left=left)
        return RemoteSpan(peer("petals"), 0, 8, info)

    slow = span("slow", 4, 8, left=1000, rps=1)
    assert legs([petals(100), slow], cache_tokens=100) == [(peer("petals"), 0, 8)]
    assert legs([petals(50), slow], cache_tokens=100) == [(peer("petals"), 0, 4), (peer("slow"), 4, 8)]


def test_near_peers_are_preferred() -> None:
    near, far = span("near", 0, 8), span("far", 0, 8)
    route = find_route([far, near], 0, 8, rtts={peer("near"): 0.001, peer("far"): 0.3})
    assert [leg.peer_id for leg in route] == [peer("near")]


def test_missing_blocks_are_named() -> None:
    with pytest.raises(MissingBlocksError, match="blocks 2:4, 7:8") as raised:
        legs([span("a", 0, 2), span("b", 4, 7)])
    assert raised.value.blocks == (2, 3, 7)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8), st.sampled_from([1.0, 10.0, 300.0])), max_size=7))
def test_a_route_covers_each_block_once_or_the_swarm_has_a_hole(shapes: list[tuple[int, int, float]]) -> None:
    spans = [
        span(str(number), start, min(8, start + length), rps=rps) for number, (start, length, rps) in enumerate(shapes)
    ]
    try:
        route = find_route(spans, 0, 8, rtts={})
    except MissingBlocksError as error:
        assert all(not any(span.start <= block < span.end for span in spans) for block in error.blocks)
        assert error.blocks
        return
    assert [leg.start for leg in route] == [0, *(leg.end for leg in route[:-1])]
    assert route[-1].end == 8
    assert all(leg.span.start <= leg.start < leg.end <= leg.span.end for leg in route)


def test_what_many_sessions_meet_at_once_is_one_failure() -> None:
    now = 100.0
    bans, one = Bans(3.0, clock=lambda: now), peer("one")
    for _ in range(8):
        bans.failed(one)
        now += 0.1
    now = 103.5
    assert not bans.banned(one)
    for late in (0.0, 5.0):  # the second began before the first was over
        bans.failed(one, ago=late)
    now = 109.0
    assert bans.banned(one)
    now = 109.6
    assert not bans.banned(one)


def test_bans_grow_and_end_with_success_or_a_restart() -> None:
    now = 100.0
    bans, one = Bans(3.0, clock=lambda: now), peer("one")
    bans.failed(one)
    assert bans.banned(one)
    now = 103.5
    assert not bans.banned(one)
    bans.failed(one)
    now = 108.0
    assert bans.banned(one), "twice as long the second time"
    assert not bans.banned(one, started=107.0), "it has restarted since"
    bans.failed(one)
    bans.succeeded(one)
    assert not bans.banned(one)
