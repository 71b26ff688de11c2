"""Members that are shut out: a file of PeerIDs, which is read again when it has changed."""

from __future__ import annotations

import time
from pathlib import Path

from ...errors import UsageError

_LOOK_SECONDS = 1.0
_MAX_BYTES = 2**20


class ShutOut:
    """The PeerIDs in a file, one a line; what follows ``#`` is a comment.

    Raises:
        UsageError: the file can't be read, or has something else in it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: object = None
        self._looked = -float("inf")
        self._peers: frozenset[str] = frozenset()
        self.wrong: str | None = None
        """What is wrong with the file as it is now; it goes on as it was."""
        self._read()
        if self.wrong is not None:
            raise UsageError(self.wrong)

    def has(self, peer_id: str) -> bool:
        """Whether this peer is shut out now, or was a second ago."""
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._read()
        return peer_id in self._peers

    def __bool__(self) -> bool:
        return self._path is not None

    def _read(self) -> None:
        if self._path is None:
            return
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            if stamp == self._stamp:
                return
            self._peers, self.wrong = parse_shut_out(self._path.read_text()[:_MAX_BYTES], self._path), None
            self._stamp = stamp
        except UsageError as error:
            self.wrong = str(error)
        except (OSError, UnicodeDecodeError) as error:
            self.wrong = f"can't read who is shut out from {self._path}: {getattr(error, 'strerror', None) or error}"


def parse_shut_out(text: str, where: Path) -> frozenset[str]:
    """The PeerIDs in a file's text.

    Raises:
        UsageError: a line is no PeerID.
    """
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not (40 <= len(line) <= 64 and line.isalnum() and line.isascii()):
            raise UsageError(f"line {number} of {where} is no PeerID, as swarm-node status --json shows them: {line!r}")
    return frozenset(filter(None, lines))
