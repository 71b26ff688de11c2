"""How two peers prove to each other that both know a key of the swarm: a challenge each, and answers by HMAC-SHA256.

The connection below is encrypted, and authenticated for both PeerIDs from end to end (libp2p's Noise or TLS), over
relays too. So all that has to be proved is knowledge of the key. The proofs name both PeerIDs, both challenges and who
called: none is of use in another connection, at another time, or in the other direction. What is sealed under the keys
that both derive then (:mod:`.sealed`) comes from whoever did this handshake, and not just from the same PeerID.

Nothing here does I/O. Keys are 32 random bytes, so that nobody can guess one and try it against a recorded proof.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .key import MAX_KEYS, SwarmKey

NONCE_BYTES = PROOF_BYTES = 32
ID_BYTES = 8
_DOMAIN = b"swarm-llm lock 1"
_CALLER, _ANSWERER = b"caller", b"answerer"


@dataclass(frozen=True)
class Meeting:
    """Two peers, by the bytes of their PeerIDs, and the challenges that they have just made."""

    caller: bytes
    answerer: bytes
    caller_nonce: bytes
    answerer_nonce: bytes


@dataclass(frozen=True, repr=False)
class Secrets:
    """What both sides of a handshake know after it, and nobody else.

    Attributes:
        to_answerer, to_caller: keys of 32 bytes.
        session_id: names the two; it is no secret.
    """

    to_answerer: bytes
    to_caller: bytes
    session_id: bytes


def new_nonce() -> bytes:
    """A challenge."""
    return os.urandom(NONCE_BYTES)


def caller_proofs(keys: Sequence[SwarmKey], meeting: Meeting) -> bytes:
    """What the caller answers to the challenge: a proof for each of its keys."""
    return b"".join(_proof(key, _CALLER, meeting) for key in keys)


def find_key(proofs: bytes, keys: Iterable[SwarmKey], meeting: Meeting) -> SwarmKey | None:
    """Which of the answerer's keys the caller has; None: none of them."""
    if not proofs or len(proofs) % PROOF_BYTES or len(proofs) > MAX_KEYS * PROOF_BYTES:
        return None
    given = [proofs[at : at + PROOF_BYTES] for at in range(0, len(proofs), PROOF_BYTES)]
    for key in keys:
        expected = _proof(key, _CALLER, meeting)
        if any(hmac.compare_digest(expected, one) for one in given):
            return key
    return None


def answerer_proof(key: SwarmKey, meeting: Meeting) -> bytes:
    """What the answerer shows for its part."""
    return _proof(key, _ANSWERER, meeting)


def key_of_answer(proof: bytes, keys: Iterable[SwarmKey], meeting: Meeting) -> SwarmKey | None:
    """Which of the caller's keys the answerer has shown to know; None: none of them."""
    return next((key for key in keys if hmac.compare_digest(_proof(key, _ANSWERER, meeting), proof)), None)


def derive(key: SwarmKey, meeting: Meeting) -> Secrets:
    """The secrets of these two, in this meeting."""
    salt = meeting.caller_nonce + meeting.answerer_nonce
    data = _hkdf(key, salt, _join(b"session", meeting.caller, meeting.answerer), 64 + ID_BYTES)
    return Secrets(data[:32], data[32:64], data[64:])


def _proof(key: SwarmKey, role: bytes, meeting: Meeting) -> bytes:
    said = _join(role, meeting.caller, meeting.answerer, meeting.caller_nonce, meeting.answerer_nonce)
    return hmac.digest(_hkdf(key, b"", b"proof", 32), said, "sha256")


def _hkdf(key: SwarmKey, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=_join(_DOMAIN, info)).derive(key.secret)


def _join(*parts: bytes) -> bytes:
    """One of each list: every part comes with its length."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)
