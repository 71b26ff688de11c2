"""libp2p's relays (circuit v2), as far as the daemon doesn't do it by itself.

Its own way to get a place at a relay begins minutes after the start, takes no relay with a private address, and tries
one that was away only an hour later. The question is one small message, so this process asks itself, as often as it
likes; the daemon takes what comes through the relay.
"""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from ...wire.peer_id import read_peer_id

_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = b"\x02\x08\x00"  # a protobuf message of two bytes: type RESERVE
_OK = b"\x28\x64"  # the last field of the answer: status 100
_MAX_ANSWER = 4096
_P2P, _CIRCUIT = b"\xa5\x03", b"\xa2\x02"
MAX_ADDRESS_CHARS = 256


class Circuit:
    """The address of whoever has a place at the relay ``/ip4/…/tcp/…/p2p/…``.

    Raises:
        ValueError: that is no such address.
    """

    def __init__(self, relay: str) -> None:
        where, _, peer_id = relay.rpartition("/p2p/")
        try:
            name = read_peer_id(peer_id).to_bytes()
            # hivemind writes neither newer PeerIDs nor circuits as the daemon reads them
            self._bytes = Multiaddr(where).to_bytes() + _P2P + bytes([len(name)]) + name + _CIRCUIT
        except Exception as error:
            raise ValueError(f"{relay[:MAX_ADDRESS_CHARS]!r} is no address of a relay") from error

    def to_bytes(self) -> bytes:
        """As the daemon reads it."""
        return self._bytes


async def reserve(p2p: P2P, relay: PeerID, timeout: float) -> bool:
    """Asks a peer to let others through to this one, for an hour; whether it does. To ask again prolongs it."""
    try:
        return await asyncio.wait_for(_reserve(p2p, relay), timeout)
    except Exception:
        return False


async def _reserve(p2p: P2P, relay: PeerID) -> bool:
    _, reader, writer = await p2p.call_binary_stream_handler(relay, _HOP)
    try:
        writer.write(_RESERVE)
        await writer.drain()
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or length > _MAX_ANSWER:
                break
        return length <= _MAX_ANSWER and (await reader.readexactly(length)).endswith(_OK)
    finally:
        writer.close()
