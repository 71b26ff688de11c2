"""PeerIDs from strangers."""

from __future__ import annotations

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.wire.peer_id import MAX_CHARS, read_peer_id

HASHED = b"\x12\x20" + bytes(32)
WHOLE = b"\x00\x24\x08\x01\x12\x20" + bytes(32)


@pytest.mark.parametrize("raw", [HASHED, WHOLE])
def test_both_kinds(raw: bytes) -> None:
    text = base58.b58encode(raw).decode()
    assert read_peer_id(text).to_bytes() == raw
    assert read_peer_id(text) is read_peer_id(text)


@pytest.mark.parametrize("raw", [HASHED[:-1], HASHED + b"x", WHOLE[:-1], b"\x00\x02\x08", b"a peer"])
def test_what_is_no_peer_id(raw: bytes) -> None:
    with pytest.raises(ValueError, match="PeerID"):
        read_peer_id(base58.b58encode(raw).decode())


@given(st.text(max_size=2 * MAX_CHARS) | st.integers() | st.binary() | st.just("2" * 10**6))
def test_anything_is_read_or_refused(found: object) -> None:
    try:
        peer_id = read_peer_id(found)
    except ValueError:
        return
    assert peer_id.to_base58() == found
