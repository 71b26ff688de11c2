"""libp2p's relays (circuit v2), as far as the daemon doesn't do it by itself.

Its own way to get a place at a relay begins minutes after the start, takes no relay with a private address, and tries
one that was away only an hour later. The question is one small message, so this process asks itself, as often as it
likes; the daemon takes what comes through the relay.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from ...wire.peer_id import read_peer_id

_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = b"\x02\x08\x00"  # a protobuf message of two bytes: type RESERVE
_LIMIT, _STATUS, _OK = 4, 5, 100  # fields of the answer
_AMPLE_SECONDS, _AMPLE_BYTES = 30 * 86400, 2**40
_MAX_ANSWER = 4096
_P2P, _CIRCUIT = b"\xa5\x03", b"\xa2\x02"
MAX_ADDRESS_CHARS = 256


class Circuit:
    """The address of whoever has a place at the relay ``/ip4/…/tcp/…/p2p/…``.

    Attributes:
        relay: its name.
        where: its address, without the name.

    Raises:
        ValueError: that is no such address.
    """

    def __init__(self, relay: str) -> None:
        self.where, _, peer_id = relay.rpartition("/p2p/")
        try:
            self.relay = read_peer_id(peer_id)
            name = self.relay.to_bytes()
            # hivemind writes neither newer PeerIDs nor circuits as the daemon reads them
            self._bytes = Multiaddr(self.where).to_bytes() + _P2P + bytes([len(name)]) + name + _CIRCUIT
        except Exception as error:
            raise ValueError(f"{relay[:MAX_ADDRESS_CHARS]!r} is no address of a relay") from error

    def to_bytes(self) -> bytes:
        """As the daemon reads it."""
        return self._bytes


@dataclass(frozen=True)
class Terms:
    """For how long, and how many bytes each way, a relay lets a connection go on before it resets it; 0: for ever."""

    seconds: int = 0
    data: int = 0

    @property
    def ample(self) -> bool:
        """Whether no session comes to an end by it."""
        return not 0 < self.seconds < _AMPLE_SECONDS and not 0 < self.data < _AMPLE_BYTES


async def reserve(p2p: P2P, relay: PeerID, timeout: float) -> Terms | None:
    """Asks a peer to let others through to this one, for an hour; None if it doesn't. To ask again prolongs it."""
    try:
        return await asyncio.wait_for(_reserve(p2p, relay), timeout)
    except Exception:
        return None


async def _reserve(p2p: P2P, relay: PeerID) -> Terms | None:
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
        return read_terms(await reader.readexactly(length)) if length <= _MAX_ANSWER else None
    finally:
        writer.close()


def read_terms(answer: bytes) -> Terms | None:
    """What a relay says to a question for a place; None if it refuses.

    Raises:
        ValueError: it is no protobuf message.
    """
    fields = _fields(answer)
    if fields.get(_STATUS) != _OK:
        return None
    limit = fields.get(_LIMIT, b"")
    said = _fields(limit) if isinstance(limit, bytes) else {}
    seconds, data = (said.get(number, 0) for number in (1, 2))
    return Terms(seconds, data) if isinstance(seconds, int) and isinstance(data, int) else Terms()


def _fields(message: bytes) -> dict[int, int | bytes]:
    """A protobuf message of numbers and bytes."""
    found: dict[int, int | bytes] = {}
    left = memoryview(message)
    while left:
        tag, left = _varint(left)
        if tag & 7 == 0:
            found[tag >> 3], left = _varint(left)
        elif tag & 7 == 2:
            length, left = _varint(left)
            if length > len(left):
                raise ValueError("a message is cut off")
            found[tag >> 3], left = bytes(left[:length]), left[length:]
        else:
            raise ValueError("a message has fields of another kind")
    return found


def _varint(source: memoryview) -> tuple[int, memoryview]:
    value = 0
    for position, byte in enumerate(source[:10]):
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value, source[position + 1 :]
    raise ValueError("a message is cut off")
