"""The key of a swarm: 32 random bytes, in a file of one line. It is never a password, so it can't be guessed."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ...errors import UsageError

PREFIX = "swk1_"
_SECRET_BYTES, _CHECK_BYTES = 32, 4
_MAX_FILE_BYTES = 4096
_TEXT_CHARS = len(PREFIX) + (_SECRET_BYTES + _CHECK_BYTES) * 4 // 3
MAX_KEYS = 4
"""That a peer has at a time: the swarm's, and older or newer ones while it is changed."""


class SwarmKey:
    """A key. It shows itself only when it is asked to (:meth:`text`), so that no log has it."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    @classmethod
    def new(cls) -> SwarmKey:
        """A random one."""
        return cls(os.urandom(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str, where: str) -> SwarmKey:
        """Reads the form of :meth:`text`.

        Args:
            where: it comes from, for the error, which doesn't show the text.

        Raises:
            UsageError: it is no key, or damaged.
        """
        data = b""
        if len(text) == _TEXT_CHARS and text.startswith(PREFIX) and text.isascii():
            try:
                data = base64.b64decode(text.removeprefix(PREFIX), altchars=b"-_", validate=True)
            except ValueError:
                data = b""
        secret = data[:_SECRET_BYTES]
        if not data or _check(secret) != data[_SECRET_BYTES:]:
            raise UsageError(f"{where} has no swarm key, or a damaged one: swarm-node key new > swarm.key makes one")
        return cls(secret)

    def text(self) -> str:
        """One word, with a few bytes by which a mistake in copying is noticed."""
        return PREFIX + base64.urlsafe_b64encode(self.secret + _check(self.secret)).decode()

    def __repr__(self) -> str:
        return "SwarmKey(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SwarmKey) and other.secret == self.secret

    def __hash__(self) -> int:
        return hash(self.secret)


def read_keys(given: Iterable[str | os.PathLike[str] | SwarmKey]) -> tuple[SwarmKey, ...]:
    """Keys that are given by the names of their files, or themselves.

    Raises:
        UsageError: a file can't be read or has no key, or there are too many keys.
    """
    keys = tuple(dict.fromkeys(one if isinstance(one, SwarmKey) else _read(one) for one in given))
    if len(keys) > MAX_KEYS:
        raise UsageError(f"a peer has at most {MAX_KEYS} swarm keys at a time: leave out the oldest")
    return keys


def given_keys(values: Iterable[str] | None) -> tuple[str, ...]:
    """What ``--swarm-key`` or its variable say. On a command line everybody on the machine can read it.

    Raises:
        UsageError: a key itself is on the command line.
    """
    keys = tuple(part for value in values or () for part in value.split(",") if part)
    variable = os.environ.get("SWARM_KEY", "").replace(",", " ").split()
    if any(key.startswith(PREFIX) and key not in variable for key in keys):
        raise UsageError(
            "a swarm key doesn't belong on the command line, where everybody on this machine can read it: give its "
            "file, or put it into the variable SWARM_KEY"
        )
    return keys


def _read(given: str | os.PathLike[str]) -> SwarmKey:
    if isinstance(given, str) and given.startswith(PREFIX):
        return SwarmKey.parse(given.strip(), "what was given")
    path = Path(given).expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode(errors="replace")
    except OSError as error:
        raise UsageError(f"can't read the swarm key in {path}: {error.strerror}") from error
    return SwarmKey.parse(text.strip(), str(path))


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(b"swarm-llm key 1" + secret).digest()[:_CHECK_BYTES]
