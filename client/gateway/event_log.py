"""What a gateway tells of its requests: a JSON object a line, on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from typing import Any

_WAITING_EVENTS = 10_000
_LAST_SECONDS = 2.0


class EventLog:
    """Writes in a thread of its own: whoever reads may be slow, as a pager is, and the event loop can't wait for that.

    Events that find the queue full are left out, and all once nobody reads any more.

    Args:
        file: descriptor; not a stream, which a thread that hangs would keep locked when the process ends.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING_EVENTS)
        self._thread = threading.Thread(target=self._run, name="gateway-log", daemon=True)
        self._thread.start()

    def __call__(self, fields: dict[str, Any]) -> None:
        """Writes an event, soon."""
        with contextlib.suppress(queue.Full):
            self._events.put_nowait(fields)

    def close(self) -> None:
        """Writes what is left, if that is soon done."""
        with contextlib.suppress(queue.Full):
            self._events.put(None, timeout=_LAST_SECONDS)
        self._thread.join(_LAST_SECONDS)

    def _run(self) -> None:
        while (fields := self._events.get()) is not None:
            line = json.dumps(fields, ensure_ascii=False, default=lambda value: value.model_dump(exclude_none=True))
            left = memoryview(f"{line}\n".encode())
            with contextlib.suppress(OSError):
                while left:
                    left = left[os.write(self._file, left) :]
