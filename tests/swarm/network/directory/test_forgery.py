"""What strangers write into the directory about others: it is not believed, and crowds nobody out."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.network import dht
from swarm.network.clock import CLOCK
from swarm.network.daemon import _make_key
from swarm.network.directory import protocol as protocol_module
from swarm.network.directory.guard import MAX_SECONDS, MAX_VALUE_BYTES, RecordGuard
from swarm.network.directory.protocol import MAX_KEY_BYTES, GuardedProtocol, GuardedStorage
from swarm.network.directory.signing import SigningKey, is_signed_by, named_by
from swarm.network.options import PeerOptions
from swarm.network.peer import Peer
from swarm.wire.records import Offer, ServerInfo, ServerState, block_uid

NAME, BLOCKS = "model", 2
ONLINE = ServerInfo(ServerState.ONLINE, 1.0, start_block=0, end_block=BLOCKS, offer=Offer(fingerprint="right"))
OFFLINE = ServerInfo(ServerState.OFFLINE, 0.0, start_block=0, end_block=BLOCKS)
Work = Callable[[Peer, Peer, Peer], Awaitable[None]]


def run(work: Work, tmp_path: Path | None = None) -> None:
    """``work`` is given a node, a stranger and a reader, all peers of one swarm."""

    async def main() -> None:
        first = await Peer.start(PeerOptions(host="127.0.0.1", identity=tmp_path and tmp_path / "key"))
        there = [str(address) for address in first.addresses][:1]
        stranger, reader = await asyncio.gather(
            *(Peer.start(PeerOptions(initial_peers=there, host="127.0.0.1")) for _ in range(2))
        )
        try:
            await asyncio.wait_for(work(first, stranger, reader), 60)
        finally:
            await asyncio.gather(*(peer.stop() for peer in (first, stranger, reader)))

    asyncio.run(main())


async def forge(stranger: Peer, subkeys: list[Any], info: ServerInfo, seconds: float, at: Peer | None = None) -> bool:
    """Without a signature, and past the stranger's own checks; whether others have taken any of it."""
    protocol = stranger.dht.protocol
    validator, protocol.record_validator = protocol.record_validator, None
    key = protocol.node_id.generate(source=block_uid(NAME, 0))
    value = MSGPackSerializer.dumps(info.to_tuple())
    try:
        taken = False
        for peer in [*protocol.routing_table.peer_id_to_uid] if at is None else [at.peer_id]:
            count = len(subkeys)
            stored = await protocol.call_store(
                peer, [key] * count, [value] * count, [CLOCK.now() + seconds] * count, subkeys
            )
            taken |= any(stored or ())
        return taken
    finally:
        protocol.record_validator = validator


async def states(reader: Peer) -> dict[PeerID, ServerState]:
    return {peer: info.state for peer, info in (await dht.fetch(reader.dht, NAME, BLOCKS))[0].items()}


@pytest.mark.parametrize("kind", ["Ed25519", "RSA"])
def test_nobody_can_say_that_another_is_gone(kind: str, tmp_path: Path) -> None:
    async def work(node: Peer, stranger: Peer, reader: Peer) -> None:
        name = node.peer_id.to_base58()
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, ONLINE, ttl=60.0)
        for seconds in (3600.0, 3 * 86400.0):
            assert not await forge(stranger, [name], OFFLINE, seconds)
        assert await states(reader) == {node.peer_id: ServerState.ONLINE}
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, OFFLINE, ttl=61.0)  # it can say so itself
        assert await states(reader) == {node.peer_id: ServerState.OFFLINE}

    run(work, tmp_path if kind == "RSA" else None)


def test_who_comes_later_takes_the_place_of_what_was_forged() -> None:
    async def work(node: Peer, stranger: Peer, reader: Peer) -> None:
        assert await forge(stranger, [node.peer_id.to_base58()], OFFLINE, 3600.0)
        assert await states(reader) == {node.peer_id: ServerState.OFFLINE}
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, ONLINE, ttl=60.0)
        assert await states(reader) == {node.peer_id: ServerState.ONLINE}

    run(work)


def test_who_signs_nothing_is_believed_about_itself() -> None:
    """As Petals' servers, who bring their own records."""

    async def work(node: Peer, petals: Peer, reader: Peer) -> None:
        name = petals.peer_id.to_base58()
        assert await forge(petals, [name], ONLINE, 60.0)
        assert not await forge(node, [name], OFFLINE, 3600.0, at=reader)
        assert (await states(reader))[petals.peer_id] == ServerState.ONLINE

    run(work)


def test_many_entries_crowd_nobody_out() -> None:
    async def work(node: Peer, stranger: Peer, reader: Peer) -> None:
        for _ in range(10):
            names = [PeerID(b"\x12\x20" + os.urandom(32)).to_base58() for _ in range(500)]
            await forge(stranger, names, ONLINE, 60.0)
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, ONLINE, ttl=60.0)
        seen = await states(reader)
        assert seen[node.peer_id] == ServerState.ONLINE
        assert len(seen) < 2000

    run(work)


def test_entries_that_can_not_be_read_spoil_no_others() -> None:
    async def work(node: Peer, stranger: Peer, reader: Peer) -> None:
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, ONLINE, ttl=60.0)
        assert not await forge(stranger, ["2" * 99_000], ONLINE, 60.0)
        assert not await forge(stranger, [b"\xff", 7], ONLINE, 60.0)
        assert await forge(stranger, ["no peer"], ONLINE, 60.0)
        assert await states(reader) == {node.peer_id: ServerState.ONLINE}

    run(work)


def test_a_node_of_another_swarm_version_reads_them() -> None:
    """Without any of this, as Petals' servers and clients are."""

    async def work(node: Peer, stranger: Peer, reader: Peer) -> None:
        assert await dht.announce(node.dht, NAME, 0, BLOCKS, ONLINE, ttl=60.0)
        found = await stranger.dht.get(block_uid(NAME, 0), latest=True)
        value = found.value[node.peer_id.to_base58()].value
        assert value[:2] == (int(ServerState.ONLINE), 1.0)
        assert value[2]["start_block"] == 0
        assert len(value[2]["signed"]) == 2

    run(work)


def guard_and_record() -> tuple[RecordGuard, DHTRecord]:
    key = SigningKey.read(_make_key())
    me = PeerID(bytes([0, len(key.public)]) + key.public)
    guard = RecordGuard(key, me, lambda: 1000.0)
    plain = DHTRecord(
        b"k" * 20, MSGPackSerializer.dumps(me.to_base58()), MSGPackSerializer.dumps(ONLINE.to_tuple()), 1060.0
    )
    signed = DHTRecord(plain.key, plain.subkey, guard.sign_value(plain), plain.expiration_time)
    assert guard.is_signed(plain) is None
    assert guard.is_signed(signed)
    return guard, signed


GUARD, SIGNED = guard_and_record()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_of_a_record_can_be_changed(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(["key", "subkey", "value", "expiration_time"]))
    fields = vars(SIGNED).copy()
    if part == "expiration_time":
        fields[part] = data.draw(st.floats(allow_nan=True).filter(lambda x: x != SIGNED.expiration_time))
    else:
        raw = bytearray(fields[part])
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
        fields[part] = bytes(raw)
    changed = DHTRecord(**fields)
    fresh = RecordGuard(None, GUARD._me, lambda: 1000.0)
    assert fresh.is_signed(changed) is not True
    GUARD.validate(SIGNED)
    assert part in ("key", "subkey") or not GUARD.validate(changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"value": b"x" * (MAX_VALUE_BYTES + 1)},
        {"subkey": b"x" * 1000},
        {"expiration_time": 1001.0 + MAX_SECONDS},
        {"expiration_time": float("nan")},
        {"expiration_time": float("inf")},
    ],
)
def test_bounds(fields: dict[str, Any]) -> None:
    assert not RecordGuard(None, GUARD._me, lambda: 1000.0).validate(DHTRecord(**(vars(SIGNED) | fields)))


def test_rpcs_have_the_names_that_others_know() -> None:
    assert GuardedProtocol._get_handle_name(None, "rpc_store") == DHTProtocol._get_handle_name(None, "rpc_store")


def put(storage: GuardedStorage, record: DHTRecord, expiration: float | None = None, subkey: Any = None) -> bool:
    name = MSGPackSerializer.loads(record.subkey) if subkey is None else subkey
    return storage.store_subkey(
        DHTID.from_bytes(record.key), name, record.value, record.expiration_time if expiration is None else expiration
    )


def a_storage(seconds: float = 60.0) -> tuple[GuardedStorage, DHTRecord]:
    """With a signed record in it, which lives for so long."""
    storage = GuardedStorage()
    storage.guard = GUARD
    plain = DHTRecord(SIGNED.key, SIGNED.subkey, MSGPackSerializer.dumps(ONLINE.to_tuple()), time.time() + seconds)
    signed = DHTRecord(plain.key, plain.subkey, GUARD.sign_value(plain), plain.expiration_time)
    assert put(storage, signed)
    return storage, signed


def test_a_value_without_subkeys_takes_no_place() -> None:
    storage, signed = a_storage()
    key = DHTID.from_bytes(signed.key)
    assert not storage.store(key, b"x", signed.expiration_time + 3600)
    assert not GUARD.validate(DHTRecord(signed.key, MSGPackSerializer.dumps(None), b"x", 1001.0))
    assert storage.get(key).value.get(MSGPackSerializer.loads(signed.subkey)).value == signed.value


def test_an_old_record_that_is_played_again_does_not_end_the_new_one() -> None:
    storage, signed = a_storage()
    plain = DHTRecord(signed.key, signed.subkey, MSGPackSerializer.dumps(ONLINE.to_tuple()), time.time() + 0.1)
    old = DHTRecord(plain.key, plain.subkey, GUARD.sign_value(plain), plain.expiration_time)
    assert not put(storage, old)
    time.sleep(0.2)
    assert storage.get(DHTID.from_bytes(signed.key)).value.get(MSGPackSerializer.loads(signed.subkey)) is not None


def test_entries_can_not_grow_without_end_either() -> None:
    storage, signed = a_storage()
    key, end = DHTID.from_bytes(signed.key), time.time() + 100
    names = [f"n{number}" for number in range(300)]
    for size, later in ((1, 0.0), (MAX_VALUE_BYTES, 1.0)):
        for name in names:
            storage.store_subkey(key, name, b"x" * size, end + later)
    entries = storage.get(key).value
    assert sum(len(entry.value) for _, entry in entries.items()) <= MAX_KEY_BYTES
    assert entries.get(MSGPackSerializer.loads(signed.subkey)).value == signed.value


def test_many_keys_do_not_drive_out_those_with_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_module, "_MAX_KEYS", 4)
    storage, signed = a_storage()
    keys = [DHTID.generate(source=str(number)) for number in range(20)]
    taken = [storage.store_subkey(key, "name", b"x", time.time() + 3600) for key in keys]
    assert sum(taken) == 3
    assert storage.get(DHTID.from_bytes(signed.key)) is not None
    other = DHTRecord(keys[19].to_bytes(), signed.subkey, MSGPackSerializer.dumps(ONLINE.to_tuple()), time.time() + 60)
    assert put(storage, DHTRecord(other.key, other.subkey, GUARD.sign_value(other), other.expiration_time))
    assert len(storage) == 4


def test_keys_that_take_long_to_check_are_refused() -> None:
    private = rsa.generate_private_key(public_exponent=3, key_size=2048)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    data = private.public_key().public_bytes(serialization.Encoding.DER, form)
    public = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=data).SerializeToString()
    peer_id = PeerID(b"\x12\x20" + hashlib.sha256(public).digest())
    signature = private.sign(b"said", PKCS1v15(), hashes.SHA256())
    assert named_by(peer_id, public)
    assert not is_signed_by(peer_id, public, b"said", signature)
