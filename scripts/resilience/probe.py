"""What ``chaos.py`` and ``soak.py`` see of a process, and the clock that they set in it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PROBE = "RESILIENCE_PROBE"
"""Names, in a process's environment, the file that it shares with whoever started it."""
_AHEAD, _SHOWN, _TASKS = 0, 8, 16
_NUMBER = struct.Struct("d")


@dataclass(frozen=True)
class Figures:
    """What a process holds. ``rss``: bytes; ``tasks``: asyncio's."""

    rss: float
    files: float
    threads: float
    tasks: float


class Probe:
    """A file shared with one process."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(24))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 24)

    def set_clock(self, ahead: float) -> None:
        """Lets the process's clock be so many seconds ahead of this machine's."""
        _NUMBER.pack_into(self._shared, _AHEAD, ahead)

    def clock_ahead(self) -> float:
        """By how much the time was ahead that the process last looked at."""
        return float(_NUMBER.unpack_from(self._shared, _SHOWN)[0])

    def figures(self, pid: int) -> Figures:
        """What the process holds now."""
        return figures(pid, _NUMBER.unpack_from(self._shared, _TASKS)[0])


def figures(pid: int, tasks: float) -> Figures:
    """What a process holds by the system's account."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss = int(status["VmRSS"].split()[0]) * 1024
    return Figures(rss, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), tasks)


def count_tasks() -> int:
    """asyncio's tasks in this process that are not done, of all threads."""
    while True:
        with contextlib.suppress(RuntimeError):  # one has come or gone meanwhile
            known = [*getattr(asyncio.tasks, "_scheduled_tasks", ()), *getattr(asyncio.tasks, "_all_tasks", ())]
            return sum(not task.done() for task in known)


def install(path: str) -> None:
    """In the process: its clock is the one that is set in the file, and its tasks are counted there."""
    with open(path, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 24)
    right = time.time

    def shown() -> float:
        (ahead,) = _NUMBER.unpack_from(shared, _AHEAD)
        _NUMBER.pack_into(shared, _SHOWN, ahead)
        return right() + ahead

    def count() -> None:
        while True:
            _NUMBER.pack_into(shared, _TASKS, count_tasks())
            time.sleep(1.0)

    time.time = shown
    threading.Thread(target=count, daemon=True).start()
