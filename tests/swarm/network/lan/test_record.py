"""Records of nodes on the local network: what strangers may say, and what they may not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo

from swarm.network.lan.multicast import SERVICE
from swarm.network.lan.record import MAX_ADDRESSES, LanRecord, is_swarm_name, model_label, usable_address

PEER = "12D3KooWRmV7naRD5b1vKrhV37objyiAvqrj93gYVcptbPJw7Er8"
RECORD = LanRecord(PEER, "default", "demo-hf", "0.1.0", ("/ip4/10.0.0.5/tcp/31330", "/ip6/fd00::5/tcp/31330"))
LONGEST = LanRecord(
    PEER,
    "ä" * 30,
    model_label("m" * 200),
    "9" * 40,
    tuple(f"/ip6/fd00:{'abcd:' * 6}{n}/tcp/65535" for n in range(MAX_ADDRESSES)),
)


def sent(record: LanRecord) -> dict[bytes, bytes | None]:
    """What comes out at the other end of the network."""
    info = ServiceInfo(SERVICE, f"{PEER}.{SERVICE}", port=1, properties=record.to_txt())
    other = ServiceInfo(SERVICE, f"{PEER}.{SERVICE}", port=1, properties=info.text)
    return dict(other.properties)


@pytest.mark.parametrize("record", [RECORD, LONGEST, LanRecord(PEER, "a b", "", "", ("/ip4/127.0.0.1/tcp/1",))])
def test_there_and_back(record: LanRecord) -> None:
    assert LanRecord.from_txt(sent(record)) == record
    assert all(len(f"{key}={value}".encode()) <= 255 for key, value in record.to_txt().items())


@pytest.mark.parametrize(
    "changed",
    [
        {"form": "2"},
        {"peer": "x"},
        {"peer": PEER + "/ip4"},
        {"swarm": ""},
        {"swarm": "x" * 61},
        {"swarm": "\x1b[31mred"},
        {"swarm": "right\u202eleft"},
        {"model": "a\nb"},
        {"version": "9" * 41},
        {"a0": "/ip4/224.0.0.1/tcp/1", "a1": "nonsense"},
        {"a0": "/ip6/fe80::1/tcp/31330", "a1": "/dns4/evil.example/tcp/1"},
    ],
)
def test_records_that_are_none(changed: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        LanRecord.from_txt(
            sent(LanRecord(**vars(RECORD))) | {key.encode(): text.encode() for key, text in changed.items()}
        )


KEYS = st.sampled_from([*(key.encode() for key in LONGEST.to_txt()), b"other"])


@given(st.dictionaries(KEYS, st.none() | st.binary(max_size=300)))
def test_what_strangers_send(changed: dict[bytes, Any]) -> None:
    try:
        record = LanRecord.from_txt(sent(RECORD) | changed)
    except ValueError:
        return
    assert is_swarm_name(record.swarm)
    assert 0 < len(record.addresses) <= MAX_ADDRESSES
    assert all(usable_address(address) is not None for address in record.addresses)
    assert f"{record}".isprintable()
    assert LanRecord.from_txt(sent(record)) == record


@given(st.text(min_size=1))
def test_any_model_has_a_label(prefix: str) -> None:
    prefix = prefix.encode(errors="replace").decode()
    label = model_label(prefix)
    assert len(label.encode()) <= 200
    assert label == model_label(prefix)
    assert LanRecord.from_txt(sent(LanRecord(PEER, "x", label, "", RECORD.addresses))).model == label
