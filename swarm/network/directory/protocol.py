"""hivemind's DHT protocol, where strangers can't overwrite, crowd out or spoil what others have written."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from hivemind.dht import protocol as hivemind_protocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from ...chance import CHANCE
from .guard import RecordGuard

MAX_KEY_BYTES = 192 * 1024
"""Of all that is stored under one key. Sixteen keys are asked for in one message, of 4 MiB at most."""
_ENTRY_BYTES = 128  # that an entry takes beside its value
_MAX_KEYS = 2**15
_LOOKED_AT = 64  # keys, for one to give up
_sender: ContextVar[PeerID | None] = ContextVar("sender", default=None)


class GuardedStorage(DHTLocalStorage):
    """Keeps what has authority before what has none, and a bounded amount under each key, of a bounded number."""

    guard: RecordGuard

    def __init__(self) -> None:
        super().__init__(2 * _MAX_KEYS)
        self._own: dict[tuple[DHTID, Any], float] = {}  # until when there is what its owner has brought itself

    def store(self, key: DHTID, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """As hivemind's; a value without subkeys takes no dictionary's place."""
        if subkey is None:
            return False
        return self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Stores an entry, unless one with more authority, or a newer one with as much, is there."""
        there = self.get(key)
        entries = there.value if there is not None and isinstance(there.value, DictionaryDHTValue) else None
        old = None if entries is None else entries.get(subkey)
        mine = self._authority(key, subkey, value, expiration_time)
        if entries is None and not self._make_room_for_key(mine):
            return False
        if old is not None and entries is not None:
            theirs = self._authority(key, subkey, old.value, old.expiration_time, stored=True)
            if theirs and not mine:
                return False
            if mine and not theirs:
                del entries[subkey]
            elif expiration_time <= old.expiration_time:
                return False  # hivemind would refuse it too, and then let go of the newer one at the older one's time
        if entries is not None and not self._make_room(key, entries, subkey, value, needed=mine):
            return False
        stored = super().store_subkey(key, subkey, value, expiration_time)
        if stored and mine and self._brought_by_owner(subkey):
            self._own[key, subkey] = expiration_time
        return stored

    def _authority(self, key: DHTID, subkey: Any, value: bytes, expiration: float, *, stored: bool = False) -> bool:
        """Whether an entry was signed by its owner, or brought by it."""
        if self._own.get((key, subkey), 0.0) >= expiration if stored else self._brought_by_owner(subkey):
            return True
        record = DHTRecord(key.to_bytes(), MSGPackSerializer.dumps(subkey), value, expiration)
        return self.guard.is_signed(record) is True

    def _brought_by_owner(self, subkey: Any) -> bool:
        sender = _sender.get()
        return sender is not None and isinstance(subkey, str) and subkey == sender.to_base58()

    def _is_vague(self, key: DHTID, entries: DictionaryDHTValue, subkey: Any) -> bool:
        entry = entries.data[subkey]
        return not self._authority(key, subkey, entry.value, entry.expiration_time, stored=True)

    def _make_room(self, key: DHTID, entries: DictionaryDHTValue, subkey: Any, value: bytes, *, needed: bool) -> bool:
        """Whether there is room for an entry; for what has authority, by giving up what nobody vouches for."""
        while _size_of(entries, without=subkey) + len(value) + _ENTRY_BYTES > MAX_KEY_BYTES:
            others = [name for name, _ in entries.items() if name != subkey] if needed else []
            vague = next(
                (name for name in CHANCE.sample(others, len(others)) if self._is_vague(key, entries, name)), None
            )
            if vague is None:
                return False
            del entries[vague]
        if len(self._own) > 8 * _MAX_KEYS:
            self._own.clear()  # which only makes room
        return True

    def _make_room_for_key(self, needed: bool) -> bool:
        """Whether there is room for one more key; for what has authority, by giving up one of which nothing has."""
        if len(self) < _MAX_KEYS:
            return True
        for key in CHANCE.sample([*self.data], min(_LOOKED_AT, len(self.data))) if needed else ():
            entries = self.data[key].value
            if not isinstance(entries, DictionaryDHTValue) or all(
                self._is_vague(key, entries, subkey) for subkey in [*entries.data]
            ):
                del self[key]
                return True
        return False


def _size_of(entries: DictionaryDHTValue, *, without: Any) -> int:
    return sum(len(each.value) + _ENTRY_BYTES for name, each in entries.items() if name != without)


class GuardedProtocol(hivemind_protocol.DHTProtocol):  # type: ignore[misc]
    """Knows who brings a record, and leaves out single entries that aren't believed, not all with them."""

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> GuardedProtocol:
        protocol: GuardedProtocol = await super().create(*args, **kwargs)
        if isinstance(protocol.record_validator, RecordGuard):
            protocol.storage = GuardedStorage()
            protocol.cache = GuardedStorage()
            protocol.storage.guard = protocol.cache.guard = protocol.record_validator
        return protocol

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """As hivemind's; entries that aren't believed are left out of a whole dictionary."""
        token = _sender.set(context.remote_id)
        try:
            return await super().rpc_store(request, context)
        finally:
            _sender.reset(token)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        validator = self.record_validator
        if validator is None:
            return True
        with dictionary.freeze():
            size = 0
            for subkey, (value, expiration) in list(dictionary.items()):
                size += _ENTRY_BYTES + (len(value) if isinstance(value, bytes) else MAX_KEY_BYTES)
                if size > MAX_KEY_BYTES:  # which nobody of ours keeps, and would take long to check
                    del dictionary[subkey]
                    continue
                record = DHTRecord(key_bytes, self.serializer.dumps(subkey), value, expiration)
                if not validator.validate(record):
                    del dictionary[subkey]
        return True


GuardedProtocol.__name__ = "DHTProtocol"  # the RPCs are called after the class
