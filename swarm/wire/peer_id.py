"""PeerIDs as text, as strangers write them."""

from __future__ import annotations

import functools

from hivemind.p2p import PeerID

MAX_CHARS = 64
"""The longest that libp2p makes have 59; to decode base 58 takes time that grows with the square of the length."""
_SHA256 = b"\x12\x20"
_SHA256_BYTES = 34
_IDENTITY = b"\x00"  # a short public key itself
_MAX_IDENTITY_BYTES = 44


def read_peer_id(text: object) -> PeerID:
    """The PeerID that ``text`` is in base 58.

    Raises:
        ValueError: it isn't one.
    """
    if not isinstance(text, str) or not 1 < len(text) <= MAX_CHARS:
        raise ValueError("expected a PeerID in base58")
    return _decode(text)


def peer_id_of(address: str) -> PeerID:
    """Whose address ``/…/p2p/…`` is.

    Raises:
        ValueError: nobody's.
    """
    return read_peer_id(address.rpartition("/p2p/")[2])


@functools.lru_cache(maxsize=2**16)  # the same few come again and again, and each takes 0.1 ms to read
def _decode(text: str) -> PeerID:
    peer_id = PeerID.from_base58(text)
    raw = peer_id.to_bytes()
    hashed = raw.startswith(_SHA256) and len(raw) == _SHA256_BYTES
    whole = raw.startswith(_IDENTITY) and 2 < len(raw) <= _MAX_IDENTITY_BYTES and raw[1] == len(raw) - 2
    if not (hashed or whole):
        raise ValueError("expected a PeerID in base58")
    return peer_id
