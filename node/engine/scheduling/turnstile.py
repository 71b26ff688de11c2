"""Nodes of one machine compute in turns where each would use most of its cores.

Two nodes that run at the same time on the same cores each take much more than twice as long: at the end of every matrix
product one thread waits for another that isn't running (docs/benchmarks.md). In turns, each has the machine to itself.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST_WAIT_S = 1.0  # whoever has the turn may be stopped, or slower than this
_WITHOUT_S = 10.0  # so long it is left alone then
_POLL_S = 0.0001


class Turnstile:
    """Lets one through at a time, of all processes of this user that have the same ``folder``.

    Who waits has the place in the queue, and who has had a turn queues before the next one, so that nobody is kept out.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        OSError: no such locks can be had here.
        """
        if fcntl is None:
            raise OSError("this system has no file locks of the kind that is needed")
        self._queue, self._turn = (_open(folder / f"swarm-{os.getuid()}-{name}.lock") for name in ("queue", "turn"))
        self._inside = False
        self._without_until = 0.0

    def enter(self) -> None:
        """Waits for a turn, but not for ever: then it is better to go in beside somebody, and for a while to."""
        now = time.monotonic()
        if now < self._without_until:
            return
        queued = _lock(self._queue, now + _LONGEST_WAIT_S)
        self._inside = _lock(self._turn, now + _LONGEST_WAIT_S)
        if queued:
            fcntl.flock(self._queue, fcntl.LOCK_UN)
        if not self._inside:
            self._without_until = time.monotonic() + _WITHOUT_S

    def __enter__(self) -> float:
        """Seconds that it waited."""
        asked = time.perf_counter()
        self.enter()
        return time.perf_counter() - asked

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Lets the next one in. Twice is harmless."""
        if self._inside:
            self._inside = False
            fcntl.flock(self._turn, fcntl.LOCK_UN)


@functools.cache
def open_turnstile(threads: int) -> Turnstile | None:
    """The turnstile of this machine for a node that computes with so many threads, if it needs one."""
    if 2 * threads <= (os.cpu_count() or 1):
        return None
    try:
        return Turnstile(Path(tempfile.gettempdir()))
    except OSError:
        return None


def _open(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(file).st_uid != os.getuid():  # somebody else's, who could keep it
        os.close(file)
        raise OSError(f"{path} belongs to another user")
    return file


def _lock(file: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True
