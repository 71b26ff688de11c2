"""HTTP connections, of which nobody can have all, nor keep one without asking for something."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_CONNECTIONS = 1024
MAX_OF_ONE = 256
"""From one address. A proxy in front of the gateway is one."""
HEAD_SECONDS = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, which waits for the head of a request for ever."""

    _open: ClassVar[Counter[str]] = Counter()  # by address; those of this process

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection, if there is room for it."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._open[self._address] += 1
        self._waiting: asyncio.TimerHandle | None = None
        if self._open[self._address] > MAX_OF_ONE or self._open.total() > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self._stop_waiting()
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> Any:
        """All of its head has come."""
        self._stop_waiting()
        return super().on_headers_complete()

    def _await_head(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
