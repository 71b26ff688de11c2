"""The answering side of the lock: lets peers prove that they know the key, and remembers who has."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .handshake import NONCE_BYTES, Meeting, answerer_proof, derive, find_key, new_nonce
from .key import SwarmKey
from .sealed import Answering, session_of

WELCOME, WRONG_KEY, SHUT_OUT, LOCKED = b"\x01", b"\x02", b"\x03", b"\x04"
"""How an answer begins. ``LOCKED``: to who only asks whether there is a lock."""
SESSION_SECONDS = 3600.0
_CHALLENGE_SECONDS = 30.0
_MAX_CHALLENGES = 1024
_MAX_MEMBERS = 4096
_SESSIONS_EACH = 4  # of one peer, which may start again or do two handshakes at once


@dataclass(frozen=True)
class _Challenge:
    meeting: Meeting
    until: float


class Gate:
    """
    Args:
        me: the own PeerID's bytes.
        is_shut_out: whether a member, by its PeerID's bytes, is to be refused all the same.
        now: seconds of a clock that only goes on.

    Attributes:
        refused: how many proofs and questions were turned away, by why.
    """

    def __init__(
        self,
        me: bytes,
        keys: Sequence[SwarmKey],
        is_shut_out: Callable[[bytes], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me, self._keys, self._is_shut_out, self._now = me, keys, is_shut_out, now
        self._challenges: OrderedDict[bytes, _Challenge] = OrderedDict()
        self._members: OrderedDict[bytes, OrderedDict[bytes, tuple[Answering, float]]] = OrderedDict()
        self.refused: Counter[str] = Counter(no_key=0, wrong_key=0, shut_out=0)

    def hello(self, caller: bytes, message: bytes) -> bytes:
        """A challenge to a caller that has sent one, or the word that there is a lock."""
        if self._is_shut_out(caller):
            return self._refuse("shut_out", SHUT_OUT)
        if message[:1] != WELCOME or len(message) != 1 + NONCE_BYTES:
            return self._refuse("no_key", LOCKED)
        meeting = Meeting(caller, self._me, message[1:], new_nonce())
        self._challenges.pop(caller, None)
        self._challenges[caller] = _Challenge(meeting, self._now() + _CHALLENGE_SECONDS)
        if len(self._challenges) > _MAX_CHALLENGES:
            self._challenges.popitem(last=False)
        return WELCOME + meeting.answerer_nonce

    def prove(self, caller: bytes, message: bytes) -> bytes:
        """Our proof to a caller whose proof is right. Each challenge is good for one try."""
        challenge = self._challenges.pop(caller, None)
        if self._is_shut_out(caller):
            return self._refuse("shut_out", SHUT_OUT)
        if challenge is None or challenge.until < self._now():
            return self._refuse("wrong_key", WRONG_KEY)
        key = find_key(message, self._keys, challenge.meeting)
        if key is None:
            return self._refuse("wrong_key", WRONG_KEY)
        self._admit(caller, Answering(derive(key, challenge.meeting)))
        return WELCOME + answerer_proof(key, challenge.meeting)

    def find(self, caller: bytes, message: bytes) -> Answering | None:
        """The handshake that a request names, if this caller has done it and may still come in."""
        sessions = self._members.get(caller, OrderedDict())
        answering, until = sessions.get(session_of(message), (None, 0.0))
        if answering is None or until < self._now():
            return None
        if self._is_shut_out(caller):
            self._refuse("shut_out", SHUT_OUT)
            return None
        return answering

    def knows(self, caller: bytes) -> bool:
        """Whether a peer has proved itself, maybe long ago."""
        return caller in self._members

    def _admit(self, caller: bytes, answering: Answering) -> None:
        sessions = self._members.setdefault(caller, OrderedDict())
        sessions[answering.session_id] = answering, self._now() + SESSION_SECONDS
        if len(sessions) > _SESSIONS_EACH:
            sessions.popitem(last=False)
        self._members.move_to_end(caller)
        if len(self._members) > _MAX_MEMBERS:
            self._members.popitem(last=False)

    def _refuse(self, why: str, answer: bytes) -> bytes:
        self.refused[why] += 1
        return answer
