"""Which records are believed: signed ones, and those that a peer has written itself, before what others say of it.

A record of ours carries its writer's signature inside Petals' format, in a field that Petals ignores. It covers key,
subkey, value and time of expiration, so that nothing of it can be changed or kept alive by others.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

from ...wire.peer_id import read_peer_id
from .signing import SigningKey, is_signed_by

MAX_VALUE_BYTES = 2**15
MAX_SUBKEY_BYTES = 320
MAX_SECONDS = 6 * 3600.0
"""How long a record may live: whoever has left without a word is forgotten after that."""
_FIELD = "signed"
_DOMAIN = b"swarm record 1"
_MAX_KNOWN = 2**16


class RecordGuard(RecordValidatorBase):
    """Signs this peer's records, and checks all that others send.

    Args:
        key: what to sign with; None: this peer writes nothing.
        now: the swarm's time, in seconds since the epoch.
    """

    def __init__(self, key: SigningKey | None, me: PeerID, now: Callable[[], float]) -> None:
        self._key, self._me, self._now = key, me, now
        self._signed: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()  # until when a key's subkey is
        self._checked: OrderedDict[bytes, bool] = OrderedDict()

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value with a signature, if the record is this peer's own."""
        value = MSGPackSerializer.loads(record.value)
        fields = _fields_of(value)
        if self._key is None or fields is None or owner_of(record.subkey) != self._me:
            return record.value
        signature = self._key.sign(_message(record, MSGPackSerializer.dumps(value)))
        fields[_FIELD] = [self._key.public, signature]
        return MSGPackSerializer.dumps(value)

    def validate(self, record: DHTRecord) -> bool:
        """Whether to believe a record, wherever it comes from."""
        if (
            len(record.value) > MAX_VALUE_BYTES
            or len(record.subkey) > MAX_SUBKEY_BYTES
            or not record.expiration_time <= self._now() + MAX_SECONDS
        ):
            return False
        try:
            subkey = MSGPackSerializer.loads(record.subkey)
        except Exception:  # msgpack raises what it likes
            return False
        if not isinstance(subkey, str):  # hivemind sorts them, and fails where kinds are mixed
            return False
        if owner_of(record.subkey) is None:
            return True
        place = record.key, record.subkey
        signed = self.is_signed(record)
        if signed:
            self._signed[place] = max(self._signed.pop(place, 0.0), record.expiration_time)
            _shorten(self._signed)
        return signed or (signed is None and self._signed.get(place, 0.0) < self._now())

    def is_signed(self, record: DHTRecord) -> bool | None:
        """Whether the owner has signed a record; None if nobody has."""
        digest = hashlib.sha256(_message(record, record.value)).digest()
        if digest in self._checked:
            return self._checked[digest] or None
        try:
            value = MSGPackSerializer.loads(record.value)
        except Exception:
            return False
        fields = _fields_of(value)
        found = None if fields is None else fields.pop(_FIELD, None)
        if found is None:
            self._checked[digest] = False
            _shorten(self._checked)
            return None
        owner = owner_of(record.subkey)
        if owner is None or not isinstance(found, list) or [type(part) for part in found] != [bytes, bytes]:
            return False
        if not is_signed_by(owner, found[0], _message(record, MSGPackSerializer.dumps(value)), found[1]):
            return False
        self._checked[digest] = True
        _shorten(self._checked)
        return True


def owner_of(subkey: bytes) -> PeerID | None:
    """Whom a record is about; None if its subkey, as it is sent, is no PeerID."""
    try:
        return read_peer_id(MSGPackSerializer.loads(subkey))
    except Exception:  # msgpack raises what it likes
        return None


def _fields_of(value: Any) -> dict[str, Any] | None:
    """The dict of a value in which there is room for a signature."""
    if isinstance(value, (list, tuple)) and len(value) > 2:
        value = value[2]
    return value if isinstance(value, dict) else None


def _message(record: DHTRecord, value: bytes) -> bytes:
    parts = (_DOMAIN, record.key, record.subkey, struct.pack(">d", record.expiration_time), value)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _shorten(known: OrderedDict[Any, Any]) -> None:
    while len(known) > _MAX_KNOWN:
        known.popitem(last=False)
