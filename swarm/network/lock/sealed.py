"""What peers say to each other after a handshake: encrypted and numbered, so that nobody else can say or repeat it."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .handshake import ID_BYTES, Secrets

_NUMBER_BYTES = 8
_HEAD = ID_BYTES + _NUMBER_BYTES
OVERHEAD = _HEAD + 16
_WINDOW = 4096  # messages that may overtake each other


class NotSealedError(Exception):
    """This was not said by the other side of the handshake, or was said before."""


class Calling:
    """The caller's end. Each request has a number of its own, under which the answer comes."""

    def __init__(self, secrets: Secrets) -> None:
        self._id, self._out, self._in = secrets.session_id, AESGCM(secrets.to_answerer), AESGCM(secrets.to_caller)
        self._last = 0

    def request(self, kind: bytes, data: bytes) -> tuple[int, bytes]:
        """A request's number, and its bytes."""
        self._last += 1
        sealed = self._out.encrypt(_nonce(self._last), data, self._id + kind)
        return self._last, self._id + self._last.to_bytes(_NUMBER_BYTES, "big") + sealed

    def answer(self, kind: bytes, number: int, sealed: bytes) -> bytes:
        """What the answer to a request says.

        Raises:
            NotSealedError: somebody else said it.
        """
        return _decrypt(self._in, number, sealed, self._id + kind)


class Answering:
    """The answerer's end."""

    def __init__(self, secrets: Secrets) -> None:
        self.session_id = secrets.session_id
        self._out, self._in = AESGCM(secrets.to_caller), AESGCM(secrets.to_answerer)
        self._seen = Seen()

    def request(self, kind: bytes, message: bytes) -> tuple[int, bytes]:
        """A request's number, and what it says.

        Raises:
            NotSealedError: somebody else said it, or it has been here before.
        """
        number = int.from_bytes(message[ID_BYTES:_HEAD], "big")
        if session_of(message) != self.session_id or not self._seen.is_new(number):
            raise NotSealedError
        data = _decrypt(self._in, number, message[_HEAD:], self.session_id + kind)
        self._seen.add(number)
        return number, data

    def answer(self, kind: bytes, number: int, data: bytes) -> bytes:
        """The answer to a request. Each has one."""
        return self._out.encrypt(_nonce(number), data, self.session_id + kind)


class Seen:
    """The numbers that were used: all old ones, and those of a window behind the highest."""

    def __init__(self) -> None:
        self._highest = 0
        self._bits = 0  # bit n: the highest less n

    def is_new(self, number: int) -> bool:
        """Whether it was never used, as far as is known."""
        behind = self._highest - number
        return number > 0 and (behind < 0 or (behind < _WINDOW and not self._bits >> behind & 1))

    def add(self, number: int) -> None:
        """It is used now."""
        ahead = number - self._highest
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & ((1 << _WINDOW) - 1) if ahead < _WINDOW else 1
            self._highest = number
        else:
            self._bits |= 1 << -ahead


def session_of(message: bytes) -> bytes:
    """The handshake that a request names."""
    return message[:ID_BYTES]


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _decrypt(cipher: AESGCM, number: int, sealed: bytes, said_with: bytes) -> bytes:
    try:
        return cipher.decrypt(_nonce(number), sealed, said_with)
    except InvalidTag:
        raise NotSealedError from None
