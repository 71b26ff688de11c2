"""The clocks of peers: the network takes no record from a clock that is more than a few seconds off."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS, get_dht_time

if TYPE_CHECKING:
    from hivemind.dht import DHTNode

TOLERATED_SECONDS = float(MAX_DHT_TIME_DISCREPANCY_SECONDS)
_TOLD = re.compile(r"local time must be within.*?local: *([0-9.]+), peer: *([0-9.]+)", re.DOTALL)


def skew_told(error: BaseException) -> float | None:
    """Seconds that this machine's clock is ahead by, if that is why hivemind would not join."""
    found = _TOLD.search(str(error))
    return None if found is None else float(found[1]) - float(found[2])


def describe_skew(seconds: float) -> str:
    """What to do about a clock that is ahead by ``seconds``."""
    way = "ahead of" if seconds > 0 else "behind"
    return (
        f"the clock of this machine is {abs(seconds):.0f} s {way} the swarm's, and it may be {TOLERATED_SECONDS:.0f} s "
        "off: set it by a time server (NTP)"
    )


async def measure_skew(dht: DHTNode, peer_id: PeerID, timeout: float) -> float | None:
    """Seconds that this machine's clock is ahead of a peer's by; None if the peer doesn't answer."""
    request = dht_pb2.PingRequest(peer=dht.protocol.node_info, validate=False)
    asked = get_dht_time()
    try:
        answer = await asyncio.wait_for(dht.protocol.get_stub(peer_id).rpc_ping(request), timeout)
    except Exception:
        return None
    return (asked + get_dht_time()) / 2 - float(answer.dht_time) if answer.dht_time else None
