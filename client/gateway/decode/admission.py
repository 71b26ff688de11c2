"""How many sessions run at a time, and how many wait for their turn."""

from __future__ import annotations

import asyncio
from collections import deque

from ..errors import invalid, too_many

_RETRY_SECONDS = 2.0


class Admission:
    """At most ``max_sessions`` run; up to ``max_queue`` more wait, first come first served. For one event loop."""

    def __init__(self, max_sessions: int, max_queue: int) -> None:
        self.max_sessions, self.max_queue = max_sessions, max_queue
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Sessions that wait."""
        return len(self._waiting)

    def check(self, sessions: int) -> None:
        """Refuses at once what would have to wait in a queue that is full.

        Raises:
            ApiError: 429, with a time after which to try again; 400 if there is never room for so many.
        """
        most = self.max_sessions + self.max_queue
        if sessions > most:
            raise invalid(
                f"the request asks for {sessions} texts: this gateway takes at most {most} at a time, "
                "so divide it into several requests",
                code="too_many_texts",
            )
        room = self.max_sessions - self.running + self.max_queue - self.waiting
        if sessions > room:
            raise too_many(
                f"all {self.max_sessions} sessions are taken and {self.waiting} requests wait: try again later",
                "queue_full",
                _RETRY_SECONDS,
            )

    async def acquire(self) -> None:
        """Waits for a turn, which is given back by :meth:`release`."""
        if self.running < self.max_sessions and not self._waiting:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given in the moment in which its taker went away
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """Ends a session; the next in the queue gets its place."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
