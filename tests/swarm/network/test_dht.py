"""What a swarm's records say about who serves what."""

from __future__ import annotations

import dataclasses

from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from swarm.network.dht import spans_of
from swarm.wire.records import ServerInfo, ServerState

PEER = PeerID(b"\x12\x20" + b"a peer".rjust(32))


@given(st.data())
def test_a_node_that_grows_serves_what_is_ready(data: st.DataObject) -> None:
    """Anywhere in its span: the rest is announced as joining."""
    start = data.draw(st.integers(0, 6))
    first = data.draw(st.integers(start, 8))
    last = data.draw(st.integers(first + 1, 9))
    end = data.draw(st.integers(last, 10))
    coming = ServerInfo(ServerState.JOINING, 0.0, start_block=start, end_block=end)
    serving = dataclasses.replace(coming, state=ServerState.ONLINE, start_block=first, end_block=last)
    records = [
        {PEER: serving if first <= block < last else coming} if start <= block < end else {} for block in range(10)
    ]
    for lowest in (ServerState.ONLINE, ServerState.JOINING):
        span = spans_of(records, min_state=lowest)[PEER]
        assert (span.start, span.end, span.info.state) == (first, last, ServerState.ONLINE)
