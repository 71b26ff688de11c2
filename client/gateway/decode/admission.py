"""How many sessions run at a time, how many wait for their turn, and whose turn is next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextvars import ContextVar

from ..errors import invalid, too_many

_RETRY_SECONDS = 2.0
ASKER: ContextVar[str] = ContextVar("asker", default="")
"""Who asked for what is done in this context: an API key's name, or an address."""


class Admission:
    """At most ``max_sessions`` run; up to ``max_queue`` more wait: those who ask take turns, and of each the first that
    came is the next. For one event loop."""

    def __init__(self, max_sessions: int, max_queue: int) -> None:
        self.max_sessions, self.max_queue = max_sessions, max_queue
        self.running = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # whose turn is next comes first

    @property
    def waiting(self) -> int:
        """Sessions that wait."""
        return sum(map(len, self._waiting.values()))

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
        """Waits for a turn of :data:`ASKER`, which is given back by :meth:`release`."""
        if self.running < self.max_sessions and not self._waiting:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asker = ASKER.get()
        self._waiting.setdefault(asker, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given in the moment in which its taker went away
            elif turn in (mine := self._waiting.get(asker, deque())):
                mine.remove(turn)
                if not mine:
                    del self._waiting[asker]
            raise

    def release(self) -> None:
        """Ends a session; the next in the queue gets its place."""
        while self._waiting:
            asker, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[asker] = turns  # behind all others
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
